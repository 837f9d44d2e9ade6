"""Owners of documents, names and answers; accounts, their sessions and keys; shared collections."""

from alembic import op
from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

revision = "0004"
down_revision = "0003"

BigId = BigInteger().with_variant(Integer, "sqlite")


def upgrade() -> None:
    """Give every row that is there to the owner without a name, and make the new tables."""
    if op.get_bind().dialect.name == "sqlite":
        _make_anew("document")
        _make_anew("source_version")
        op.create_index("ix_source_version_document_id", "source_version", ["document_id"])
    else:
        for table in ("document", "source_version"):
            op.add_column(table, Column("owner", String, nullable=False, server_default=""))
            op.alter_column(table, "owner", server_default=None)
        op.drop_constraint("document_content_sha256_key", "document")
        op.drop_constraint("document_source_version_key", "document")
        op.create_unique_constraint(None, "document", ["owner", "content_sha256"])
        op.create_unique_constraint(None, "document", ["owner", "source", "version"])
        op.drop_constraint("source_version_pkey", "source_version")
        op.create_primary_key(None, "source_version", ["owner", "source", "version"])

    op.add_column("answer", Column("owner", String, nullable=False, server_default=""))
    op.create_index("ix_answer_owner", "answer", ["owner"])
    op.create_table(
        "collection_share",
        Column("owner", String, primary_key=True),
        Column("collection", String, primary_key=True),
        Column("reader", String, primary_key=True),
    )
    op.create_table(
        "account",
        Column("name", String, primary_key=True),
        Column("password_hash", String, nullable=False),
        Column("created_at", String, nullable=False),
    )
    op.create_table(
        "credential",
        Column("secret_sha256", String(64), primary_key=True),
        Column("kind", String, nullable=False),
        Column(
            "account",
            String,
            ForeignKey("account.name", ondelete="CASCADE"),
            nullable=False,
            index=True,
        ),
        Column("created_at", String, nullable=False),
        Column("expires_at", String),
    )


def _make_anew(name: str) -> None:
    """Copy a SQLite table into one of its new shape: it cannot drop a constraint.

    `Database` has turned foreign keys off for the migration, so that dropping the old table takes
    no row of another with it; that none was lost is checked here.
    """
    run = op.get_bind().exec_driver_sql
    last_number = run("SELECT seq FROM sqlite_sequence WHERE name = ?", (name,)).scalar()
    columns = ", ".join(row.name for row in run(f"PRAGMA table_info({name})"))
    _tables().tables[f"new_{name}"].create(op.get_bind())
    run(f"INSERT INTO new_{name}(owner, {columns}) SELECT '', {columns} FROM {name}")
    run(f"DROP TABLE {name}")
    run(f"ALTER TABLE new_{name} RENAME TO {name}")
    if last_number is not None:  # a number that was given to a deleted row is not given again
        run("DELETE FROM sqlite_sequence WHERE name = ?", (name,))
        run("INSERT INTO sqlite_sequence(name, seq) VALUES (?, ?)", (name, last_number))
    lost = run("PRAGMA foreign_key_check").first()
    if lost is not None:
        raise RuntimeError(f"a row of {lost[0]} would belong to nothing; nothing was changed")


def _tables() -> MetaData:
    """Return the two tables as they are from this version on."""
    metadata = MetaData()
    Table(
        "new_document",
        metadata,
        Column("id", BigId, primary_key=True),
        Column("owner", String, nullable=False),
        Column("title", String, nullable=False),
        Column("source", String, nullable=False),
        Column("version", Integer, nullable=False),
        Column("content_sha256", String(64), nullable=False),
        Column("media_type", String, nullable=False),
        Column("num_bytes", BigId, nullable=False),
        Column("num_chars", BigId, nullable=False),
        Column("num_pages", Integer, nullable=False),
        Column("num_chunks", Integer, nullable=False),
        Column("warnings", Text, nullable=False),
        Column("created_at", String, nullable=False),
        UniqueConstraint("owner", "content_sha256"),
        UniqueConstraint("owner", "source", "version"),
        sqlite_autoincrement=True,
    )
    Table("document", metadata, Column("id", BigId, primary_key=True))
    Table(
        "new_source_version",
        metadata,
        Column("owner", String, primary_key=True),
        Column("source", String, primary_key=True),
        Column("version", Integer, primary_key=True),
        Column("title", String, nullable=False),
        Column("document_id", BigId, ForeignKey("document.id", ondelete="CASCADE"), nullable=False),
    )
    return metadata
