"""The RPC over TCP, with and without TLS, of a real service."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import ssl
import stat
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest
import trustme
import uvloop
from anyio.to_thread import run_sync

from syncd.client.async_client import AsyncClient
from syncd.client.client import Client, connect
from syncd.errors import Overloaded, ServiceUnavailable, Unauthorized
from tests.conftest import clone
from tests.daemon import Daemon
from tests.deaf import go_deaf, needs_linux
from tests.forks import Child
from tests.integration.commands import assert_failed, run
from tests.scrape import events
from tests.servers import PostgresServer

WORD = "a-shared-secret-\u00fc"
MANY_KEYS = 20_000


@dataclass(frozen=True)
class Certificate:
    """Files with a chain and a key for 127.0.0.1, ::1 and localhost, and with their authority."""

    chain: Path
    key: Path
    authority: Path

    @property
    def trusting(self) -> ssl.SSLContext:
        """TLS context of a client that trusts the authority."""
        return ssl.create_default_context(cafile=self.authority)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    authority, directory = trustme.CA(), tmp_path_factory.mktemp("tls")
    issued = authority.issue_cert("localhost", "127.0.0.1", "::1")
    made = Certificate(directory / "chain.pem", directory / "key.pem", directory / "authority.pem")
    for blob in issued.cert_chain_pems:
        blob.write_to_path(made.chain, append=True)
    issued.private_key_pem.write_to_path(made.key)
    authority.cert_pem.write_to_path(made.authority)
    return made


@pytest.fixture(scope="module")
def filled(server: PostgresServer) -> Iterator[str]:
    """A database with one attached table."""
    for database in clone(server):
        with psycopg.connect(database, autocommit=True) as db:
            db.execute("CREATE TABLE t (id int PRIMARY KEY, v real[])")
            db.execute(
                b"INSERT INTO t SELECT i, ARRAY[i, 1] FROM generate_series(1, %d) AS i" % MANY_KEYS
            )
            db.execute("SELECT syncd.attach('t', metric => 'l2')")
        yield database


def port_of(daemon: Daemon) -> int:
    """The port on which the service listens."""
    return int(events(daemon, "listening")[-1]["address"].rpartition(":")[2])


@pytest.fixture(scope="module")
def plain(filled: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A service over TCP without TLS."""
    daemon = Daemon(
        filled, tmp_path_factory.mktemp("plain") / "data", listen="127.0.0.1:0", token=WORD
    ).start()
    yield daemon
    daemon.stop()


@pytest.fixture(scope="module")
def encrypted(
    filled: str, certificate: Certificate, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemon]:
    """A service over TCP with TLS."""
    directory = tmp_path_factory.mktemp("encrypted")
    daemon = Daemon(
        filled,
        directory / "data",
        listen="localhost:0",
        token=WORD,
        tls_cert=certificate.chain,
        tls_key=certificate.key,
        consumer="encrypted",
    )
    yield daemon.start()
    daemon.stop()


async def assert_both_clients_work(address: str, tls: ssl.SSLContext | None) -> None:
    with connect(address, token=WORD, tls=tls) as client:
        assert client.search("t", key=7, k=2, exact=True)[0].key in (6, 8)
        # An answer of many TLS records:
        assert len(list(client.keys("t", limit=MANY_KEYS))) == MANY_KEYS
    async with AsyncClient(address, token=WORD, tls=tls) as client:
        assert (await client.status()).state == "ready"
        assert len([key async for key in client.keys("t", limit=MANY_KEYS)]) == MANY_KEYS


@pytest.mark.anyio
async def test_both_clients_work_over_tcp(plain: Daemon) -> None:
    await assert_both_clients_work(f"tcp://127.0.0.1:{port_of(plain)}", None)


@pytest.mark.anyio
async def test_both_clients_work_over_tls(encrypted: Daemon, certificate: Certificate) -> None:
    port = port_of(encrypted)
    await assert_both_clients_work(f"tcps://localhost:{port}", certificate.trusting)


def test_the_authority_and_the_token_may_come_from_variables(
    encrypted: Daemon, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"tcps://localhost:{port_of(encrypted)}"
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.authority))
    monkeypatch.setenv("SYNCD_TOKEN", WORD)
    with connect(address) as client:
        assert client.ping() == "pong"
    done = run(
        "status", "--socket", address, SSL_CERT_FILE=str(certificate.authority), SYNCD_TOKEN=WORD
    )
    assert done.returncode == 0, done.stderr


