"""Outbox, sources, consumers, capture triggers, and the ready table."""

from alembic import op

from syncd.statements import executable_script

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    for path in (
        "schema/0001_tables.sql",
        "schema/0001_rotation.sql",
        "triggers/0001_capture.sql",
        # The next file attaches a table: no notification if the server's queue is full.
        "triggers/0002_wake.sql",
        "schema/0001_functions.sql",
    ):
        op.execute(executable_script(path))
