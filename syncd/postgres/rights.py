"""Rights that a role lacks, and the statement that grants them."""

from __future__ import annotations

import re

from psycopg import errors as pg
from psycopg import sql

DENIED = re.compile(r"permission denied for (\w+) (.+)")
OWN_RELATIONS = re.compile(
    r"alembic_version|meta|outbox\w*|notify_mode|attachments|rules|present_rules|consumers|"
    r"checkpoints|doubts|\w+_reports|sources|status|quarantine"
)


def missing_grant(error: pg.InsufficientPrivilege, role: str | None) -> str:
    """Statement by which the owner lets ``role`` use the object, and the next step after it."""
    grantee = sql.Identifier(role).as_string() if role else "the role that syncd connects as"
    denied = DENIED.search(error.diag.message_primary or "")
    if denied is None:
        return (
            "connect as the owner, or as a member of that role; for the missing rights run: syncd "
            "check"
        )
    kind, name = denied[1], denied[2]
    if kind in ("schema", "database"):
        right = "USAGE" if kind == "schema" else "CREATE"
        grant = f"GRANT {right} ON {kind.upper()} {quoted(name)} TO {grantee};"
    elif OWN_RELATIONS.fullmatch(name):
        grant = grant_own_tables(grantee)
    elif kind in ("table", "view", "relation"):
        grant = f"GRANT SELECT ON {quoted(name)} TO {grantee};"
    else:
        right = "USAGE" if kind in ("sequence", "type", "language") else "EXECUTE"
        grant = f"GRANT {right} ON {kind.upper()} {quoted(name)} TO {grantee};"
    return f"as its owner: {grant} for other missing rights run: syncd check"


def grant_own_tables(grantee: str) -> str:
    """Statements that grant a role, quoted for SQL, a service's rights on schema syncd."""
    return (
        f"GRANT USAGE ON SCHEMA syncd TO {grantee}; "
        f"GRANT ALL ON ALL TABLES IN SCHEMA syncd TO {grantee}; "
        f"GRANT ALL ON ALL SEQUENCES IN SCHEMA syncd TO {grantee};"
    )


def quoted(name: str) -> str:
    """A name from the server's message, quoted if SQL needs it."""
    return name if re.fullmatch("[a-z_][a-z0-9_]*", name) else sql.Identifier(name).as_string()
