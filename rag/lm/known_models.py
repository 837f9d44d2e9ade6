"""Config facts of well-known models, shipped so that they can be planned without a network."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_FACTS_PATH = Path(__file__).with_name("known_models.json")


@dataclass(frozen=True, slots=True)
class KnownModel:
    """What a publisher's config.json says, as the fields of transformers' own config class.

    `hub_repos` are the repositories with these facts, the first one the model meant by `name`.
    `source` is where the facts were taken from. `num_parameters` is the published count, which the
    built model is held to; `quantization` names the format of a checkpoint that is not stored in
    the config's dtype.
    """

    name: str
    hub_repos: tuple[str, ...]
    source: str
    num_parameters: int
    quantization: str | None
    config: dict[str, Any]


@cache
def known_models() -> dict[str, KnownModel]:
    """Return the known models by name."""
    facts = json.loads(_FACTS_PATH.read_text(encoding="utf-8"))
    return {
        name: KnownModel(name, tuple(model.pop("hub_repos")), **model)
        for name, model in facts.items()
    }


def find_known_model(name: str) -> KnownModel | None:
    """Return the known model of that name or hub id, with or without its owner; case is free."""
    wanted = name.lower()
    for model in known_models().values():
        ids = [model.name, *model.hub_repos, *(repo.split("/")[1] for repo in model.hub_repos)]
        if wanted in map(str.lower, ids):
            return model
    return None
