"""The tables. `migrations/` makes them, with the triggers that keep op-log and FTS5 rows."""

from sqlalchemy import (
    BigInteger,
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

SCHEMA_VERSION = "0005"  # newest file in migrations/versions

metadata = MetaData()
BigId = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers only INTEGER by itself

# sqlite_autoincrement wherever an id leaves the database: SQLite re-uses plain rowids, and a
# re-used chunk id would let a stale index point at another document's text.
document = Table(
    "document",
    metadata,
    Column("id", BigId, primary_key=True),
    Column("owner", String, nullable=False),  # an account's name; "" without login
    Column("title", String, nullable=False),
    Column("source", String, nullable=False),  # the name it was first ingested under
    Column("version", Integer, nullable=False),  # of that name
    Column("content_sha256", String(64), nullable=False),
    Column("media_type", String, nullable=False),
    Column("num_bytes", BigId, nullable=False),
    Column("num_chars", BigId, nullable=False),
    Column("num_pages", Integer, nullable=False),
    Column("num_chunks", Integer, nullable=False),
    Column("warnings", Text, nullable=False),  # JSON list
    Column("created_at", String, nullable=False),  # ISO 8601, UTC
    # each owner has a document of his own, so that nobody can find out what others have
    UniqueConstraint("owner", "content_sha256"),
    UniqueConstraint("owner", "source", "version"),
    sqlite_autoincrement=True,
)

# The contents that a name has stood for, in order: the newest row is what it stands for now. Two
# names may stand for one document (equal content), and a name may go back to earlier content; a
# document is the latest while some name stands for it.
source_version = Table(
    "source_version",
    metadata,
    Column("owner", String, primary_key=True),
    Column("source", String, primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("title", String, nullable=False),
    Column(
        "document_id", ForeignKey("document.id", ondelete="CASCADE"), nullable=False, index=True
    ),
)

# A collection is its owner's, who is its documents' owner.
collection_member = Table(
    "collection_member",
    metadata,
    Column("collection", String, primary_key=True),
    Column(
        "document_id", ForeignKey("document.id", ondelete="CASCADE"), primary_key=True, index=True
    ),
)

# Who else may read a collection's documents: an account's name, or "*" for everyone.
collection_share = Table(
    "collection_share",
    metadata,
    Column("owner", String, primary_key=True),
    Column("collection", String, primary_key=True),
    Column("reader", String, primary_key=True),
)

document_text = Table(
    "document_text",
    metadata,
    Column("document_id", ForeignKey("document.id", ondelete="CASCADE"), primary_key=True),
    Column("text", Text, nullable=False),
)

page = Table(
    "page",
    metadata,
    Column("document_id", ForeignKey("document.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("label", String),
    Column("start", Integer, nullable=False),
    Column("end", Integer, nullable=False),
)

section = Table(
    "section",
    metadata,
    Column("document_id", ForeignKey("document.id", ondelete="CASCADE"), primary_key=True),
    Column("ordinal", Integer, primary_key=True),
    Column("level", Integer, nullable=False),
    Column("title", String, nullable=False),
    Column("start", Integer, nullable=False),
)

chunk = Table(
    "chunk",
    metadata,
    Column("id", BigId, primary_key=True),
    Column("document_id", ForeignKey("document.id", ondelete="CASCADE"), nullable=False),
    Column("ordinal", Integer, nullable=False),
    Column("start", Integer, nullable=False),
    Column("end", Integer, nullable=False),
    Column("page_first", Integer),
    Column("page_last", Integer),
    Column("heading", String, nullable=False),  # path, joined by " > "
    Column("num_tokens", Integer, nullable=False),
    Column("text", Text, nullable=False),
    Column("scope", String, nullable=False),  # "d" and the document's id, searched by FTS5
    UniqueConstraint("document_id", "ordinal"),
    sqlite_autoincrement=True,
)

chunk_vector = Table(
    "chunk_vector",
    metadata,
    Column("chunk_id", ForeignKey("chunk.id", ondelete="CASCADE"), primary_key=True),
    Column("embedder", String, primary_key=True),  # fingerprint
    Column("vector", LargeBinary, nullable=False),  # float32, unit length
)

oplog = Table(
    "oplog",
    metadata,
    Column("seq", BigId, primary_key=True),
    Column("op", String(3), nullable=False),  # add | del
    Column("chunk_id", BigId, nullable=False),
    sqlite_autoincrement=True,
)

# library: a name for this database, so that no index of another is taken for its own; embedder:
# fingerprint of the active one; oplog_floor: newest entry that the op-log has dropped;
# without_fts5: there if tantivy has taken the place of the FTS5 rows.
meta = Table(
    "meta",
    metadata,
    Column("key", String, primary_key=True),
    Column("value", String, nullable=False),
)

token_count = Table(
    "token_count",
    metadata,
    Column("document_id", ForeignKey("document.id", ondelete="CASCADE"), primary_key=True),
    Column("tokenizer", String, primary_key=True),
    Column("num_tokens", BigId, nullable=False),
)

answer = Table(
    "answer",
    metadata,
    Column("id", String, primary_key=True),
    Column("owner", String, nullable=False, server_default="", index=True),  # who asked
    Column("created_at", String, nullable=False),
    Column("question", Text, nullable=False),
    Column("body", Text, nullable=False),  # Answer.to_json
)

answer_document = Table(
    "answer_document",
    metadata,
    Column("answer_id", ForeignKey("answer.id", ondelete="CASCADE"), primary_key=True),
    Column("document_id", BigId, primary_key=True),  # outlives the document
    Index("ix_answer_document_document_id", "document_id"),
)

# What a person has asked in one go. `title` is NULL until the person gives one: the first question
# stands for it, so that it goes when that question goes.
conversation = Table(
    "conversation",
    metadata,
    Column("id", String, primary_key=True),
    Column("owner", String, nullable=False, server_default="", index=True),
    Column("title", String),
    Column("created_at", String, nullable=False),  # ISO 8601, UTC
    Column("updated_at", String, nullable=False),
)

# The answers of a conversation in order. Answers with one `exchange` are to the same question, by
# several routes. Words are kept in `answer` alone: there they are redacted with their document.
conversation_answer = Table(
    "conversation_answer",
    metadata,
    Column("conversation_id", ForeignKey("conversation.id", ondelete="CASCADE"), primary_key=True),
    Column("ordinal", Integer, primary_key=True),
    Column("exchange", Integer, nullable=False),
    Column("answer_id", ForeignKey("answer.id", ondelete="CASCADE"), nullable=False, index=True),
)

calibration = Table(
    "calibration",
    metadata,
    Column("key", String, primary_key=True),
    Column("value", Text, nullable=False),  # JSON
    Column("created_at", String, nullable=False),  # ISO 8601, UTC
)

account = Table(
    "account",
    metadata,
    Column("name", String, primary_key=True),
    Column("password_hash", String, nullable=False),  # argon2id, with its salt and parameters
    Column("created_at", String, nullable=False),  # ISO 8601, UTC
)

# What lets a browser or a program in. Only the SHA-256 of the secret is kept: it is random and
# long, so there is nothing to guess from its hash.
credential = Table(
    "credential",
    metadata,
    Column("secret_sha256", String(64), primary_key=True),
    Column("kind", String, nullable=False),  # session | key
    Column("account", ForeignKey("account.name", ondelete="CASCADE"), nullable=False, index=True),
    Column("created_at", String, nullable=False),  # ISO 8601, UTC
    Column("expires_at", String),  # none for a key
)
