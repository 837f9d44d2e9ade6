"""Parts of a zip-based document, read with a bound so that no bomb unfolds."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree as ET

from rag.errors import EncryptedDocumentError, ReaderFailedError

MAX_PART_BYTES = 256 * 2**20
# Office writes a document with a password, and every document before 2007, into this container.
_OLE2 = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"


@contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open the archive.

    Raises:
        EncryptedDocumentError: if it is an Office container as used for passwords.
        ReaderFailedError: if it is no zip archive.
    """
    with path.open("rb") as file:
        if file.read(len(_OLE2)) == _OLE2:
            raise EncryptedDocumentError(
                f"{path.name} needs a password, or is of Office 2003 or older",
                hint="save it anew in the current format and without a password",
            )
    try:
        archive = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ReaderFailedError(
            f"{path.name} is damaged: it is no zip archive, as its format asks ({error})",
            hint="open it in its program and save it anew",
        ) from error
    with archive:
        yield archive


def read_part(archive: zipfile.ZipFile, name: str) -> bytes:
    """Return the bytes of one part.

    Raises:
        ReaderFailedError: if it is missing, damaged or larger than `MAX_PART_BYTES`.
        EncryptedDocumentError: if it needs a password.
    """
    shown = Path(archive.filename or "").name
    try:
        if archive.getinfo(name).flag_bits & 1:
            raise EncryptedDocumentError(
                f"{shown} is encrypted and needs a password", hint="save a copy without a password"
            )
        with archive.open(name) as part:
            # the size that the archive declares may be a lie; what is unpacked is counted
            data = part.read(MAX_PART_BYTES + 1)
    except KeyError as error:
        raise ReaderFailedError(
            f"{shown} is damaged: its part {name} is missing",
            hint="open it in its program and save it anew",
        ) from error
    except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
        raise ReaderFailedError(
            f"{shown} is damaged in its part {name}: {error}",
            hint="open it in its program and save it anew",
        ) from error
    if len(data) > MAX_PART_BYTES:
        raise _too_large(archive, name)
    return data


def check_sizes(archive: zipfile.ZipFile) -> None:
    """Raise ReaderFailedError if a part declares more than `MAX_PART_BYTES`."""
    for part in archive.infolist():
        if part.file_size > MAX_PART_BYTES:
            raise _too_large(archive, part.filename)


def read_xml(archive: zipfile.ZipFile, name: str) -> ET.Element:
    """Return the root of an XML part.

    Raises:
        ReaderFailedError: if the part is missing, is no XML or declares entities.
    """
    data, shown = read_part(archive, name), Path(archive.filename or "").name
    if b"<!ENTITY" in data:
        raise ReaderFailedError(
            f"{shown} declares XML entities in its part {name}, which no such document needs",
            hint="it looks like an attack; open it in its program and save it anew",
        )
    try:
        return ET.fromstring(data)
    except ET.ParseError as error:
        raise ReaderFailedError(
            f"{shown} is damaged: its part {name} is no XML ({error})",
            hint="open it in its program and save it anew",
        ) from error


def read_relations(archive: zipfile.ZipFile, part: str) -> dict[str, tuple[str, str]]:
    """Return id -> (kind, part name) of what an Office Open XML part refers to inside its file."""
    folder, name = PurePosixPath(part).parent, PurePosixPath(part).name
    relations_part = str(folder / "_rels" / f"{name}.rels")
    if relations_part not in archive.namelist():
        return {}
    return {
        relation.get("Id", ""): (
            relation.get("Type", "").rsplit("/", 1)[-1],
            resolve_part(str(folder), relation.get("Target", "")),
        )
        for relation in read_xml(archive, relations_part)
        if relation.get("TargetMode") != "External"
    }


def resolve_part(folder: str, target: str) -> str:
    """Return the name of the part that `target` means, seen from `folder`."""
    if target.startswith("/"):
        return target.lstrip("/")
    steps: list[str] = []
    for step in (PurePosixPath(folder) / target).parts:
        if step == ".." and steps:
            steps.pop()
        elif step not in ("..", "."):
            steps.append(step)
    return "/".join(steps)


def local_name(element: ET.Element) -> str:
    """Return the element's name without its namespace."""
    return element.tag.rsplit("}", 1)[-1] if isinstance(element.tag, str) else ""


def local_attribute(element: ET.Element, name: str) -> str | None:
    """Return the attribute of that name in whatever namespace, None if there is none."""
    return next((v for key, v in element.attrib.items() if key.rsplit("}", 1)[-1] == name), None)


def _too_large(archive: zipfile.ZipFile, part: str) -> ReaderFailedError:
    shown = Path(archive.filename or "").name
    return ReaderFailedError(
        f"{shown} unfolds to more than {MAX_PART_BYTES // 2**20} MiB in its part {part}",
        hint="it looks like a zip bomb; if it is not, split the document",
    )
