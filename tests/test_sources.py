"""What a person may name: files, folders, globs, standard input, web addresses; what is refused."""

import io
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ingest import sources
from ingest.readers.guard import read_guarded
from ingest.sources import SourceToRead, find_sources, open_regular
from rag.errors import (
    EmptyDocumentError,
    ReadError,
    SourceNotFoundError,
    UnsupportedFormatError,
)
from rag.settings import Settings


def find(
    names: Sequence[str | Path],
    *,
    settings: Settings,
    stdin_name: str = "stdin.txt",
    allow_network: bool = False,
    allow_private_addresses: bool = False,
) -> Iterator[SourceToRead | ReadError]:
    settings.home.mkdir(exist_ok=True)
    return find_sources(
        names,
        settings=settings,
        downloads=settings.home,
        stdin_name=stdin_name,
        allow_network=allow_network,
        allow_private_addresses=allow_private_addresses,
    )


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return a folder as a repository looks: nested, with hidden, made and binary files."""
    root = tmp_path / "harbour"
    for name in ("src/main.py", "docs/fees.md", "README.md", "LICENSE"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"the text of {name}")
    for name in (".git/config", "node_modules/a/index.js", "src/__pycache__/x.pyc", ".env"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("never read")
    return root


def _found(sources_found: Iterator[SourceToRead | ReadError]) -> list[SourceToRead]:
    found = list(sources_found)
    assert all(isinstance(source, SourceToRead) for source in found), found
    return [source for source in found if isinstance(source, SourceToRead)]


def _error(sources_found: Iterator[SourceToRead | ReadError]) -> ReadError:
    (error,) = sources_found
    assert isinstance(error, ReadError)
    assert error.hint
    return error


def test_a_repository_is_one_collection_in_order_of_its_paths(
    repository: Path, settings: Settings
) -> None:
    found = _found(find([repository], settings=settings))
    assert [s.title for s in found] == ["LICENSE", "README.md", "docs/fees.md", "src/main.py"]
    assert {s.collection for s in found} == {"harbour"}
    assert found[2].source == str(repository / "docs/fees.md")


def test_a_file_named_by_itself_has_no_collection(repository: Path, settings: Settings) -> None:
    (source,) = _found(find([repository / "README.md"], settings=settings))
    assert (source.title, source.collection) == ("README.md", None)


def test_a_binary_file_in_a_folder_is_told_and_the_others_are_taken(
    repository: Path, settings: Settings
) -> None:
    (repository / "logo.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    found = list(find([repository], settings=settings))
    errors = [f for f in found if isinstance(f, ReadError)]
    assert len(found) == 5
    assert isinstance(errors[0], UnsupportedFormatError)
    assert "logo.png" in errors[0].message


def test_symbolic_links_are_refused_with_the_reason(repository: Path, settings: Settings) -> None:
    outside = repository.parent / "secret.txt"
    outside.write_text("secret")
    (repository / "link.md").symlink_to(outside)
    (repository / "folder").symlink_to(repository.parent)
    found = list(find([repository], settings=settings))
    errors = [f.message for f in found if isinstance(f, ReadError)]
    assert len(errors) == 2
    assert all("symbolic link" in message for message in errors)
    assert "symbolic link" in _error(find([repository / "link.md"], settings=settings)).message
    with pytest.raises(SourceNotFoundError, match="symbolic link"):
        open_regular(repository / "link.md")


def test_pipes_and_devices_are_refused_without_waiting(tmp_path: Path, settings: Settings) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path / "pipe.txt", Path("/dev/zero")):
        with pytest.raises(SourceNotFoundError, match="not a regular file"):
            open_regular(path)
        assert isinstance(_error(find([path], settings=settings)), SourceNotFoundError)


def test_what_is_missing_or_empty_is_told_in_its_place(
    repository: Path, tmp_path: Path, settings: Settings
) -> None:
    (tmp_path / "empty").mkdir()
    names = [tmp_path / "gone.txt", repository / "README.md", tmp_path / "empty"]
    first, second, third = find(names, settings=settings)
    assert isinstance(first, SourceNotFoundError)
    assert isinstance(second, SourceToRead)
    assert isinstance(third, EmptyDocumentError)


def test_a_quoted_glob_is_expanded_but_an_existing_name_is_not(
    repository: Path, settings: Settings
) -> None:
    found = _found(find([f"{repository}/**/*.m[dp]"], settings=settings))
    assert [s.title for s in found] == ["README.md", "docs/fees.md"]
    (repository / "a[1].md").write_text("x")
    (odd,) = _found(find([repository / "a[1].md"], settings=settings))
    assert odd.title == "a[1].md"
    assert "no file matches" in _error(find([f"{repository}/*.zip"], settings=settings)).message


class _Stdin:
    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)


def test_standard_input_is_read_under_the_name_given(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", _Stdin(b"# Fees\n\n35 crowns"))
    (source,) = _found(find(["-"], settings=settings, stdin_name="fees.md"))
    content = read_guarded(source.path, name=source.title, settings=settings)
    assert [s.title for s in content.sections] == ["Fees"]
    assert source.source == "stdin:fees.md"
    assert source.path.parent == settings.home, "what was piped in lies where the caller said"
    monkeypatch.setattr(sys, "stdin", _Stdin(b"x" * 100))
    small = settings.model_copy(update={"max_file_bytes": 10})
    assert "larger than" in _error(find(["-"], settings=small)).message


class _Harbour(BaseHTTPRequestHandler):
    """Serves a page, redirects, and answers that go wrong."""

    def do_GET(self) -> None:
        assert isinstance(self.server, ThreadingHTTPServer)
        port = self.server.server_port
        targets = {
            "/old": "/fees",
            "/loop": "/loop",
            "/file": "file:///etc/passwd",
            "/away": f"http://localhost:{port}/fees",
        }
        if self.path in targets:
            self.send_response(302)
            self.send_header("Location", targets[self.path])
            self.end_headers()
        elif self.path == "/fees":
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            host = self.headers["Host"]
            self.wfile.write(f"<h1>Fees</h1><p>35 crowns at {host}</p>".encode())
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x" * 65536)
            except OSError:
                self.close_connection = True
        else:
            self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output quiet."""


