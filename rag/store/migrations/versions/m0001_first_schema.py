"""The first schema: documents, chunks with vectors, FTS5, op-log, answers."""

from alembic import op

from rag.store.database import SQLITE_DERIVED, metadata

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create every table, the full-text table and the triggers that keep it."""
    connection = op.get_bind()
    metadata.create_all(connection, checkfirst=False)
    for statement in SQLITE_DERIVED:
        op.execute(statement)
    if tuple(int(part) for part in _sqlite_version().split(".")) >= (3, 42, 0):
        op.execute("INSERT INTO chunk_fts(chunk_fts, rank) VALUES ('secure-delete', 1)")
    op.execute("INSERT INTO meta(key, value) VALUES ('oplog_floor', '0')")


def _sqlite_version() -> str:
    row = op.get_bind().exec_driver_sql("SELECT sqlite_version()").scalar_one()
    return str(row)
