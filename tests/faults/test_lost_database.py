"""A lost database is told of once, as that, and not as errors of the tasks that need it."""

from __future__ import annotations

from pathlib import Path

from tests.daemon import Daemon
from tests.faults.following import until
from tests.servers import PostgresServer


def test_a_task_that_meets_a_lost_database_first_is_not_a_task_that_fails(
    own_server: PostgresServer, tmp_path: Path
) -> None:
    own_server.execute("CREATE TABLE chunks (id int PRIMARY KEY, v real[])", "syncd_template")
    own_server.execute("SELECT syncd.attach('chunks')", "syncd_template")
    daemon = Daemon(own_server.conninfo("syncd_template"), tmp_path / "data", poll_seconds=60)
    # The rotator looks at the database often, the consumer hardly ever.
    daemon.with_constant("syncd.sync.background.rotation.ROTATION_SECONDS", 0.05)
    daemon.with_constant("syncd.sync.consumer.consumer.PEEK_SECONDS", 60.0)
    daemon.start()
    try:
        with daemon.client() as client:
            own_server.crash()
            until(
                lambda: bool(client.status().failing_tasks or client.status().database_error),
                "the loss is noticed",
            )
            assert client.status().failing_tasks == []
            assert client.status().database_error is not None
            own_server.start()
            until(lambda: client.status().database_error is None, "it is connected again")
            assert client.status().failing_tasks == []
    finally:
        daemon.kill()
