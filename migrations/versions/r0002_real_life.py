"""Tables and functions of schema syncd that hold among other people's tools and settings."""

from alembic import op

from syncd.statements import executable_script

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

FILES: tuple[str, ...] = (
    "schema/0002_event_triggers.sql",
    "schema/0002_keys.sql",
    "triggers/0002_wake.sql",
    "triggers/0002_capture.sql",
    "schema/0002_rules.sql",
    "schema/0002_attach.sql",
    "schema/0002_tokens.sql",
    "schema/0002_publications.sql",  # last: it locks the outbox, for which writers wait until init commits
)


def upgrade() -> None:
    for path in FILES:
        op.execute(executable_script(path))
