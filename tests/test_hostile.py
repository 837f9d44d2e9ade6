"""Files made to hurt: each is one clear error within seconds, and Fathom lives on."""

import resource
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import INGEST_DOCS
from documents import docx_parts, write_epub, write_odt, write_pdf, write_xlsx, write_zip
from ingest.readers import guard
from ingest.readers.guard import read_guarded
from rag.errors import ReaderFailedError, ReadError, UnsupportedFormatError
from rag.settings import Settings
from rag.types import CanonicalText
from ui.assembly import Fathom

BOMB_BYTES = 1_500 * 2**20
SECONDS = 20.0


def _zeros_deflated(num_bytes: int) -> bytes:
    packer, block, packed = zlib.compressobj(9), bytes(2**20), []
    for _ in range(num_bytes // len(block)):
        packed.append(packer.compress(block))
    return b"".join([*packed, packer.flush()])


def _pdf_bomb(path: Path) -> Path:
    write_pdf(path, ["BT ET"])
    data = _zeros_deflated(BOMB_BYTES)
    bomb = b"<< /Length %d /Filter /FlateDecode >>\nstream\n%s\nendstream" % (len(data), data)
    # the page's contents point to the bomb, which stands last
    write_pdf(path, ["BT ET"], extra=[bomb])
    path.write_bytes(path.read_bytes().replace(b"/Contents 6 0 R", b"/Contents 7 0 R"))
    return path


def _docx_bomb(path: Path) -> Path:
    parts = docx_parts()
    xml = str(parts["word/document.xml"])
    return write_zip(path, {**parts, "word/document.xml": xml + " " * (400 * 2**20)})


def _zip_bomb_of(write: Callable[[Path], Path], part: str) -> Callable[[Path], Path]:
    def build(path: Path) -> Path:
        import zipfile

        write(path)
        with zipfile.ZipFile(path) as archive:
            parts: dict[str, str | bytes] = {n: archive.read(n) for n in archive.namelist()}
        parts[part] = bytes(parts[part]) + b" " * (400 * 2**20)  # type: ignore[arg-type]
        return write_zip(path, parts)

    return build


def _billion_laughs(path: Path) -> Path:
    entities = '<!ENTITY a "ha">' + "".join(
        f'<!ENTITY {name} "{f"&{before};" * 10}">'
        for before, name in zip("abcdefghi", "bcdefghij", strict=True)
    )
    parts = docx_parts("<w:p><w:r><w:t>&j;</w:t></w:r></w:p>")
    xml = str(parts["word/document.xml"]).replace("?>", f"?><!DOCTYPE d [{entities}]>", 1)
    return write_zip(path, {**parts, "word/document.xml": xml})


def _page_loop(path: Path) -> Path:
    write_pdf(path, ["BT ET"])
    path.write_bytes(path.read_bytes().replace(b"/Kids [5 0 R]", b"/Kids [2 0 R]"))
    return path


def _bytes(data: bytes) -> Callable[[Path], Path]:
    def build(path: Path) -> Path:
        path.write_bytes(data)
        return path

    return build


HOSTILE = {
    "bomb.pdf": _pdf_bomb,
    "bomb.docx": _docx_bomb,
    "bomb.xlsx": _zip_bomb_of(write_xlsx, "xl/worksheets/sheet1.xml"),
    "bomb.odt": _zip_bomb_of(write_odt, "content.xml"),
    "bomb.epub": _zip_bomb_of(write_epub, "c1.xhtml"),
    "laughs.docx": _billion_laughs,
    "loop.pdf": _page_loop,
    "junk.pdf": _bytes(b"%PDF-1.7\n" + bytes(range(256)) * 8),
    "junk.docx": _bytes(b"PK\x03\x04" + bytes(range(256)) * 8),
    "junk.xlsx": _bytes(b"PK\x03\x04" + bytes(range(256)) * 8),
    "junk.ipynb": _bytes(b"[" * 200_000),
    "junk.bin": _bytes(bytes(range(256)) * 8),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_clear_error_within_seconds(
    library: Fathom, tmp_path: Path, handbook: Path, name: str
) -> None:
    path = HOSTILE[name](tmp_path / name)
    started = time.monotonic()
    with pytest.raises(ReadError) as caught:
        library.ingest(path)
    assert time.monotonic() - started < SECONDS
    assert name in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert library.documents() == []
    assert library.ingest(handbook).outcome == "added", "the library lives on"


def test_html_200_000_deep_is_read(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "deep.html"
    path.write_text("<div>" * 200_000 + "the bottom" + "</div>" * 200_000)
    assert read_guarded(path, name="deep.html", settings=settings).text == "the bottom"


@pytest.mark.parametrize("piece", ["<!--", "<a ", "<![CDATA[", "</", "<table>", '<a b="', "<h1>"])
def test_html_full_of_unfinished_pieces_takes_seconds(
    settings: Settings, tmp_path: Path, piece: str
) -> None:
    path = tmp_path / "pieces.html"
    path.write_text(piece * (200_000 // len(piece)) + "<p>the end</p>")
    quick = settings.model_copy(update={"reader_timeout_seconds": 15.0})
    assert "the end" in read_guarded(path, name="pieces.html", settings=quick).text


def test_a_deep_docx_is_told(settings: Settings, tmp_path: Path) -> None:
    tag = "w:sdtContent"
    body = f"<{tag}>" * 50_000 + f"</{tag}>" * 50_000
    path = write_zip(tmp_path / "deep.docx", docx_parts(body))
    with pytest.raises(ReaderFailedError, match=r"deep\.docx"):
        read_guarded(path, name="deep.docx", settings=settings)


def test_the_text_of_a_file_is_bounded(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("word " * 500_000)
    small = settings.model_copy(update={"reader_output_bytes": 2**20})
    with pytest.raises(ReaderFailedError, match="more than 1 MiB of text"):
        read_guarded(path, name="long.txt", settings=small)


WORKERS = {
    "abort": ("import os; os.abort()", "SIGABRT"),
    "segfault": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "SIGSEGV"),
    "sleep": ("import time; time.sleep(60)", "not read within 1 s"),
    "spin": ("\nwhile True: pass", "not read within 1 s"),
    "chatter": ("print('no answer')", "exit code 0"),
    "flood": ("\nimport sys\nwhile True: sys.stdout.write('x' * 65536)", "crashed"),
}


@pytest.mark.parametrize("name", WORKERS)
def test_a_parser_that_dies_or_hangs_is_one_error(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The real worker sets its limits; then the parser's place is taken by one that goes wrong."""
    code, expected = WORKERS[name]
    path = tmp_path / "x.txt"
    path.write_text("text")
    root = str(Path(guard.__file__).parents[2])
    start = (
        f"import sys; sys.path.insert(0, {root!r})\n"
        "from ingest.readers import worker\n"
        f"worker.main = lambda request: (worker._set_limits(request), exec({code!r}))\n"
        "worker.serve()"
    )
    monkeypatch.setattr(guard, "_start_server", lambda: start)
    guard.stop_idle()
    quick = settings.model_copy(
        update={"reader_timeout_seconds": 1.0, "reader_output_bytes": 2**20}
    )
    started = time.monotonic()
    with pytest.raises(ReaderFailedError, match=expected):
        read_guarded(path, name="x.txt", settings=quick)
    assert time.monotonic() - started < 5
    guard.stop_idle()


def test_one_server_reads_file_after_file_each_in_a_process_of_its_own(
    settings: Settings, tmp_path: Path
) -> None:
    """What one file does to its process is gone with it: the limits, a crash, the memory."""
    guard.stop_idle()
    guard.start_ahead()
    (server,) = guard._idle
    small = settings.model_copy(update={"reader_memory_bytes": 256 * 2**20})
    with pytest.raises(ReaderFailedError):
        read_guarded(_pdf_bomb(tmp_path / "bomb.pdf"), name="bomb.pdf", settings=small)
    for word in ("first", "second"):
        path = tmp_path / f"{word}.txt"
        path.write_text(word)
        assert read_guarded(path, name=path.name, settings=settings).text == word
    assert guard._idle == [server]
    assert server.is_alive()


def test_a_server_that_lacks_a_package_says_which(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the packages are on PYTHONPATH alone, which readers do not see."""
    start = f"import sys; sys.modules['pypdfium2'] = None\n{guard._start_server()}"
    monkeypatch.setattr(guard, "_start_server", lambda: start)
    guard.stop_idle()
    path = tmp_path / "a.txt"
    path.write_text("text")
    with pytest.raises(ReaderFailedError, match="pypdfium2") as raised:
        read_guarded(path, name="a.txt", settings=settings)
    assert "PYTHONPATH" in (raised.value.hint or "")
    assert guard._idle == []


def test_a_server_that_was_ended_is_replaced(settings: Settings, tmp_path: Path) -> None:
    guard.stop_idle()
    guard.start_ahead()
    (server,) = guard._idle
    server._process.kill()
    server._process.wait()
    path = tmp_path / "a.txt"
    path.write_text("text")
    assert read_guarded(path, name="a.txt", settings=settings).text == "text"
    (other,) = guard._idle
    assert other is not server


def test_a_reader_finds_no_environment_and_leaves_no_file(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "user"
    home.mkdir()
    for name in ("HOME", "XDG_CACHE_HOME", "KREUZBERG_CACHE_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.chdir(home)
    content = read_guarded(write_odt(tmp_path / "a.odt"), name="a.odt", settings=settings)
    assert "pilot boat" in content.text
    assert list(home.rglob("*")) == []


def test_a_file_of_unknown_kind_names_what_can_be_read(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    with pytest.raises(UnsupportedFormatError) as caught:
        read_guarded(path, name="picture.png", settings=settings)
    assert ".pdf" in caught.value.hint


@pytest.mark.skipif(not INGEST_DOCS.is_dir(), reason="../shared/data/ingest_docs is not here")
@pytest.mark.parametrize(
    "name", ["book-war-and-peace-1225p.txt", "doj-ch13-trustee-handbook-872p.docx"]
)
def test_reading_a_long_document_takes_little_memory(settings: Settings, name: str) -> None:
    """Address space bounds resident memory: the reader is given a fifth of the allowed 1.5 GB."""
    small = settings.model_copy(update={"reader_memory_bytes": 320 * 2**20})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    content: CanonicalText = read_guarded(INGEST_DOCS / name, name=name, settings=small)
    unit = 1 if sys.platform == "darwin" else 1024
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    assert len(content.text) > 800_000
    assert grown < 200 * 2**20
