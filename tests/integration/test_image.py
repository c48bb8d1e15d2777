"""The image of docker/Dockerfile without an engine.

Its steps run in a clean root, its programs as process 1 of their own namespaces.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.containers import TOOLS, Container, build, debian
from tests.daemon import CHECKOUT
from tests.servers import PostgresServer

DATABASE_SOCKET = "/run/postgresql/.s.PGSQL.5432"
READYZ = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9464/readyz').status)"


@pytest.fixture
def roots() -> Iterator[Path]:
    """Folder for root file systems; pytest would keep them."""
    with TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, TOOLS)), reason="root and debootstrap are needed"
)
def test_the_images_steps_make_a_syncd_that_serves_is_healthy_and_saves_at_sigterm(
    server: PostgresServer, tmp_path: Path, roots: Path
) -> None:
    debian(roots / "base")
    image = build((CHECKOUT / "docker/Dockerfile").read_text(), CHECKOUT, roots / "base", roots)
    volume = tmp_path / "volume"
    # An engine fills a new volume in this way.
    subprocess.run(["cp", "-a", image.inside(image.volume), volume], check=True)
    database = conninfo_to_dict(server.create_database("of_the_image"))
    environment = {
        "PGHOST": "/run/postgresql",
        "PGUSER": str(database["user"]),
        "PGDATABASE": str(database["dbname"]),
    }
    binds = {
        image.volume: volume,
        DATABASE_SOCKET: Path(f"{database['host']}/.s.PGSQL.{database['port']}"),
    }

    containers = ExitStack()

    def container(name: str, *arguments: str) -> Container:
        return containers.enter_context(
            Container(image, arguments, environment, binds, tmp_path / f"{name}.log")
        )

    def logged(name: str) -> list[str]:
        return [
            json.loads(line)["event"]
            for line in (tmp_path / f"{name}.log").read_text().splitlines()
        ]

    with containers, psycopg.connect(server.conninfo("of_the_image"), autocommit=True) as db:
        assert container("nothing", *image.healthcheck[1:]).end(None) == 1
        assert container("init", "init").end(None) == 0
        db.execute("CREATE TABLE t (id int PRIMARY KEY, v real[])")
        db.execute("INSERT INTO t SELECT i, ARRAY[i, 1] FROM generate_series(1, 10) AS i")
        db.execute("SELECT syncd.attach('t', metric => 'l2')")
        serve = container("first", *image.command)
        assert serve.line() == f"ready {image.volume}/syncd.sock\n"
        status = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/{serve.pid}/status").read_text().splitlines()
        )
        assert set(status["Uid"].split()) == {"10001"}
        assert "0" not in status["Gid"].split()
        assert {
            int(status[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
        } == {0}
        assert status["NoNewPrivs"].strip() == "1"
        healthy = serve.execute(*image.healthcheck)
        assert healthy.returncode == 0, healthy.stderr
        assert serve.execute("python", "-c", READYZ).stdout == "200\n"
        assert serve.execute("sh", "-c", "echo > /opt/syncd/written").returncode != 0
        db.execute("INSERT INTO t VALUES (11, '{11,1}')")
        before = (volume / "manifest.json").read_bytes()
        assert serve.end(signal.SIGTERM) == 0
        assert (volume / "manifest.json").read_bytes() != before
        assert "source_to_be_read" in logged("first")

        serve = container("second", *image.command)
        assert serve.line() == f"ready {image.volume}/syncd.sock\n"
        assert "source_to_be_read" not in logged("second")
        found = serve.execute("syncd", "search", "t", "--key", "11", "-k", "2", "--json")
        assert json.loads(found.stdout)["keys"] == [10, 9], found.stderr
        assert serve.end(signal.SIGINT) == 0
