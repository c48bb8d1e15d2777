"""The webhook: its POSTs, and a service that never waits for the receiver."""

from __future__ import annotations

import json
import queue
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psycopg
import pytest
import trustme

from syncd.errors import RequestError
from tests.daemon import Daemon
from tests.faults.following import until
from tests.scrape import events, wait_for_event

SECRET_PATH = "/hooks/s3cret-word"  # noqa: S105  of no account
SECONDS = 60


@dataclass
class Receiver:
    """An HTTP server. It answers with the next of ``answers``, then 200; None: no answer."""

    answers: list[int | None] = field(default_factory=list)
    got: queue.Queue[dict[str, Any]] = field(default_factory=queue.Queue)
    tries: int = 0
    authorization: str | None = None
    released: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def next(self) -> dict[str, Any]:
        """Body of the next POST."""
        return self.got.get(timeout=SECONDS)


@contextmanager
def receiver(*answers: int | None, tls: ssl.SSLContext | None = None) -> Iterator[Receiver]:
    it = Receiver(list(answers))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == SECRET_PATH + "?to=us"
            it.tries += 1
            it.authorization = self.headers["Authorization"]
            answer = it.answers.pop(0) if it.answers else 200
            if answer is None:
                it.got.put(body)
                it.released.wait(4 * SECONDS)
                return
            self.send_response(answer)
            self.end_headers()
            if answer == 200:
                it.got.put(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    it.url = f"{'https' if tls else 'http'}://localhost:{server.server_port}{SECRET_PATH}?to=us"
    thread = threading.Thread(target=server.serve_forever, args=[0.05])
    thread.start()
    try:
        yield it
    finally:
        it.released.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serving(
    conninfo: str, data_dir: Path, to: Receiver, *, small_slots: bool = False, **settings: object
) -> Iterator[Daemon]:
    """A syncd whose webhook is ``to``; it retries at once, and ends with the block."""
    daemon = Daemon(conninfo, data_dir, webhook_url=to.url, verify_seconds=0, **settings)
    daemon.with_constant("syncd.ops.webhook.LOOK_SECONDS", 0.05)
    daemon.with_constant("syncd.ops.webhook.RETRY_SECONDS", (0.05, 0.05))
    daemon.with_constant("syncd.ops.webhook.ANSWER_SECONDS", 3600)
    if small_slots:
        daemon.with_small_slots()
    try:
        yield daemon.start()
    finally:
        if daemon.process is not None:
            daemon.kill()


@pytest.fixture
def table(database: str) -> str:
    with psycopg.connect(database, autocommit=True) as db:
        db.execute("CREATE TABLE t (id int PRIMARY KEY, v real[])")
        db.execute("INSERT INTO t SELECT i, ARRAY[i, 1] FROM generate_series(1, 20) AS i")
        db.execute("SELECT syncd.attach('t', metric => 'l2')")
    return database


def drift(conninfo: str) -> None:
    """Change two rows without an outbox row."""
    with psycopg.connect(conninfo) as db:
        db.execute("UPDATE t SET v = ARRAY[v[1] + 1, 1] WHERE id IN (3, 4)")
        db.execute("DELETE FROM syncd.outbox WHERE xid = pg_current_xact_id()")


@contextmanager
def without_its_directory(daemon: Daemon) -> Iterator[None]:
    away = daemon.data_dir.with_name("away")
    daemon.data_dir.rename(away)
    yield
    away.rename(daemon.data_dir)


def test_drift_is_reported_once_with_numbers_and_without_keys(table: str, tmp_path: Path) -> None:
    with (
        receiver() as to,
        serving(table, tmp_path / "data", to) as daemon,
        daemon.client() as client,
    ):
        drift(table)
        client.verify(repair=True)
        told = to.next()
        assert told["event"] == "drift"
        assert told["datasets"] == [{"dataset": "default/t", "missing": 0, "extra": 0, "stale": 2}]
        assert (told["consumer"], told["count"]) == ("default", 1)
        assert "default/t (0 missing, 0 extra, 2 stale)" in told["text"]
        assert told.keys() == {"event", "text", "at", "consumer", "datasets", "count"}
        assert client.verify().datasets[0].in_sync
        daemon.stop()
        assert to.got.empty()


def test_a_failed_checkpoint_is_reported_once_until_one_succeeds_and_also_at_stop(
    table: str, tmp_path: Path
) -> None:
    with (
        receiver() as to,
        serving(table, tmp_path / "data", to) as daemon,
        daemon.client() as client,
    ):
        client.checkpoint()  # so that the service's own first one is over
        with without_its_directory(daemon):
            for _ in range(2):
                with pytest.raises(RequestError):
                    client.checkpoint()
        told = to.next()
        assert told["event"] == "checkpoint_failed"
        assert "was removed" in told["reason"]
        client.checkpoint()
        with without_its_directory(daemon):
            daemon.stop()
            assert to.next()["event"] == "checkpoint_failed"
        assert to.got.empty()


def test_must_rebuild_is_reported_by_the_service_that_notices_and_by_the_one_that_must(
    table: str, tmp_path: Path
) -> None:
    with receiver() as to, serving(table, tmp_path / "b", to, consumer="b") as away:
        away.stop()
        with serving(
            table,
            tmp_path / "a",
            to,
            small_slots=True,
            consumer="a",
            outbox_max_rows=500,
            checkpoint_seconds=0.2,
        ):
            with psycopg.connect(table, autocommit=True) as db:

                def told() -> bool:
                    db.execute("UPDATE t SET v = ARRAY[v[1] + 1, 1]")
                    return not to.got.empty()

                until(told, "one consumer has been told to rebuild")
            one = to.next()
            assert (one["event"], one["consumer"], one["marked"]) == ("must_rebuild", "a", "b")
            away.start()
            two = to.next()
            while two["consumer"] != "b":  # "a" may have been told as well
                two = to.next()
            assert (two["event"], sorted(two["sources"])) == (
                "must_rebuild",
                ["public.t", "syncd.embeddings"],
            )


def test_a_receiver_that_refuses_is_tried_again_and_given_up_without_its_secret(
    table: str, tmp_path: Path
) -> None:
    with (
        receiver(500, 503) as to,
        serving(table, tmp_path / "data", to) as daemon,
        daemon.client() as client,
    ):
        drift(table)
        client.verify(repair=True)
        assert to.next()["event"] == "drift"
        assert to.tries == 3
        to.answers[:] = [500, 404, 301]
        drift(table)
        client.verify(repair=True)
        failed = wait_for_event(daemon, "webhook_failed")
        assert (failed["alert"], failed["host"], failed["reason"]) == (
            "drift",
            "localhost",
            "it answered 301",
        )
        assert to.tries == 6
        daemon.stop()
        assert SECRET_PATH not in daemon.log.read_text()


def test_a_receiver_that_never_answers_delays_nothing(table: str, tmp_path: Path) -> None:
    with (
        receiver(None) as to,
        serving(table, tmp_path / "data", to) as daemon,
        daemon.client() as client,
    ):
        drift(table)
        client.verify()
        assert to.next()["event"] == "drift"  # and is not answered
        with psycopg.connect(table) as db:
            db.execute("INSERT INTO t VALUES (100, '{100,1}')")
            row = db.execute("SELECT syncd.token()").fetchone()
            assert row is not None
        assert client.search("t", [100.0, 1.0], k=1, after=row[0])[0].key == 100
        for _ in range(3):
            client.verify()
            client.checkpoint()
        daemon.stop()
        assert not events(daemon, "checkpoint_failed")


def test_a_receiver_that_refuses_connections_is_given_up(table: str, tmp_path: Path) -> None:
    with receiver() as gone:
        pass
    with serving(table, tmp_path / "data", gone) as daemon, daemon.client() as client:
        drift(table)
        client.verify()
        assert wait_for_event(daemon, "webhook_failed")["alert"] == "drift"


def test_https_is_trusted_as_the_system_does_and_a_user_in_the_url_is_sent(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    with receiver(tls=context) as to:
        to.url = to.url.replace("localhost", "me:pass%3Aword@localhost")
        with serving(table, tmp_path / "data", to) as daemon, daemon.client() as client:
            drift(table)
            client.verify()
            assert "certificate" in wait_for_event(daemon, "webhook_failed")["reason"]
            assert to.got.empty()
            daemon.stop()
            authority.cert_pem.write_to_path(tmp_path / "authority.pem")
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
            daemon.start()
            with daemon.client() as again:
                again.verify()
            assert to.next()["event"] == "drift"
            assert to.authorization == "Basic bWU6cGFzczp3b3Jk"
            assert "pass" not in daemon.log.read_text()
