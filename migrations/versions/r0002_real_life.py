"""Tables and functions of schema syncd that work with other programs' tools and settings."""

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
    # Last, because it locks the outbox: writers wait for it until init commits.
    "schema/0002_publications.sql",
)


def upgrade() -> None:
    for path in FILES:
        op.execute(executable_script(path))