def test_over_tcp_no_request_is_answered_without_the_token_and_the_unix_socket_needs_none(
    plain: Daemon,
) -> None:
    address = f"tcp://127.0.0.1:{port_of(plain)}"
    for wrong in ("wrong", WORD + "x", WORD[:-1], ""):
        with pytest.raises(Unauthorized), connect(address, token=wrong):
            pass
    with socket.create_connection(("127.0.0.1", port_of(plain))) as raw:
        raw.sendall(b'{"jsonrpc":"2.0","id":1,"method":"status"}\n')
        answer = json.loads(raw.makefile().readline())
    assert answer["error"]["data"]["kind"] == "unauthorized"
    with plain.client() as client:
        assert client.ping() == "pong"
    assert stat.S_IMODE(plain.socket.stat().st_mode) == 0o660


def test_a_client_refuses_a_service_whose_certificate_it_does_not_trust(encrypted: Daemon) -> None:
    with pytest.raises(ServiceUnavailable, match="CERTIFICATE_VERIFY_FAILED") as caught:
        connect(f"tcps://localhost:{port_of(encrypted)}", token=WORD)
    assert "SSL_CERT_FILE" in caught.value.hint


@pytest.mark.anyio
async def test_plain_and_encrypted_do_not_meet_and_the_error_names_tcps(
    plain: Daemon, encrypted: Daemon
) -> None:
    with pytest.raises(ServiceUnavailable) as caught:
        connect(f"tcp://localhost:{port_of(encrypted)}", token=WORD, timeout=10)
    assert "tcps://" in caught.value.hint
    with pytest.raises(ServiceUnavailable):
        connect(f"tcps://127.0.0.1:{port_of(plain)}", token=WORD, timeout=10)
    with pytest.raises(ServiceUnavailable):
        async with AsyncClient(f"tcps://127.0.0.1:{port_of(plain)}", token=WORD, timeout=10):
            pass
    await assert_both_clients_work(f"tcp://127.0.0.1:{port_of(plain)}", None)


def test_noise_on_the_encrypted_port_disturbs_no_client(
    encrypted: Daemon, certificate: Certificate
) -> None:
    address = f"tcps://localhost:{port_of(encrypted)}"
    with connect(address, token=WORD, tls=certificate.trusting) as client:
        for noise in (b"", b"\x16\x03\x01", b"\0" * 70_000, os.urandom(1000)):
            with socket.create_connection(("localhost", port_of(encrypted))) as raw:
                raw.sendall(noise)
        assert client.ping() == "pong"


def test_the_token_is_in_no_log(plain: Daemon, encrypted: Daemon) -> None:
    for daemon in (plain, encrypted):
        assert WORD not in daemon.log.read_text()
        assert events(daemon, "listening")[0]["tls"] is (daemon is encrypted)


