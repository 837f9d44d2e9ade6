"""BM25 by tantivy: a folder that derives from the store. The only home of tantivy.

tantivy only marks what is deleted, and merges its segments when it likes, up to millions of chunks.
Therefore it writes segments here but never changes one: each holds the chunks of a range of ids,
and one that a deletion touches is written anew without them. `meta.json`, in which tantivy lists an
index's segments, is put together by us; scores are those of one index.
"""

import errno
import fcntl
import hashlib
import json
import shutil
import threading
import uuid
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tantivy import (
    Document,
    Filter,
    Index,
    Occur,
    Query,
    SchemaBuilder,
    TextAnalyzerBuilder,
    Tokenizer,
)

from rag.errors import StorageFullError, StoreError
from rag.store.oplog import ChunkText, TextChanges, TextLog

WRITER_BYTES = 64 * 2**20
# A deletion writes anew what its first and last segment hold beside it; a search asks each segment.
SEGMENT_CHUNKS = 5_000
HEADING_WEIGHT = 0.5  # as in FTS5: see lexical_index.py
UNUSABLE = (OSError, ValueError, TypeError, AttributeError, KeyError)  # a folder that is built anew
LONGEST_WORD = 1_000  # bytes; tantivy takes no term beyond 65,530

_analyzer = (
    TextAnalyzerBuilder(Tokenizer.simple())
    .filter(Filter.remove_long(LONGEST_WORD))
    .filter(Filter.lowercase())
    .filter(Filter.ascii_fold())
    .filter(Filter.stemmer("english"))
    .build()
)
# Texts are not stored, and no positions: hits are joined back to the store, and there are no
# phrase queries.
_schema = (
    SchemaBuilder()
    .add_unsigned_field("chunk_id", indexed=True, fast=True)
    .add_unsigned_field("document_id", indexed=True)
    .add_text_field("text", tokenizer_name="english", index_option="freq")
    .add_text_field("heading", tokenizer_name="english", index_option="freq")
    .build()
)


@dataclass(frozen=True, slots=True)
class Segment:
    """The chunks with ids from `first` to `last`, in files that begin with the hex of `uuid`."""

    first: int
    last: int
    num_chunks: int
    uuid: str


@dataclass(frozen=True, slots=True)
class Position:
    """Which folder is the index, of which library, how far it has followed the op-log.

    `segments` are in the order of their ids, and no two share one. `files` are the SHA-256 of the
    folder's files, so that a damaged one is noticed.
    """

    folder: str
    library: str
    seq: int
    segments: list[Segment]
    files: dict[str, str]


