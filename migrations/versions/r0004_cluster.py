"""Shards, and the layout that answers."""

from alembic import op

from syncd.statements import executable_script

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(executable_script("schema/0004_cluster.sql"))
