"""Vectors of several embedders side by side, names apart from versions, collections."""

import uuid

from alembic import op
from sqlalchemy import BigInteger, Column, ForeignKey, Integer, LargeBinary, String, Text

revision = "0002"
down_revision = "0001"

BigId = BigInteger().with_variant(Integer, "sqlite")


def upgrade() -> None:
    """Move the vectors out of the chunks, and what a name stands for out of the documents."""
    op.create_table(
        "chunk_vector",
        Column("chunk_id", BigId, ForeignKey("chunk.id", ondelete="CASCADE"), primary_key=True),
        Column("embedder", String, primary_key=True),
        Column("vector", LargeBinary, nullable=False),
    )
    op.execute(
        "INSERT INTO chunk_vector(chunk_id, embedder, vector)"
        " SELECT chunk.id, meta.value, chunk.vector"
        " FROM chunk JOIN meta ON meta.key = 'embedder' ORDER BY chunk.id"
    )
    op.drop_column("chunk", "vector")

    op.create_table(
        "source_version",
        Column("source", String, primary_key=True),
        Column("version", Integer, primary_key=True),
        Column("title", String, nullable=False),
        Column(
            "document_id",
            BigId,
            ForeignKey("document.id", ondelete="CASCADE"),
            nullable=False,
            index=True,
        ),
    )
    op.execute(
        "INSERT INTO source_version(source, version, title, document_id)"
        " SELECT source, version, title, id FROM document"
    )
    op.drop_column("document", "is_latest")

    op.create_table(
        "collection_member",
        Column("collection", String, primary_key=True),
        Column(
            "document_id",
            BigId,
            ForeignKey("document.id", ondelete="CASCADE"),
            primary_key=True,
            index=True,
        ),
    )
    if op.get_bind().dialect.name == "sqlite" and _has_secure_delete():
        # 6 to 17 s for 10,000 chunks; what a deletion leaves is merged away instead
        op.execute("INSERT INTO chunk_fts(chunk_fts, rank) VALUES ('secure-delete', 0)")
    op.execute(f"INSERT INTO meta(key, value) VALUES ('library', '{uuid.uuid4().hex}')")

    op.create_table(
        "calibration",
        Column("key", String, primary_key=True),
        Column("value", Text, nullable=False),
        Column("created_at", String, nullable=False),
    )


def _has_secure_delete() -> bool:
    version = op.get_bind().exec_driver_sql("SELECT sqlite_version()").scalar_one()
    return tuple(int(part) for part in str(version).split(".")) >= (3, 42, 0)
