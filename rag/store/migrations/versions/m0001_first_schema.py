"""The first schema: documents, chunks with vectors, FTS5, op-log, answers."""

from alembic import op
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

revision = "0001"
down_revision = None

BigId = BigInteger().with_variant(Integer, "sqlite")

# FTS5 rows and the op-log follow the chunk table inside its own transaction.
SQLITE_DERIVED = (
    """CREATE VIRTUAL TABLE chunk_fts USING fts5(
        text, heading, scope, content='chunk', content_rowid='id', tokenize='porter unicode61')""",
    """CREATE TRIGGER chunk_added AFTER INSERT ON chunk BEGIN
        INSERT INTO chunk_fts(rowid, text, heading, scope)
            VALUES (new.id, new.text, new.heading, new.scope);
        INSERT INTO oplog(op, chunk_id) VALUES ('add', new.id);
    END""",
    """CREATE TRIGGER chunk_deleted AFTER DELETE ON chunk BEGIN
        INSERT INTO chunk_fts(chunk_fts, rowid, text, heading, scope)
            VALUES ('delete', old.id, old.text, old.heading, old.scope);
        INSERT INTO oplog(op, chunk_id) VALUES ('del', old.id);
    END""",
)
POSTGRESQL_DERIVED = (
    """CREATE FUNCTION log_added_chunks() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO oplog(op, chunk_id) SELECT 'add', id FROM changed ORDER BY id;
        RETURN NULL;
    END $$""",
    """CREATE FUNCTION log_deleted_chunks() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        INSERT INTO oplog(op, chunk_id) SELECT 'del', id FROM changed ORDER BY id;
        RETURN NULL;
    END $$""",
    """CREATE TRIGGER chunk_added AFTER INSERT ON chunk REFERENCING NEW TABLE AS changed
        FOR EACH STATEMENT EXECUTE FUNCTION log_added_chunks()""",
    """CREATE TRIGGER chunk_deleted AFTER DELETE ON chunk REFERENCING OLD TABLE AS changed
        FOR EACH STATEMENT EXECUTE FUNCTION log_deleted_chunks()""",
)


def upgrade() -> None:
    """Create every table, the full-text table and the triggers that keep it."""
    connection = op.get_bind()
    _tables().create_all(connection, checkfirst=False)
    if connection.dialect.name == "sqlite":
        for statement in SQLITE_DERIVED:
            op.execute(statement)
        if tuple(int(part) for part in _sqlite_version().split(".")) >= (3, 42, 0):
            op.execute("INSERT INTO chunk_fts(chunk_fts, rank) VALUES ('secure-delete', 1)")
    else:
        for statement in POSTGRESQL_DERIVED:
            op.execute(statement)
    op.execute("INSERT INTO meta(key, value) VALUES ('oplog_floor', '0')")


def _sqlite_version() -> str:
    row = op.get_bind().exec_driver_sql("SELECT sqlite_version()").scalar_one()
    return str(row)


def _tables() -> MetaData:
    """Return the tables as they were at this version, whatever rag/store/schema.py says today."""
    metadata = MetaData()
    Table(
        "document",
        metadata,
        Column("id", BigId, primary_key=True),
        Column("title", String, nullable=False),
        Column("source", String, nullable=False),
        Column("version", Integer, nullable=False),
        Column("is_latest", Boolean, nullable=False),
        Column("content_sha256", String(64), nullable=False, unique=True),
        Column("media_type", String, nullable=False),
        Column("num_bytes", BigId, nullable=False),
        Column("num_chars", BigId, nullable=False),
        Column("num_pages", Integer, nullable=False),
        Column("num_chunks", Integer, nullable=False),
        Column("warnings", Text, nullable=False),
        Column("created_at", String, nullable=False),
        UniqueConstraint("source", "version"),
        sqlite_autoincrement=True,
    )
    Table(
        "document_text",
        metadata,
        Column("document_id", ForeignKey("document.id", ondelete="CASCADE"), primary_key=True),
        Column("text", Text, nullable=False),
    )
    Table(
        "page",
        metadata,
        Column("document_id", ForeignKey("document.id", ondelete="CASCADE"), primary_key=True),
        Column("number", Integer, primary_key=True),
        Column("label", String),
        Column("start", Integer, nullable=False),
        Column("end", Integer, nullable=False),
    )
    Table(
        "section",
        metadata,
        Column("document_id", ForeignKey("document.id", ondelete="CASCADE"), primary_key=True),
        Column("ordinal", Integer, primary_key=True),
        Column("level", Integer, nullable=False),
        Column("title", String, nullable=False),
        Column("start", Integer, nullable=False),
    )
    Table(
        "chunk",
        metadata,
        Column("id", BigId, primary_key=True),
        Column("document_id", ForeignKey("document.id", ondelete="CASCADE"), nullable=False),
        Column("ordinal", Integer, nullable=False),
        Column("start", Integer, nullable=False),
        Column("end", Integer, nullable=False),
        Column("page_first", Integer),
        Column("page_last", Integer),
        Column("heading", String, nullable=False),
        Column("num_tokens", Integer, nullable=False),
        Column("text", Text, nullable=False),
        Column("scope", String, nullable=False),
        Column("vector", LargeBinary, nullable=False),
        UniqueConstraint("document_id", "ordinal"),
        sqlite_autoincrement=True,
    )
    Table(
        "oplog",
        metadata,
        Column("seq", BigId, primary_key=True),
        Column("op", String(3), nullable=False),
        Column("chunk_id", BigId, nullable=False),
        sqlite_autoincrement=True,
    )
    Table(
        "meta",
        metadata,
        Column("key", String, primary_key=True),
        Column("value", String, nullable=False),
    )
    Table(
        "token_count",
        metadata,
        Column("document_id", ForeignKey("document.id", ondelete="CASCADE"), primary_key=True),
        Column("tokenizer", String, primary_key=True),
        Column("num_tokens", BigId, nullable=False),
    )
    Table(
        "answer",
        metadata,
        Column("id", String, primary_key=True),
        Column("created_at", String, nullable=False),
        Column("question", Text, nullable=False),
        Column("body", Text, nullable=False),
    )
    Table(
        "answer_document",
        metadata,
        Column("answer_id", ForeignKey("answer.id", ondelete="CASCADE"), primary_key=True),
        Column("document_id", BigId, primary_key=True),
        Index("ix_answer_document_document_id", "document_id"),
    )
    return metadata
