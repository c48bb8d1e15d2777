"""Searches from SQL."""

from alembic import op

from syncd.statements import executable_script

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(executable_script("schema/0003_search.sql"))
