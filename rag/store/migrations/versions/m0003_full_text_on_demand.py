"""Triggers that leave the FTS5 rows alone where tantivy has taken their place."""

from alembic import op

revision = "0003"
down_revision = "0002"

# A row in meta says it, so that one transaction can change both it and the rows.
SQLITE_TRIGGERS = (
    """CREATE TRIGGER chunk_added AFTER INSERT ON chunk BEGIN
        INSERT INTO chunk_fts(rowid, text, heading, scope)
            SELECT new.id, new.text, new.heading, new.scope
            WHERE NOT EXISTS (SELECT 1 FROM meta WHERE key = 'without_fts5');
        INSERT INTO oplog(op, chunk_id) VALUES ('add', new.id);
    END""",
    """CREATE TRIGGER chunk_deleted AFTER DELETE ON chunk BEGIN
        INSERT INTO chunk_fts(chunk_fts, rowid, text, heading, scope)
            SELECT 'delete', old.id, old.text, old.heading, old.scope
            WHERE NOT EXISTS (SELECT 1 FROM meta WHERE key = 'without_fts5');
        INSERT INTO oplog(op, chunk_id) VALUES ('del', old.id);
    END""",
)


def upgrade() -> None:
    """Make the triggers anew; the rows are kept until the library is found to be large."""
    if op.get_bind().dialect.name == "sqlite":
        for name, create in zip(("chunk_added", "chunk_deleted"), SQLITE_TRIGGERS, strict=True):
            op.execute(f"DROP TRIGGER IF EXISTS {name}")
            op.execute(create)
