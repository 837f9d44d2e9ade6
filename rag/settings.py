"""Settings: defaults < fathom.toml < FATHOM_* < flags. Data only; nothing is built here."""

import os
from pathlib import Path
from typing import Any, Literal

from platformdirs import user_cache_path, user_data_path
from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from rag.errors import SettingsError

MIB = 2**20
DATABASE_KINDS = ("sqlite:///", "postgresql+psycopg://")


class Settings(BaseSettings):
    """Everything a person may set. Unknown keys in fathom.toml are errors.

    A flag named `--home` sets `home`, the environment variable is `FATHOM_HOME`, the key in
    `fathom.toml` (looked for in the current folder) is `home`.
    """

    model_config = SettingsConfigDict(
        env_prefix="FATHOM_", toml_file="fathom.toml", frozen=True, extra="forbid"
    )

    home: Path = Field(
        default_factory=lambda: user_data_path("fathom", appauthor=False),
        description="Folder of the library: database, original files, index snapshots.",
    )
    models_dir: Path = Field(
        default_factory=lambda: user_cache_path("fathom", appauthor=False) / "models",
        description="Folder of fetched models. They can be fetched again, so it is a cache.",
    )
    database_url: str | None = Field(
        default=None,
        description="SQLAlchemy URL, sqlite:///PATH or postgresql+psycopg://USER:PASSWORD@HOST/DB;"
        " by default a SQLite file inside home.",
    )
    model: str = Field(
        default="auto",
        description="Language model: catalog name, folder, GGUF file, hub id, or auto.",
    )
    remote_url: str | None = Field(
        default=None,
        description="URL of an OpenAI-compatible server (http://127.0.0.1:8000/v1); set it and"
        " prompts, documents in them, go there instead of to a model in this process.",
    )
    remote_model: str | None = Field(
        default=None, description="The server's name of the model; by default the only one it has."
    )
    remote_api_key: SecretStr | None = Field(
        default=None, description="Key for the server; never shown, logged or stored."
    )
    remote_context_tokens: int | None = Field(
        default=None,
        ge=256,
        description="Longest prompt and answer together; needed where the server does not tell it,"
        " a cap where it does.",
    )
    remote_tokenizer: str | None = Field(
        default=None,
        description="Tokenizer of the server's model (catalog name, folder or hub id), to count"
        " exactly where the server does not count; else bytes are counted, which are more.",
    )
    remote_timeout_seconds: float = Field(
        default=120.0, gt=0, description="Longest wait for the server's next word."
    )
    remote_parallel: int = Field(
        default=4, ge=1, description="Questions of a table that the server is asked at once."
    )
    embedder: str = Field(
        default="all-minilm-l6-v2", description="Embedder: catalog name, folder or hub id."
    )
    reranker: str | None = Field(
        default=None,
        description="Cross-encoder that reorders what was found: folder or hub id; default none.",
    )
    device: str = Field(default="auto", description="cuda, cpu, or auto (cuda where there is one).")
    num_threads: int | None = Field(
        default=None, ge=1, description="CPU threads of torch; by default torch's own choice."
    )

    decode_weights: Literal["integers", "stored", "4-bit"] = Field(
        default="integers",
        description="Weights that answers are written with on a CPU. integers: the quantised ones"
        " of the model's GGUF file as they are, in float32. stored: those that it was converted to,"
        " in bfloat16, half as fast. 4-bit: the file's of 4 bits alone, in bfloat16. Where a model"
        " has none of a kind, the stored ones.",
    )
    cuda_graphs: bool = Field(
        default=True,
        description="On a GPU an answer is written by a recorded step, where the model shows that"
        " this gives the same; false calls the model for each token.",
    )

    chunk_tokens: int = Field(
        default=128,
        ge=32,
        description="Longest chunk, in the embedder's tokens: small enough to be found.",
    )
    retrieval_tokens: int = Field(
        default=1024,
        ge=64,
        description="Budget of retrieved text in the prompt, in the language model's tokens.",
    )
    max_new_tokens: int = Field(
        default=192, ge=1, description="Longest answer, in tokens; reserved in every gate."
    )
    num_candidates: int = Field(
        default=50, ge=1, description="Chunks taken from each of the dense and lexical searches."
    )
    answer_mode: Literal["auto", "free", "quotation"] = Field(
        default="auto",
        description="quotation: answers are quoted word for word; free: the model writes them;"
        " auto: lookups are quoted where the catalog says so of the model.",
    )
    thrift: float = Field(
        default=0.001,
        ge=0,
        le=1,
        description="Probability of being right that 1,000 prompt tokens are worth: with 0 the"
        " likelier route is taken whatever it costs, with more the cheaper one sooner.",
    )
    router_weights: Path | None = Field(
        default=None,
        description="File that fathom fit-router wrote; by default the weights that ship.",
    )
    escalations: int = Field(
        default=2,
        ge=0,
        le=2,
        description="Times that a question without a supported answer is tried again by reading"
        " more: twice as much, then everything.",
    )
    max_context_tokens: int | None = Field(
        default=None, ge=256, description="Cap on the context below what the model declares."
    )
    kv_reserve_bytes: int = Field(
        default=1024 * MIB, ge=0, description="Device memory kept free of any KV cache, in bytes."
    )
    document_kv_memory_bytes: int = Field(
        default=1024 * MIB,
        ge=0,
        description="Device memory for the caches of documents read before, in bytes; they make"
        " room for a request that needs it, and never touch kv_reserve_bytes. 0 keeps none.",
    )
    document_kv_disk_bytes: int = Field(
        default=2048 * MIB,
        ge=0,
        description="Disk for the same caches inside home, in bytes, so that the next process"
        " need not read the document again; a few long documents. 0 writes none.",
    )
    prefill_deadline_seconds: float = Field(
        default=60.0, gt=0, description="Longest acceptable prefill for reading a whole document."
    )

    num_readers: int = Field(
        default_factory=lambda: max(1, min(4, (os.cpu_count() or 1) // 2)),
        ge=1,
        description="Files parsed at once while others are embedded, each in its own process.",
    )
    reader_memory_bytes: int = Field(
        default=2048 * MIB, ge=256 * MIB, description="Address space of the process that parses."
    )
    reader_timeout_seconds: float = Field(
        default=300.0, gt=0, description="CPU and wall-clock limit for parsing one file."
    )
    reader_output_bytes: int = Field(
        default=256 * MIB, ge=MIB, description="Most text that one file may hold, in bytes."
    )
    max_file_bytes: int = Field(
        default=512 * MIB, ge=1, description="Largest file that is ingested, in bytes."
    )

    user: str = Field(
        default="",
        description="Account whose documents the command line works on; by default those of none.",
    )
    max_documents_per_user: int = Field(
        default=10_000, ge=1, description="Most documents of each account, all versions."
    )
    max_bytes_per_user: int = Field(
        default=8192 * MIB, ge=1, description="Most bytes of each account's original files."
    )

    host: str = Field(default="127.0.0.1", description="Address that the web page binds to.")
    port: int = Field(default=7860, ge=1, le=65535, description="Port of the web page.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources: flags, then environment, then fathom.toml."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @property
    def resolved_database_url(self) -> str:
        """The database URL in use: the one given, else SQLite inside `home`."""
        return self.database_url or f"sqlite:///{self.home / 'fathom.sqlite'}"

    @property
    def originals_dir(self) -> Path:
        """Folder of the ingested files' bytes, named by their SHA-256."""
        return self.home / "originals"

    @property
    def lexical_dir(self) -> Path:
        """Folder of the tantivy index, where one is used; it can always be rebuilt."""
        return self.home / "lexical"

    @property
    def document_kv_dir(self) -> Path:
        """Folder of the caches of documents read before; they can be computed again."""
        return self.home / "document_kv"

    @property
    def index_dir(self) -> Path:
        """Folder of the FAISS snapshots, which can always be rebuilt."""
        return self.home / "index"


def load_settings(**flags: Any) -> Settings:  # noqa: ANN401 - one value per field, checked by pydantic
    """Return the settings; a flag that is None was not given.

    Raises:
        SettingsError: if a value has the wrong type or range, or a name is unknown.
    """
    unknown = sorted(
        name
        for name in os.environ
        if name.startswith("FATHOM_") and name[7:].lower() not in Settings.model_fields
    )
    if unknown:
        raise SettingsError(
            f"unknown environment variable {', '.join(unknown)}",
            hint="known are: " + ", ".join("FATHOM_" + f.upper() for f in Settings.model_fields),
        )
    try:
        settings = Settings(**{name: value for name, value in flags.items() if value is not None})
    except (ValidationError, ValueError) as error:
        raise SettingsError(
            f"a setting is not usable: {_first_problem(error)}",
            hint="see the settings table in README.md; check fathom.toml, FATHOM_* and the flags",
        ) from error
    if not settings.resolved_database_url.startswith(DATABASE_KINDS):
        kind = settings.resolved_database_url.split(":")[0]  # the rest may hold a password
        raise SettingsError(
            f"database_url begins with {kind!r}; expected sqlite:/// or postgresql+psycopg://",
            hint="give sqlite:///PATH or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE,"
            " or unset FATHOM_DATABASE_URL",
        )
    if settings.remote_url is not None and settings.model != "auto":
        raise SettingsError(
            f"both a server and the model {settings.model!r} of this process are asked for",
            hint="unset FATHOM_REMOTE_URL to use that model, or name the server's with"
            " FATHOM_REMOTE_MODEL",
        )
    return settings


def _first_problem(error: Exception) -> str:
    """Return one line on what pydantic, or the TOML parser, found."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))} = {first['input']!r}: {first['msg']}"
    return str(error)
