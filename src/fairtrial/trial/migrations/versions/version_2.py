"""What tunings tried, so that a comparison whose runs are stored need not find its proposals anew."""

import sqlalchemy as sa
from alembic import op

revision = "2"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "tunings",
        sa.Column("key", sa.String(32), primary_key=True),
        sa.Column("task", sa.Text, nullable=False),
        sa.Column("tried", sa.Text, nullable=False),
        sa.Column("recorded", sa.String(32), nullable=False),
    )