@pytest.fixture
def server() -> Iterator[str]:
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), _Harbour)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def _web(address: str, settings: Settings) -> Iterator[SourceToRead | ReadError]:
    return find([address], settings=settings, allow_network=True, allow_private_addresses=True)


@pytest.mark.parametrize("path", ["/fees", "/old", "/away"])
def test_a_page_is_fetched_and_read_by_its_type(server: str, settings: Settings, path: str) -> None:
    for source in _web(server + path + "#top", settings):
        assert isinstance(source, SourceToRead), source
        assert source.title == "fees.html"
        assert source.source == server + path
        content = read_guarded(source.path, name=source.title, settings=settings)
        assert content.text.startswith("Fees\n\n35 crowns at ")
        port = server.rsplit(":", 1)[1]
        assert content.text.endswith(f"{'localhost' if path == '/away' else '127.0.0.1'}:{port}")
        assert source.path.parent == settings.home


def test_the_network_is_used_only_when_asked_for(server: str, settings: Settings) -> None:
    error = _error(find([f"{server}/fees"], settings=settings))
    assert "network is not allowed" in error.message


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "10.0.0.1",
        "169.254.169.254",
        "0.0.0.0",
        "2130706433",
        "[::ffff:127.0.0.1]",
    ],
)
def test_private_addresses_are_refused(settings: Settings, host: str) -> None:
    found = find([f"http://{host}:9/fees"], settings=settings, allow_network=True)
    assert "private address" in _error(found).message


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/gone", "404"),
        ("/loop", "redirects more than 5 times"),
        ("/file", "expected http:// or https://"),
    ],
)
def test_answers_that_go_wrong_are_told(
    server: str, settings: Settings, path: str, expected: str
) -> None:
    assert expected in _error(_web(server + path, settings)).message


def test_a_download_is_bounded(server: str, settings: Settings) -> None:
    small = settings.model_copy(update={"max_file_bytes": 2**20})
    assert "larger than 1 MiB" in _error(_web(f"{server}/endless", small)).message


def test_other_schemes_and_passwords_are_refused(settings: Settings) -> None:
    for address in ("file:///etc/passwd", "ftp://example.org/x", "http://a:b@example.org/"):
        assert "is not fetched" in _error(_web(address, settings)).message


def test_a_server_that_does_not_answer_is_told(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "CONNECT_SECONDS", 1.0)
    assert "could not be fetched" in _error(_web("http://127.0.0.1:9/", settings)).message
