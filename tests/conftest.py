"""Shared fixtures: a hash embedder, a tiny random model, and a library in a temporary folder."""

from rag.runtime import prepare_process

prepare_process()

from collections.abc import Generator, Iterator, Sequence  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
from argon2 import PasswordHasher  # noqa: E402

from hash_embedder import HashEmbedder as HashEmbedder  # noqa: E402
from postgres_server import PostgresServer, find_binaries, running_server  # noqa: E402
from rag.lm.engine import Prompt  # noqa: E402
from rag.lm.local_engine import LocalEngine  # noqa: E402
from rag.settings import Settings  # noqa: E402
from ui.assembly import Fathom  # noqa: E402

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
INGEST_DOCS = SHARED_DATA / "ingest_docs"
_FAILED = pytest.StashKey[bool]()

HANDBOOK = """# Harbour handbook

Ships report to the harbour office on arrival.

## Berths

The quay has twelve berths. Berth seven is kept free for the pilot boat.
A berth is booked by radio on channel 14.

## Fees

The harbour fee is 35 crowns a night. Children under ten pay nothing.

## Lights

The north beacon flashes green every four seconds. The south beacon is red.
"""


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Return settings whose home is a temporary folder, whatever the user has set."""
    monkeypatch.setenv("FATHOM_HOME", str(tmp_path / "home"))
    return Settings(kv_reserve_bytes=0, max_new_tokens=16, prefill_deadline_seconds=1e9)


@pytest.fixture
def cheap_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hash passwords with argon2's least effort: what is tested is who gets in, not how slowly."""
    monkeypatch.setattr(
        "rag.store.accounts._HASHER", PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)
    )


@pytest.fixture(scope="session")
def tiny_engine() -> LocalEngine:
    """Return a seeded random Llama of two layers with a byte tokenizer."""
    return make_tiny_engine()


@pytest.fixture
def library(settings: Settings, tiny_engine: LocalEngine) -> Fathom:
    """Return an empty library with the hash embedder and the tiny model."""
    return Fathom(settings, embedder=HashEmbedder(), engine=tiny_engine)


@pytest.fixture
def handbook(tmp_path: Path) -> Path:
    """Return a short Markdown file with four sections."""
    path = tmp_path / "handbook.md"
    path.write_text(HANDBOOK)
    return path


@pytest.fixture
def small_fathom(library: Fathom, handbook: Path) -> Fathom:
    """Return a library that holds the handbook."""
    library.ingest(handbook)
    return library


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """Return a running PostgreSQL server of our own."""
    binaries = find_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    with running_server(binaries, durable=False) as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return the URL of an empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'home' / 'fathom.sqlite'}"
    server: PostgresServer = request.getfixturevalue("postgres")
    return server.url(server.create_database())


def prompt_of(ids: Sequence[int]) -> Prompt:
    """Return a prompt of these tokens, whatever chat they may stand for."""
    return Prompt((), len(ids), tuple(ids))


def fail_to_allocate_once(model: Any) -> None:  # noqa: ANN401 - a torch module
    """Let the model's next pass ask torch for more memory than any machine has."""
    import torch

    def ask_for_too_much(*_: object) -> None:
        handle.remove()
        torch.empty(2**55, dtype=torch.uint8)

    handle = model.register_forward_pre_hook(ask_for_too_much)


def make_tiny_tokenizer() -> Any:  # noqa: ANN401 - transformers types it as a union
    """Build the tiny engine's tokenizer: one token per byte, and an end."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {sign: number for number, sign in enumerate([*alphabet, "<eos>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, eos_token="<eos>"
    )


def make_tiny_engine(max_position_embeddings: int = 4096, **changes: int) -> LocalEngine:
    """Build the tiny engine from transformers' own config class."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tiny_tokenizer()
    torch.manual_seed(7)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(
        **shape | changes,
        vocab_size=len(tokenizer),
        max_position_embeddings=max_position_embeddings,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model: Any = LlamaForCausalLM(config)
    return LocalEngine(model.eval(), tokenizer, name="tiny-llama")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Return one browser for all tests of a file."""
    from playwright.sync_api import sync_playwright

    from served_page import ARGUMENTS, CHROMIUM

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, Any]:
    """Tell the fixtures of a test whether it failed."""
    report = yield
    if report.when == "call":
        item.stash[_FAILED] = report.failed
    return report


@pytest.fixture
def pages(browser: object, url: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Return pages that may say nothing on the console and ask nobody else."""
    from served_page import Watched

    watched = Watched(browser, url)
    yield watched
    if request.node.stash.get(_FAILED, False):
        watched.tell(request.node.name)
    watched.close()
    assert watched.problems == []
    assert watched.foreign == []
