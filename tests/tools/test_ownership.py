"""The owner of schema syncd leaves: its objects are reassigned, or dropped with dependents.

No writer gets an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psycopg
import pytest

from syncd.postgres import schema
from tests.daemon import Daemon
from tests.faults.altered import Followed, make_items, serving
from tests.faults.following import despite_locks, logged
from tests.integration.sources import role
from tests.servers import PostgresServer
from tests.tools.following import assert_in_sync

DATABASE = f"owned_{os.getpid()}"


@pytest.fixture
def owned(debian: PostgresServer, tmp_path: Path) -> Iterator[Followed]:
    """Schema syncd belongs to ``leaver``, the role of the service, and the source to ``writer``."""
    with ExitStack() as stack:
        for name in ("leaver", "writer", "stayer"):
            stack.enter_context(role(debian, name))
        debian.create_database(DATABASE)
        stack.callback(debian.drop_database, DATABASE)
        debian.execute(f"ALTER DATABASE {DATABASE} OWNER TO leaver")
        debian.execute("GRANT CREATE ON SCHEMA public TO writer; GRANT leaver TO writer", DATABASE)
        schema.install(debian.conninfo(DATABASE, user="leaver"))
        db = stack.enter_context(
            psycopg.connect(debian.conninfo(DATABASE, user="writer"), autocommit=True)
        )
        make_items(db, vector="real[]")
        db.execute("GRANT SELECT ON items TO leaver, stayer")
        daemon = Daemon(
            debian.conninfo(DATABASE, user="leaver"), tmp_path / "data", verify_seconds=0
        )
        with killed(daemon), serving(db, daemon) as followed:
            followed.in_step()
            followed.client.checkpoint()
            yield followed


@contextmanager
def killed(daemon: Daemon) -> Iterator[None]:
    try:
        yield
    finally:
        if daemon.process is not None:
            daemon.kill()


def write(followed: Followed) -> None:
    """Write the table as its owner, who gets no notice."""
    said: list[str | None] = []
    followed.db.add_notice_handler(lambda diagnostic: said.append(diagnostic.message_primary))
    followed.db.execute("UPDATE items SET v = '{8,8,8}' WHERE id = 8")
    assert said == []


def test_a_service_resumes_as_the_role_to_which_schema_syncd_was_reassigned(
    debian: PostgresServer, owned: Followed
) -> None:
    despite_locks(lambda: debian.execute("REASSIGN OWNED BY leaver TO stayer", DATABASE))
    write(owned)
    owned.logged("permission denied for schema syncd")
    assert owned.client.search("items", [1, 1, 1])
    daemon = owned.daemon
    daemon.kill()
    daemon.conninfo = debian.conninfo(DATABASE, user="stayer")
    daemon.start()
    with psycopg.connect(debian.conninfo(DATABASE), autocommit=True) as owned.db:
        assert_in_sync(owned)
    assert logged(daemon, "reconciling") == 0


def test_drop_owned_is_refused_while_a_source_is_attached_and_with_cascade_the_service_names_init(
    debian: PostgresServer, owned: Followed
) -> None:
    with pytest.raises(psycopg.errors.DependentObjectsStillExist):
        despite_locks(lambda: debian.execute("DROP OWNED BY leaver", DATABASE))
    despite_locks(lambda: debian.execute("DROP OWNED BY leaver CASCADE", DATABASE))
    write(owned)
    owned.logged("the database has no schema syncd")
    owned.logged("syncd init")
    assert owned.client.search("items", [1, 1, 1])
