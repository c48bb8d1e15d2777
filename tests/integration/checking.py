"""A table to check, ``syncd check`` without a service, and a role with few rights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from syncd.ops import check
from syncd.ops.findings import Finding
from syncd.settings import load_settings

TABLE = "CREATE TABLE items (id int PRIMARY KEY, v real[], lang text)"
ROWS = "INSERT INTO items SELECT i, ARRAY[i, 1], 'de' FROM generate_series(1, 10) AS i"
ATTACH = "SELECT syncd.attach('items', dataset => 'lang', live => $$lang <> 'it''s'$$)"
SERVICE_RIGHTS = (
    "GRANT USAGE ON SCHEMA syncd TO {role}",
    "GRANT ALL ON ALL TABLES IN SCHEMA syncd TO {role}",
    "GRANT ALL ON ALL SEQUENCES IN SCHEMA syncd TO {role}",
)


def examine(db: psycopg.Connection, tmp_path: Path, *, user: str | None = None) -> list[Finding]:
    """All findings of a check without a service."""
    conninfo = make_conninfo(db.info.dsn, **({"user": user} if user else {}))
    settings = load_settings(dsn=conninfo, data_dir=tmp_path / "data")
    return check.examine(settings, tmp_path / "none")


def about(findings: list[Finding], what: str) -> Finding:
    """The only finding about a subject."""
    found = [finding for finding in findings if finding.what == what]
    assert len(found) == 1, findings
    return found[0]


def assert_only(findings: list[Finding], *whats: str) -> None:
    """Only these findings are not ok, and the missing service. Each of them names a fix."""
    wrong = {finding.what for finding in findings if finding.level != "ok"} - {"service"}
    assert wrong == set(whats), findings
    assert all(finding.fix for finding in findings if finding.level != "ok")


@contextlib.contextmanager
def role(db: psycopg.Connection, *grants: str) -> Iterator[str]:
    """A login role with these rights; it is dropped at the end of the block."""
    name = f"reader_{db.info.dbname}"
    db.execute(sql.SQL("CREATE ROLE {} LOGIN").format(sql.Identifier(name)))
    try:
        for grant in grants:
            db.execute(sql.SQL(grant).format(role=sql.Identifier(name)))  # a test's own text
        yield name
    finally:
        db.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(name)))
        db.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(name)))
