"""What was measured once on a machine and is remembered: prefill rates, effective lengths."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import delete, select

from rag.store.database import Database, upsert
from rag.store.schema import calibration

_EFFECTIVE_LENGTH = "effective length: "


@dataclass(frozen=True, slots=True)
class LengthPoint:
    """What was measured at one length.

    `correct` is the mean score of lookups, `[low, high]` its 95% interval by haystacks, over
    `num_questions` about `num_haystacks`. Prefill seconds are the median of those measured, None
    where a server read the prompt, and those predicted.
    """

    tokens: int
    correct: float
    low: float
    high: float
    num_haystacks: int
    num_questions: int
    prefill_seconds: float | None
    predicted_seconds: float | None


@dataclass(frozen=True, slots=True)
class DepthCell:
    """Lookups at one length whose fact lies in one stretch of the document: 0 its start, 1 its end.

    `correct` is their mean score.
    """

    tokens: int
    depth_from: float
    depth_to: float
    correct: float
    num_questions: int


@dataclass(frozen=True, slots=True)
class EffectiveLength:
    """How long a prompt one model uses well, by `fathom calibrate`.

    Attributes:
        model: its name.
        model_id: `Engine.model_id`, which tells its weights from others of that name.
        tokens: the 5th percentile, which the gate holds to; 0 if it is not measurable because the
            model answers too little even at the shortest length.
        median_tokens: the middle of the bootstrap.
        high_tokens: its 95th percentile.
        longest_tokens: the longest prompt tried; nothing is known beyond it.
        base: the accuracy that the fitted curve has at the shortest length.
        floor: what the base had to reach.
        scored_by: `replies` (the value stands in what the model wrote) or `options` (it is the
            likeliest of those that the text holds), for models that cannot write it.
        points: what was measured at each length, shortest first.
        cells: the same lookups by length and depth; none in records older than they are.
        tasks: of each task its base, and its effective length by itself; 0 if not measurable.
        attention: the kind of attention that read the prompts; `own` is what the model was made
            with, the only one that answers from a whole document.
        suite: version of the synthetic suite.
        seed: of haystacks and bootstrap.
        filler: what the facts were hidden in.
        dtype: of the weights.
        device: that it was measured on.
        measured_at: ISO 8601, UTC.
    """

    model: str
    model_id: str
    tokens: int
    median_tokens: int
    high_tokens: int
    longest_tokens: int
    base: float
    floor: float
    scored_by: str
    points: tuple[LengthPoint, ...]
    tasks: Mapping[str, Mapping[str, float]]
    attention: str
    suite: int
    seed: int
    filler: str
    dtype: str
    device: str
    measured_at: str
    cells: tuple[DepthCell, ...] = ()

    @property
    def is_measurable(self) -> bool:
        """Whether there is a length at all that the model was seen to use well."""
        return self.tokens > 0

    def to_json(self) -> dict[str, Any]:
        """Return the object that `fathom calibrate --json` prints."""
        return asdict(self) | {"measurable": self.is_measurable}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "EffectiveLength":
        """Rebuild it from what `to_json` gave."""
        fields = {name: value[name] for name in cls.__dataclass_fields__ if name in value}
        fields["points"] = tuple(LengthPoint(**point) for point in value["points"])
        fields["cells"] = tuple(DepthCell(**cell) for cell in value.get("cells", ()))
        return cls(**fields)


class CalibrationStore:
    """The measurements of one library, each a JSON value under a key of the caller's making."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def load(self, key: str) -> Any:  # noqa: ANN401 - whatever JSON was saved
        """Return the value saved under `key`, or None."""
        query = select(calibration.c.value).where(calibration.c.key == key)
        with self._database.read() as connection:
            value = connection.scalar(query)
        return None if value is None else json.loads(value)

    def load_all(self, prefix: str) -> dict[str, Any]:
        """Return every value whose key begins with `prefix`, by its key, the oldest first."""
        query = (
            select(calibration.c.key, calibration.c.value)
            .where(calibration.c.key.startswith(prefix, autoescape=True))
            .order_by(calibration.c.created_at, calibration.c.key)
        )
        with self._database.read() as connection:
            return {row.key: json.loads(row.value) for row in connection.execute(query)}

    def save(self, key: str, value: Any) -> None:  # noqa: ANN401 - any JSON value
        """Save a JSON value under `key`, in place of an earlier one."""
        row = {
            "key": key,
            "value": json.dumps(value),
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with self._database.write() as connection:
            upsert(connection, calibration, [row])

    def forget(self, prefix: str) -> None:
        """Drop every value whose key begins with `prefix`."""
        with self._database.write() as connection:
            connection.execute(
                delete(calibration).where(calibration.c.key.startswith(prefix, autoescape=True))
            )

    def effective_length(self, model_id: str) -> EffectiveLength | None:
        """Return what was measured of these weights, None if they were not calibrated."""
        found = self.load(_EFFECTIVE_LENGTH + model_id)
        return EffectiveLength.from_json(found) if found else None

    def effective_length_of(self, model: str) -> EffectiveLength | None:
        """Return what was measured last of a model of this name, whose weights are not at hand."""
        found = [
            EffectiveLength.from_json(value) for value in self.load_all(_EFFECTIVE_LENGTH).values()
        ]
        return next((one for one in reversed(found) if one.model == model), None)

    def save_effective_length(self, found: EffectiveLength) -> None:
        """Save it in place of an earlier one of the same weights."""
        self.save(_EFFECTIVE_LENGTH + found.model_id, found.to_json())