def test_ipv6_is_written_in_brackets(database: str, tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    daemon = Daemon(database, tmp_path / "data", listen="[::1]:0", token=WORD).start()
    with Client(f"tcp://[::1]:{port_of(daemon)}", token=WORD) as client:
        assert client.ping() == "pong"
    daemon.stop()


def test_a_port_in_use_ends_the_start_with_exit_1_and_names_the_setting(
    database: str, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        done = run(
            "serve",
            SYNCD_DSN=database,
            SYNCD_DATA_DIR=str(tmp_path / "data"),
            SYNCD_SOCKET=str(tmp_path / "s"),
            SYNCD_LISTEN=listen,
            SYNCD_TOKEN=WORD,
            SYNCD_HTTP="off",
        )
    assert_failed(done, 1, f"cannot listen on {listen}", "SYNCD_LISTEN")


def test_a_certificate_that_cannot_be_used_ends_the_start_with_exit_2(
    database: str, certificate: Certificate, tmp_path: Path
) -> None:
    other = trustme.CA().issue_cert("localhost")
    other.private_key_pem.write_to_path(tmp_path / "other.pem")
    for chain, key in (
        (certificate.chain, tmp_path / "none.pem"),
        (certificate.chain, tmp_path / "other.pem"),
        (certificate.authority.with_name("none"), certificate.key),
    ):
        done = run(
            "serve",
            SYNCD_DSN=database,
            SYNCD_DATA_DIR=str(tmp_path / "data"),
            SYNCD_SOCKET=str(tmp_path / "s"),
            SYNCD_LISTEN="127.0.0.1:0",
            SYNCD_TOKEN=WORD,
            SYNCD_HTTP="off",
            SYNCD_TLS_CERT=str(chain),
            SYNCD_TLS_KEY=str(key),
        )
        assert_failed(done, 2, str(chain), "SYNCD_TLS_CERT")


@pytest.mark.anyio
async def test_a_child_process_connects_again_over_tls_and_the_parents_connection_goes_on(
    encrypted: Daemon, certificate: Certificate
) -> None:
    address = f"tcps://localhost:{port_of(encrypted)}"
    with connect(address, token=WORD, tls=certificate.trusting) as client:
        child = Child(
            lambda: [
                client.search("t", key=key, k=1, exact=True)[0].distance for key in range(2, 50)
            ]
        )
        mine = [client.search("t", key=key, k=1, exact=True)[0].distance for key in range(2, 50)]
        assert mine == child.result() == [1.0] * 48
        link = client._own.get().link
        assert client.ping() == "pong"
        assert client._own.get().link is link
    async with AsyncClient(address, token=WORD, tls=certificate.trusting) as other:
        assert await other.ping() == "pong"
        forked = Child(lambda: asyncio.run(other.ping()))
        assert [await other.ping() for _ in range(20)] == ["pong"] * 20
        assert await run_sync(forked.result) == "pong"
        assert await other.ping() == "pong"


@pytest.mark.server
@pytest.mark.parametrize("encryption", ["plain", "encrypted"])
def test_one_client_works_in_each_event_loop_that_a_program_starts(
    request: pytest.FixtureRequest, certificate: Certificate, encryption: str
) -> None:
    daemon: Daemon = request.getfixturevalue(encryption)
    tls = certificate.trusting if encryption == "encrypted" else None
    client = AsyncClient(
        f"tcp{'s' if tls else ''}://localhost:{port_of(daemon)}", token=WORD, tls=tls
    )
    for run_loop in (asyncio.run, uvloop.run):
        for _ in range(3):
            assert len(run_loop(client.search("t", key=7, k=3))) == 3
            gc.collect()


@needs_linux
@pytest.mark.server
@pytest.mark.parametrize("encryption", ["plain", "encrypted"])
def test_clients_that_vanished_silently_give_their_slots_back(
    filled: str, certificate: Certificate, encryption: str, tmp_path: Path
) -> None:
    tls = certificate.trusting if encryption == "encrypted" else None
    settings = {"tls_cert": certificate.chain, "tls_key": certificate.key} if tls else {}
    daemon = Daemon(
        filled,
        tmp_path / "data",
        listen="localhost:0",
        token=WORD,
        max_connections=2,
        consumer="vanished",
        **settings,
    )
    for name, value in (("IDLE", 1), ("INTERVAL", 1), ("USER_TIMEOUT", 2)):
        daemon.with_constant(f"syncd.protocol.keepalive.{name}_SECONDS", value)
    daemon.start()
    with ExitStack() as stack:
        vanished: list[socket.socket] = []
        for request in (
            b"",
            b'{"jsonrpc":"2.0","id":2,"method":"keys","params":{"dataset":"t","limit":20000}}\n',
        ):
            connection = socket.create_connection(("localhost", port_of(daemon)))
            connection = (
                tls.wrap_socket(connection, server_hostname="localhost") if tls else connection
            )
            stack.callback(connection.close)
            token = json.dumps(
                {"jsonrpc": "2.0", "id": 1, "method": "authenticate", "params": {"token": WORD}}
            )
            connection.sendall(token.encode() + b"\n")
            assert b"true" in connection.recv(1000)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.sendall(request)
            vanished.append(connection)
        address = f"tcp{'s' if tls else ''}://localhost:{port_of(daemon)}"
        with pytest.raises(Overloaded), connect(address, token=WORD, tls=tls):
            pass
        for connection in vanished:
            go_deaf(connection)
        back = 0
        with ExitStack() as clients:
            while back < 2:  # pytest's own time-out ends a wait that is too long
                with suppress(Overloaded, ServiceUnavailable):
                    clients.enter_context(connect(address, token=WORD, tls=tls))
                    back += 1
    daemon.stop()
