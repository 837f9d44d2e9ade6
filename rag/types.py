"""The frozen records that cross a folder border. No torch, no SQL, no Gradio.

Character offsets are half-open ranges of code points in a document's canonical text.
`to_json` of the outermost records gives exactly the objects that `--json` prints.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

# ---- documents --------------------------------------------------------------------------------


def storable(text: str) -> str:
    """Return the text with U+FFFD in place of each NUL and each lone surrogate.

    No database keeps NUL faithfully and no UTF-8 encodes a surrogate; one code point stands for
    one, so that no offset moves.
    """
    return _UNSTORABLE.sub("\N{REPLACEMENT CHARACTER}", text)


_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Page:
    """One page: 1-based number, the label printed on it (None if it has none), its text range."""

    number: int
    label: str | None
    start: int
    end: int

    def __post_init__(self) -> None:
        if self.label is not None:
            object.__setattr__(self, "label", storable(self.label))


@dataclass(frozen=True, slots=True)
class Section:
    """One heading of the document; its section runs to the next heading of the same level or above.

    `level` is 1 for the outermost; `start` is the offset of the heading itself.
    """

    level: int
    title: str
    start: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", storable(self.title))


@dataclass(frozen=True, slots=True)
class CanonicalText:
    """What a reader makes of a file: the one text that every offset in Fathom refers to.

    What a database cannot hold is replaced here, once, before anything is cut from the text: see
    `storable`.
    """

    text: str
    media_type: str
    pages: tuple[Page, ...] = ()
    sections: tuple[Section, ...] = ()
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", storable(self.text))


@dataclass(frozen=True, slots=True)
class Chunk:
    """A stretch `[start, end)` of a document's canonical text that is embedded and searched.

    `num_tokens` counts the embedder's tokens. `page_first` and `page_last` are page numbers, None
    where the format has no pages. `heading_path` runs from the outermost heading to the innermost.
    """

    ordinal: int
    start: int
    end: int
    text: str
    num_tokens: int
    page_first: int | None = None
    page_last: int | None = None
    heading_path: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Document:
    """One content as the store knows it, kept once however many names it has.

    `source` is the name it was first ingested under (a resolved path, or `upload:` and a file
    name) and `version` counts that name's contents from 1. `is_latest` says that some name stands
    for it now: only such documents are searched, unless an older one is asked for by its number.
    `owner` is the account it belongs to, "" where nobody signs in.
    """

    id: int
    title: str
    source: str
    version: int
    is_latest: bool
    content_sha256: str
    media_type: str
    num_bytes: int
    num_chars: int
    num_pages: int
    num_chunks: int
    warnings: tuple[str, ...]
    created_at: str
    collections: tuple[str, ...] = ()
    owner: str = ""

    @property
    def version_key(self) -> str:
        """What names this version of this document and no other."""
        return f"{self.id}:{self.version}:{self.content_sha256}"

    def to_json(self) -> dict[str, Any]:
        """Return the object that `fathom list --json` prints on one line."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Collection:
    """A named group of documents, and how many (latest versions) are in it."""

    name: str
    num_documents: int

    def to_json(self) -> dict[str, Any]:
        """Return the object that `--json` prints on one line."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Passage:
    """A stretch of one document handed to one question.

    `score` is the retriever's (higher is nearer), None where the whole document is read.
    """

    document: Document
    start: int
    end: int
    text: str
    page: int | None
    section: str | None
    score: float | None = None
    chunk_ordinals: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ContextPassage:
    """A passage with the number `[marker]` under which the prompt shows it."""

    marker: int
    passage: Passage


@dataclass(frozen=True, slots=True)
class IngestProgress:
    """How far an ingest has come.

    `fraction` is the share of the bytes given that are embedded, from 0 to 1. `pages` and `chunks`
    count what is embedded, of documents that were not known; rates are per second since the start.
    `seconds_left` is None until something is embedded.
    """

    stage: str  # reading | embedding
    title: str
    files_done: int
    num_files: int
    pages: int
    chunks: int
    fraction: float
    pages_per_second: float
    chunks_per_second: float
    seconds_left: float | None


# ---- routes -----------------------------------------------------------------------------------


class Route(StrEnum):
    """How the documents are read for one question."""

    FULL = "full"
    RETRIEVAL = "retrieval"
    SCAN = "scan"


class AnswerMode(StrEnum):
    """Whose words an answer is: the model's, the documents', or a number that the text proves."""

    WRITTEN = "written"
    QUOTED = "quoted"
    COUNTED = "counted"


class DecodingWay(StrEnum):
    """How the tokens of an answer were computed, one after the other."""

    PLAIN = "plain"
    DRAFTS = "drafts"
    STATIC = "static"
    RECORDED = "recorded"
    INTEGERS = "integers"


class QuestionClass(StrEnum):
    """What a question asks of a document."""

    LOOKUP = "lookup"
    MULTI_HOP = "multi-hop"
    COMPARISON = "comparison"
    AGGREGATE = "aggregate"
    SUMMARY = "summary"


@dataclass(frozen=True, slots=True)
class Gate:
    """One limit of this model on this machine, compared with what one route needs.

    `value` and `limit` share `unit`; None means that the number cannot be known here, and such a
    gate has not passed. `kv_dtype` is the cache's format where it is not the model's own: the gates
    of a route with it come after those without it that failed, and decide.
    """

    gate: str
    value: float | None
    limit: float | None
    unit: str
    passed: bool
    route: str
    kv_dtype: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the gate as it stands in a receipt."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class RouteEstimate:
    """What a route is worth for one question.

    `probability` is that it answers rightly; `cost_tokens` are the prompt tokens that it must
    compute, those in a kept cache left out; `utility` is the probability less the thrift for that
    cost.
    """

    route: Route
    probability: float
    cost_tokens: int
    utility: float


@dataclass(frozen=True, slots=True)
class RouteDecision:
    """The route taken, the reason in one sentence, and every number that was compared.

    `class_reason` says why the question is of its class; `mode` is whose words the answer will be;
    `routes` are what full and retrieval are worth, best first, where both could be weighed.
    """

    route: Route
    reason: str
    question_class: QuestionClass
    gates: tuple[Gate, ...]
    class_reason: str = ""
    mode: AnswerMode = AnswerMode.WRITTEN
    routes: tuple[RouteEstimate, ...] = ()


# ---- answers ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Citation:
    """`quote` is `[start, end)` of the document's canonical text.

    `verified` says that the stored text at that place was read again and equals the quote. Where
    the answer is a stretch of it, that is `[answer_start, answer_end)` of the same text.
    """

    marker: int
    document: int
    title: str
    version: int
    page: int | None
    section: str | None
    start: int
    end: int
    quote: str
    verified: bool
    answer_start: int | None = None
    answer_end: int | None = None


@dataclass(frozen=True, slots=True)
class ReadExtent:
    """How much of the documents asked about was in the prompt, in tokens and in chunks."""

    tokens: int
    of_tokens: int
    chunks: int
    of_chunks: int
    not_read: str


@dataclass(frozen=True, slots=True)
class KVBytes:
    """KV-cache bytes of the whole exchange: from the formula, and summed over the real tensors.

    None where a server holds the cache and does not tell, and for quotations, which keep none.
    """

    predicted: int | None
    actual: int | None


@dataclass(frozen=True, slots=True)
class Seconds:
    """Wall-clock seconds of each step.

    Of an answer that was written in step with others, `decode` counts every pass it took part in.
    Where a server runs the model, `prefill` ends with its first word and has no prediction.
    """

    retrieve: float
    prefill: float
    prefill_predicted: float | None
    decode: float
    total: float


@dataclass(frozen=True, slots=True)
class ScanTally:
    """What a scan did: windows read, items found, and findings dropped.

    `dropped_unverified` are those that do not stand in the window, `dropped_repeats` those that
    were found before. A count from the text itself has one window and drops nothing.
    """

    windows: int
    items: int
    dropped_unverified: int
    dropped_repeats: int


@dataclass(frozen=True, slots=True)
class Decoding:
    """How a written answer's tokens were computed, which is what its seconds of decoding hang on.

    `num_rows` answers were written in step. `drafted` tokens were read ahead where the answer
    copies, `accepted` of them were the model's own choice; the text is what it is without. Rows in
    step and a static step, recorded or called, add up in another order, which in 16 bits can tip a
    close choice; so can `integers`, the weights that the model's file holds, unrounded. `refused`
    says in words which faster way was wanted and not taken, and why.
    """

    way: DecodingWay
    num_rows: int = 1
    drafted: int = 0
    accepted: int = 0
    refused: str = ""


@dataclass(frozen=True, slots=True)
class Receipt:
    """How one answer was made: what was read, what was not, which numbers against which limits.

    `escalations` tell each plan that was given up, and why; tokens, bytes and the seconds of each
    step are those of the last plan, `seconds.total` is of all. `cached_tokens` is None where a
    server does not tell. `scan` is None for answers by another route. `standalone_question` is a
    follow-up as it was rewritten and asked; None where the question stood alone. `asked_for` is the
    route that the person chose, None where the router did; `breadth` how many times the retrieval
    budget was read. `kv_dtype` is the format of the cache, None where it is the model's own.
    `thrift` is what routes were weighed with, where they were: the probability of being right that
    1,000 prompt tokens were worth; None in receipts older than it. `named` says, where the question
    names documents in words, which were asked and which left out; empty where it names none.
    `decoding` is None where no model here wrote from one prompt: of quotations, counts, scans and
    servers, and in receipts older than it.
    """

    id: str
    route: Route
    reason: str
    question_class: QuestionClass
    gates: tuple[Gate, ...]
    read: ReadExtent
    prompt_tokens: int
    cached_tokens: int | None
    new_tokens: int
    kv_bytes: KVBytes
    seconds: Seconds
    escalations: tuple[str, ...]
    model: str
    embedder: str
    prompt_sha256: str
    class_reason: str = ""
    mode: AnswerMode = AnswerMode.WRITTEN
    scan: ScanTally | None = None
    routes: tuple[RouteEstimate, ...] = ()
    standalone_question: str | None = None
    asked_for: Route | None = None
    breadth: int = 1
    kv_dtype: str | None = None
    thrift: float | None = None
    named: str = ""
    decoding: Decoding | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer's text with its `[n]` markers, the citations they stand for, and the receipt."""

    answer: str
    abstained: bool
    citations: tuple[Citation, ...]
    receipt: Receipt

    def to_json(self) -> dict[str, Any]:
        """Return exactly the object that `fathom ask --json` prints."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Conversation:
    """What was asked in one go; `title` is the person's own or, without one, the first question.

    Times are ISO 8601, UTC; `num_questions` counts a question that was asked again once.
    """

    id: str
    title: str
    created_at: str
    updated_at: str
    num_questions: int


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question of a conversation, and its answers: several where it was asked again."""

    question: str
    answers: tuple[Answer, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the object that an export holds for it."""
        return asdict(self)


def answer_from_json(value: Mapping[str, Any]) -> Answer:
    """Rebuild an Answer from what `Answer.to_json` gave, e.g. from the store."""
    receipt = dict(value["receipt"])
    receipt["route"] = Route(receipt["route"])
    receipt["question_class"] = QuestionClass(receipt["question_class"])
    receipt["gates"] = tuple(Gate(**gate) for gate in receipt["gates"])
    receipt["read"] = ReadExtent(**receipt["read"])
    receipt["kv_bytes"] = KVBytes(**receipt["kv_bytes"])
    receipt["seconds"] = Seconds(**receipt["seconds"])
    receipt["escalations"] = tuple(receipt["escalations"])
    receipt["mode"] = AnswerMode(receipt.get("mode", AnswerMode.WRITTEN))
    if receipt.get("scan"):
        receipt["scan"] = ScanTally(**receipt["scan"])
    if receipt.get("decoding"):
        way = DecodingWay(receipt["decoding"]["way"])
        receipt["decoding"] = Decoding(**{**receipt["decoding"], "way": way})
    if receipt.get("asked_for"):
        receipt["asked_for"] = Route(receipt["asked_for"])
    receipt["routes"] = tuple(
        RouteEstimate(**{**estimate, "route": Route(estimate["route"])})
        for estimate in receipt.get("routes", ())
    )
    return Answer(
        answer=value["answer"],
        abstained=value["abstained"],
        citations=tuple(Citation(**citation) for citation in value["citations"]),
        receipt=Receipt(**receipt),
    )
