"""From what a person names to files: paths, folders, globs, standard input and web addresses."""

import glob
import ipaddress
import os
import re
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import unquote, urljoin, urlsplit

import httpx

from ingest.readers.formats import FORMATS, SNIFFED_BYTES, format_of_name, may_be_readable
from rag.errors import EmptyDocumentError, ReadError, SourceNotFoundError, UnsupportedFormatError
from rag.settings import Settings

STDIN = "-"
COPY_BYTES = 2**16
MAX_REDIRECTS = 5
CONNECT_SECONDS, DOWNLOAD_SECONDS = 20.0, 300.0
# made by tools, never written by a person; names that begin with a dot are hidden anyway
_IGNORED_FOLDERS = frozenset({"node_modules", "__pycache__", "venv", "site-packages"})


@dataclass(frozen=True, slots=True)
class SourceToRead:
    """One file to ingest.

    `source` is its identity, whose versions are counted; `title` the name shown, inside a folder
    the path from there; `collection` the folder's name, None for a file named by itself.
    """

    path: Path
    source: str
    title: str
    collection: str | None = None


def find_sources(
    names: Sequence[str | Path],
    *,
    settings: Settings,
    downloads: Path,
    stdin_name: str = "stdin.txt",
    allow_network: bool = False,
    allow_private_addresses: bool = False,
) -> Iterator[SourceToRead | ReadError]:
    """Yield what is to be ingested, in order; what cannot be gives its error in its place.

    Args:
        names: files, folders, quoted globs such as `docs/**/*.md`, `-` for standard input, and
            http or https addresses.
        settings: the limit on a file's size.
        downloads: a folder for what comes from standard input and the network; the caller removes
            it when the sources are read.
        stdin_name: the title of standard input; its suffix chooses the reader.
        allow_network: whether addresses are fetched; otherwise each is refused.
        allow_private_addresses: whether an address may lead to this machine or a private network.
    """
    for name in map(str, names):
        if name == STDIN:
            yield _from_stdin(stdin_name, settings, downloads)
        elif re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", name):
            if allow_network:
                yield _from_web(name, settings, downloads, allow_private_addresses)
            else:
                yield ReadError(
                    f"{name} is a web address, and the network is not allowed",
                    hint="allow it for this call, or download the page and give the file",
                )
        elif Path(name).is_dir() and not Path(name).is_symlink():
            yield from _from_folder(Path(name))
        elif not os.path.lexists(name) and glob.has_magic(name):
            yield from _from_glob(name)
        else:
            yield _from_path(Path(name))


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file without following a link, and without waiting on a pipe or a device.

    Raises:
        SourceNotFoundError: if nothing is there, or something else than a regular file.
        ReadError: if it may not be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"there is no file {path}", hint="check the spelling") from error
    except OSError as error:
        if path.is_symlink():
            raise _is_link(path) from error
        if path.exists() and not path.is_file():
            raise _not_regular(path) from error
        raise ReadError(
            f"{path} cannot be read: {error.strerror}", hint="check its permissions"
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_regular(path)
    return os.fdopen(descriptor, "rb")


# ---- files, folders and globs -----------------------------------------------------------------


def _from_path(path: Path) -> SourceToRead | ReadError:
    if not os.path.lexists(path):
        return SourceNotFoundError(
            f"there is no file {path}", hint="check the spelling; expected a file or a folder"
        )
    if path.is_symlink():
        return _is_link(path)
    if not path.is_file():
        return _not_regular(path)
    return SourceToRead(path, str(path.resolve()), path.name)


def _from_folder(root: Path) -> Iterator[SourceToRead | ReadError]:
    """Yield the files of a folder in the order of their paths."""
    collection = root.resolve().name
    num_found = 0
    for path in _walk(root):
        num_found += 1
        title = path.relative_to(root).as_posix()
        refusal = _refusal(path, root)
        yield refusal or SourceToRead(path, str(path.resolve()), title, collection)
    if not num_found:
        yield EmptyDocumentError(
            f"the folder {root} holds no file that can be read",
            hint="hidden files and the folders of tools, such as .git, are passed over",
        )


def _walk(folder: Path) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        yield folder  # its refusal says why
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            if entry.name not in _IGNORED_FOLDERS:
                yield from _walk(Path(entry.path))
        else:
            yield Path(entry.path)


def _refusal(path: Path, root: Path) -> ReadError | None:
    """Return why a file found in a folder is not taken, None if it is."""
    if path.is_symlink():
        return _is_link(path)
    if not path.resolve().is_relative_to(root.resolve()):
        return SourceNotFoundError(
            f"{path} lies outside of {root}", hint="name it itself if you want it read"
        )
    try:
        with open_regular(path) as file:
            head = file.read(SNIFFED_BYTES)
    except ReadError as error:
        return error
    if format_of_name(path.name) is None and head and not may_be_readable(head):
        return UnsupportedFormatError(
            f"no reader for {path}: its suffix is unknown and its content is no text",
            hint=f"convert it to one of: {' '.join(FORMATS)}",
        )
    return None


def _from_glob(pattern: str) -> Iterator[SourceToRead | ReadError]:
    # unlike Path.glob it passes over hidden files
    names = glob.glob(pattern, recursive=True)  # noqa: PTH207
    found = [Path(name) for name in sorted(names)]
    files = [path for path in found if not path.is_dir() or path.is_symlink()]
    if not files:
        yield SourceNotFoundError(
            f"no file matches {pattern}", hint="check the pattern; ** stands for any folders"
        )
    fixed = Path(*(p for p in _until_magic(Path(pattern).parts)))
    for path in files:
        found_file = _refusal(path, fixed) or _from_path(path)
        if isinstance(found_file, SourceToRead):
            title = path.relative_to(fixed).as_posix()
            found_file = SourceToRead(path, found_file.source, title)
        yield found_file


def _until_magic(parts: tuple[str, ...]) -> Iterator[str]:
    for part in parts[:-1]:
        if glob.has_magic(part):
            return
        yield part


def _is_link(path: Path) -> SourceNotFoundError:
    return SourceNotFoundError(
        f"{path} is a symbolic link, which is not followed",
        hint=f"give the file it leads to: {path.resolve()}",
    )


def _not_regular(path: Path) -> SourceNotFoundError:
    return SourceNotFoundError(
        f"{path} is not a regular file", hint="give a file, or a folder of files"
    )


# ---- standard input ---------------------------------------------------------------------------


def _from_stdin(name: str, settings: Settings, downloads: Path) -> SourceToRead | ReadError:
    path = _new_file(downloads)
    size = 0
    with path.open("wb") as file:
        while block := sys.stdin.buffer.read(COPY_BYTES):
            size += len(block)
            if size > settings.max_file_bytes:
                return _too_large("standard input", settings)
            file.write(block)
    return SourceToRead(path, f"stdin:{name}", name)


def _new_file(downloads: Path) -> Path:
    handle, name = tempfile.mkstemp(dir=downloads)
    os.close(handle)
    return Path(name)


def _too_large(what: str, settings: Settings) -> ReadError:
    return ReadError(
        f"{what} is larger than {settings.max_file_bytes // 2**20} MiB",
        hint="raise FATHOM_MAX_FILE_BYTES, or split the file",
    )


# ---- web addresses ----------------------------------------------------------------------------


def _from_web(
    address: str, settings: Settings, downloads: Path, allow_private: bool
) -> SourceToRead | ReadError:
    path = _new_file(downloads)
    try:
        # no proxy of the environment: it would resolve names itself, past our check
        with httpx.Client(timeout=CONNECT_SECONDS, trust_env=False) as client:
            name = _download(client, address, path, settings, allow_private)
    except ReadError as error:
        return error
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        return ReadError(
            f"{address} could not be fetched: {error or type(error).__name__}",
            hint="check the address and the network, or download it and give the file",
        )
    return SourceToRead(path, address.partition("#")[0], name)


def _download(
    client: httpx.Client, address: str, path: Path, settings: Settings, allow_private: bool
) -> str:
    """Write what is at `address` to `path`; return a name whose suffix chooses the reader."""
    deadline = time.monotonic() + DOWNLOAD_SECONDS
    url = address
    for _ in range(MAX_REDIRECTS + 1):
        request = _checked_request(client, url, allow_private)
        response = client.send(request, stream=True)
        try:
            if response.is_redirect:
                url = urljoin(url, response.headers["location"])
                continue
            if response.status_code != httpx.codes.OK:
                raise ReadError(
                    f"{address} answered {response.status_code} {response.reason_phrase}",
                    hint="check the address in a browser; a page behind a login cannot be read",
                )
            size = 0
            with path.open("wb") as file:
                for block in response.iter_bytes(COPY_BYTES):
                    size += len(block)
                    if size > settings.max_file_bytes:
                        raise _too_large(address, settings)
                    if time.monotonic() > deadline:
                        raise ReadError(
                            f"{address} was not fetched within {DOWNLOAD_SECONDS:g} s",
                            hint="download it and give the file",
                        )
                    file.write(block)
            return _name_of(url, response.headers.get("content-type", ""))
        finally:
            response.close()
    raise ReadError(
        f"{address} redirects more than {MAX_REDIRECTS} times", hint="give the final address"
    )


def _checked_request(client: httpx.Client, url: str, allow_private: bool) -> httpx.Request:
    """Return a request to the very address that was checked: a second look-up could differ."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
        raise ReadError(
            f"{url} is not fetched; expected http:// or https:// and a host without a password",
            hint="give a file by its path",
        )
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:
        raise ReadError(
            f"the host {parts.hostname} is not known: {error}", hint="check the spelling"
        ) from error
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    if not allow_private and not all(map(_is_public, addresses)):
        raise ReadError(
            f"{url} leads to a private address ({addresses[0]}) and is not fetched",
            hint="download it yourself and give the file",
        )
    addresses.sort(key=lambda address: address.version)  # IPv4 is reached from more places
    target = httpx.URL(url).copy_with(host=str(addresses[0]), fragment=None)
    request = client.build_request(
        "GET",
        target,
        # bytes as they are: nothing to unfold
        headers={"Host": parts.netloc, "Accept-Encoding": "identity", "User-Agent": "fathom"},
    )
    request.extensions["sni_hostname"] = parts.hostname
    return request


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    mapped = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    return (mapped or address).is_global and not (mapped or address).is_multicast


def _name_of(url: str, content_type: str) -> str:
    """Return the last part of the path; where its suffix says nothing, the type's is added."""
    parts = urlsplit(url)
    name = PurePosixPath(unquote(parts.path)).name or str(parts.hostname)
    if format_of_name(name) is not None and parts.path.strip("/"):
        return name
    media_type = content_type.partition(";")[0].strip().lower()
    suffix = next((s for s, known in FORMATS.items() if known.media_type == media_type), "")
    return name + suffix
