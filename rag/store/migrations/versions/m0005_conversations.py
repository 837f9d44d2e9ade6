"""Conversations: which answers were given in one go, and whose they are."""

from alembic import op
from sqlalchemy import Column, ForeignKey, Integer, String

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add the two tables; answers given before belong to no conversation."""
    op.create_table(
        "conversation",
        Column("id", String, primary_key=True),
        Column("owner", String, nullable=False, server_default="", index=True),
        Column("title", String),
        Column("created_at", String, nullable=False),
        Column("updated_at", String, nullable=False),
    )
    op.create_table(
        "conversation_answer",
        Column(
            "conversation_id",
            String,
            ForeignKey("conversation.id", ondelete="CASCADE"),
            primary_key=True,
        ),
        Column("ordinal", Integer, primary_key=True),
        Column("exchange", Integer, nullable=False),
        Column(
            "answer_id",
            String,
            ForeignKey("answer.id", ondelete="CASCADE"),
            nullable=False,
            index=True,
        ),
    )