class TantivyIndex:
    """Full-text search kept equal to the store by replaying its op-log.

    All processes of a machine share one folder; each catches up before it searches, one at a time
    under a lock. The folder only saves time: a missing, damaged or foreign one, or one behind the
    log's floor, is built anew.
    """

    def __init__(self, log: TextLog, folder: Path) -> None:
        """Take the index in `folder`, if any; the first search opens it and catches up."""
        self._log = log
        self._folder = folder
        self._guard = threading.RLock()
        self._index: Index | None = None
        self._position: Position | None = None

    def search(
        self, question: str, *, top_k: int, document_ids: Sequence[int] | None = None
    ) -> list[tuple[int, float]]:
        """Return up to `top_k` (chunk id, BM25 score), best first; see `LexicalIndex`."""
        terms = list(dict.fromkeys(_analyzer.analyze(question)))
        if not terms or (document_ids is not None and not document_ids):
            return []
        query = _match(terms, document_ids)
        searcher = self.catch_up().searcher()
        hits = searcher.search(query, max(1, top_k), count=False).hits
        ids = searcher.fast_field_values("chunk_id", [address for _, address in hits])
        found = [(int(i), float(hit[0])) for i, hit in zip(ids, hits, strict=True) if i is not None]
        return found[:top_k]

    def frequencies(
        self, words: Sequence[str], *, document_ids: Sequence[int] | None = None
    ) -> dict[str, int]:
        """Return for each word how many chunks hold it; see `LexicalIndex`."""
        found = dict.fromkeys(words, 0)
        if document_ids is None or document_ids:
            searcher = self.catch_up().searcher()
            for word in words:
                if terms := _analyzer.analyze(word):
                    result: Any = searcher.search(_match(terms, document_ids), 1)
                    found[word] = result.count
        return found

    def catch_up(self) -> Index:
        """Apply what the store has done since, and return the index to search.

        Raises:
            StorageFullError: if the disk is full.
            StoreError: if the folder cannot be written.
        """
        with self._guard:
            if self._index and self._position and self._position.seq == self._log.last_seq():
                return self._index
            with self._alone():
                try:
                    index, position = self._open()
                    with self._log.changes_since(position.seq) as changes:
                        if changes and changes.seq > position.seq:
                            segments = self._follow(position.folder, position.segments, changes)
                            self._remember(index, position.folder, changes.seq, segments)
                    return index if changes else self._build()
                except UNUSABLE:
                    return self._build()

    def check(self) -> str | None:
        """Return what is wrong between the folder and the chunks, or None."""
        with self._guard, self._alone():
            if (self._folder / "position.json").exists():
                try:
                    self._read_files(self._read_position())
                except UNUSABLE as error:
                    return f"the tantivy index cannot be used: {error}"
        index = self.catch_up()
        searcher = index.searcher()
        hits = searcher.search(Query.all_query(), max(1, searcher.num_docs), count=False).hits
        indexed = set(searcher.fast_field_values("chunk_id", [address for _, address in hits]))
        stored = self._log.chunk_ids()
        if indexed != stored:
            missing, foreign = len(stored - indexed), len(indexed - stored)
            return f"{missing} chunks are missing, {foreign} are not in the store"
        with self._guard, self._alone():
            if self._strays(self._read_position()):
                return "files of an interrupted rebuild are still there"
        return None

    def rebuild(self) -> None:
        """Build the index anew from the chunks, in a new folder, and remove the old one."""
        with self._guard, self._alone():
            self._build()

    def erase_deleted(self) -> None:
        """Catch up, which writes anew the segments that held deleted chunks, and remove strays."""
        self.catch_up()
        with self._guard, self._alone():
            self._remove_strays(self._read_position())

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes out, and explain what the disk refuses."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield
        except OSError as error:
            raise self._explain(error, error.errno == errno.ENOSPC) from error
        except ValueError as error:  # what tantivy raises, whatever the cause
            raise self._explain(error, "No space left" in str(error)) from error

    def _explain(self, error: Exception, disk_full: bool) -> StoreError:
        if disk_full:
            return StorageFullError(
                f"the disk is full: the full-text index in {self._folder} was not written",
                hint="free some space; the index is built again from the store",
            )
        return StoreError(
            f"the full-text index in {self._folder} cannot be written: {error}",
            hint="check the folder's permissions; it may be deleted, the store builds it again",
        )

    def _open(self) -> tuple[Index, Position]:
        """Return the index of position.json; it is read again only if it is another one."""
        position, index = self._read_position(), self._index
        if index and self._position and position.folder == self._position.folder:
            index.reload()  # another process has caught up
        else:
            self._read_files(position)
            index = _registered(Index.open(str(self._folder / position.folder)))
        self._index, self._position = index, position
        return index, position

    def _read_position(self) -> Position:
        stored = json.loads((self._folder / "position.json").read_text())
        segments = [Segment(**segment) for segment in stored.pop("segments")]
        position = Position(**stored, segments=segments)
        if position.library != self._log.library():
            raise ValueError("it belongs to another library")
        if Path(position.folder).name != position.folder:
            raise ValueError(f"position.json names the folder {position.folder}")
        return position

    def _read_files(self, position: Position) -> None:
        for name, sha256 in position.files.items():
            data = (self._folder / position.folder / Path(name).name).read_bytes()
            if hashlib.sha256(data).hexdigest() != sha256:
                raise ValueError(f"the checksum of {name} is wrong")

    def _build(self) -> Index:
        folder = f"index-{uuid.uuid4().hex[:12]}"
        (self._folder / folder).mkdir()
        index = _registered(Index(_schema, path=str(self._folder / folder)))
        with self._log.everything() as changes:
            segments = self._follow(folder, [], changes)
        self._position = None
        self._remember(index, folder, changes.seq, segments)
        return index

    def _follow(
        self, folder: str, segments: Sequence[Segment], changes: TextChanges
    ) -> list[Segment]:
        """Write what the changes touch into new segments; return those that are the index now."""
        kept, stale = _divide(segments, changes.changed)
        for first, last in stale:
            texts = changes.texts(first, last)
            while part := list(islice(texts, SEGMENT_CHUNKS)):
                kept.append(self._write_segment(folder, part))
        kept.sort(key=lambda segment: segment.first)
        listed = [
            {"segment_id": segment.uuid, "max_doc": segment.num_chunks, "deletes": None}
            for segment in kept
        ]
        path = self._folder / folder / "meta.json"
        meta = json.loads(path.read_text()) | {"segments": listed}
        path.with_suffix(".tmp").write_text(json.dumps(meta))
        path.with_suffix(".tmp").replace(path)
        return kept

    def _write_segment(self, folder: str, texts: Sequence[ChunkText]) -> Segment:
        """Let tantivy write one segment in a folder apart, and move its files into the index."""
        with TemporaryDirectory(prefix="index-", dir=self._folder) as apart:
            writer = _registered(Index(_schema, path=apart)).writer(WRITER_BYTES, 1)
            try:
                for text in texts:
                    document = Document()
                    document.add_unsigned("chunk_id", text.chunk_id)
                    document.add_unsigned("document_id", text.document_id)
                    document.add_text("text", text.text)
                    document.add_text("heading", text.heading)
                    writer.add_document(document)
                writer.commit()
            finally:
                writer.wait_merging_threads()
            (written,) = json.loads((Path(apart) / "meta.json").read_text())["segments"]
            segment = Segment(
                texts[0].chunk_id, texts[-1].chunk_id, written["max_doc"], written["segment_id"]
            )
            for path in _files_of(segment, Path(apart)):
                path.replace(self._folder / folder / path.name)
        return segment

    def _remember(self, index: Index, folder: str, seq: int, segments: list[Segment]) -> None:
        """Write the position after meta.json; a crash in between costs a rebuild."""
        known = self._position.files if self._position else {}
        names = {segment.uuid.replace("-", "") for segment in segments}
        files = {}
        for path in sorted((self._folder / folder).iterdir()):
            if path.suffix == ".json" or path.name.split(".")[0] in names:
                written_once = path.suffix != ".json"
                sha256 = known.get(path.name) if written_once else None
                files[path.name] = sha256 or hashlib.sha256(path.read_bytes()).hexdigest()
        position = Position(folder, self._log.library(), seq, segments, files)
        temporary = self._folder / "position.json.tmp"
        temporary.write_text(json.dumps(asdict(position)))
        temporary.replace(self._folder / "position.json")
        index.reload()
        self._index, self._position = index, position
        self._remove_strays(position)

    def _strays(self, position: Position) -> list[Path]:
        """Return what the index does not need: other folders, and files of former segments."""
        folders = [p for p in self._folder.glob("index-*") if p.name != position.folder]
        inside = (self._folder / position.folder).iterdir()
        return folders + [p for p in inside if p.name not in position.files and p.suffix != ".lock"]

    def _remove_strays(self, position: Position) -> None:
        for path in self._strays(position):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _divide(
    segments: Sequence[Segment], changed: Sequence[int]
) -> tuple[list[Segment], list[tuple[int, int]]]:
    """Return the segments that stay, and the ranges of ids that are to be written anew.

    Touched neighbours become one range. Chunks beyond the last segment take with them the segments
    before that are no larger than what is added, so that many small additions leave few segments.
    """
    kept: list[Segment] = []
    stale: list[tuple[int, int]] = []
    last_is_stale = False
    for segment in segments:
        at = bisect_left(changed, segment.first)
        is_stale = at < len(changed) and changed[at] <= segment.last
        if not is_stale:
            kept.append(segment)
        elif last_is_stale:
            stale[-1] = (stale[-1][0], segment.last)
        else:
            stale.append((segment.first, segment.last))
        last_is_stale = is_stale
    end = segments[-1].last if segments else 0
    if changed and changed[-1] > end:
        first, size = end + 1, len(changed) - bisect_right(changed, end)
        while kept and kept[-1].num_chunks <= size and kept[-1].num_chunks + size <= SEGMENT_CHUNKS:
            segment = kept.pop()
            first, size = segment.first, size + segment.num_chunks
        stale = [ids for ids in stale if ids[0] < first] + [(first, changed[-1])]
    return kept, stale


def _files_of(segment: Segment, folder: Path) -> list[Path]:
    return list(folder.glob(f"{segment.uuid.replace('-', '')}.*"))


def _match(terms: Sequence[str], document_ids: Sequence[int] | None) -> Query:
    """Return the query for chunks that hold any of the terms, among the documents."""
    any_word = Query.boolean_query(
        [
            (Occur.Should, clause)
            for term in terms
            for clause in (
                Query.term_query(_schema, "text", term, "freq"),
                Query.boost_query(
                    Query.term_query(_schema, "heading", term, "freq"), HEADING_WEIGHT
                ),
            )
        ]
    )
    if document_ids is None:
        return any_word
    scope = Query.term_set_query(_schema, "document_id", list(document_ids))
    silent = Query.const_score_query(scope, 0.0)
    return Query.boolean_query([(Occur.Must, any_word), (Occur.Must, silent)])


def _registered(index: Index) -> Index:
    index.register_tokenizer("english", _analyzer)
    index.config_reader(reload_policy="manual")
    return index
