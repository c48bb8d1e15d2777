"""A TCP peer that vanished without a word is noticed on both ends."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import anyio
import pytest

from syncd.client import calls
from syncd.client.async_client import AsyncClient
from syncd.client.client import Client
from syncd.protocol import keepalive
from tests.deaf import go_deaf, needs_linux
from tests.unit.rpc.rpc_calls import EchoParams, close, ping, run
from tests.unit.rpc.rpc_service import SHARED_WORD, TEST_SECONDS, lines_to, serving

pytestmark = [pytest.mark.anyio, needs_linux]


@pytest.fixture
def soon() -> Iterator[None]:
    with patch.multiple(
        keepalive, IDLE_SECONDS=1, INTERVAL_SECONDS=1, PROBES=2, USER_TIMEOUT_SECONDS=2
    ):
        yield


def options(connection: socket.socket) -> list[int]:
    names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
    return [
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        *[connection.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names],
    ]


async def test_both_ends_of_a_tcp_connection_probe_it_within_a_minute(path: Path) -> None:
    async with serving(path, tcp=True) as service:
        address = f"tcp://127.0.0.1:{service.tcp[1]}"
        client, other = Client(address, token=SHARED_WORD), AsyncClient(address, token=SHARED_WORD)
        assert [await ping(client), await ping(other)] == ["pong", "pong"]
        link, (here,) = client._own.get().link, other._own.get()._loops.values()
        assert link is not None
        assert here.link is not None
        for connection in (link._socket, here.link._connection):
            assert options(connection) == [1, 30, 10, 3, 60_000]
        for served in service.server._connections:
            with socket.socket(fileno=socket.dup(served.descriptor)) as copy:
                assert options(copy) == [1, 30, 10, 3, 60_000]
        await close(client)
        await close(other)


@pytest.mark.usefixtures("soon")
async def test_the_slots_of_clients_that_vanished_idle_or_in_the_middle_of_an_answer_are_free_again(
    path: Path,
) -> None:
    async with serving(path, tcp=True) as service, lines_to(path) as other:
        vanished = [socket.create_connection(service.tcp) for _ in range(3)]
        try:
            for connection in vanished:
                connection.setblocking(False)
                loop = asyncio.get_running_loop()
                ask = {
                    "jsonrpc": "2.0",
                    "id": 1,
                    "method": "authenticate",
                    "params": {"token": SHARED_WORD},
                }
                await loop.sock_sendall(connection, json.dumps(ask).encode() + b"\n")
                assert b"true" in await loop.sock_recv(connection, 1000)
            await loop.sock_sendall(
                vanished[1], b'{"jsonrpc":"2.0","id":2,"method":"hold","params":{"value":"late"}}\n'
            )
            big = b'{"jsonrpc":"2.0","id":2,"method":"big","params":{"value":50000000}}\n'
            await loop.sock_sendall(vanished[2], big)
            await service.until(started=1)
            while not service.big_calls:
                await other.ask("ping")
            for connection in vanished:
                go_deaf(connection)
            assert service.server.connections == 4
            service.release.set()
            while service.server.connections > 1:
                assert (await other.ask("ping"))["result"] == "pong"
        finally:
            for connection in vanished:
                connection.close()


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("blocking", [True, False])
async def test_a_call_without_a_time_limit_is_asked_again_when_its_service_has_vanished(
    blocking: bool,
) -> None:
    heard: list[str] = []
    vanished: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            asked = json.loads(line)
            heard.append(asked["method"])
            if asked["method"] == "echo" and heard.count("echo") == 1:
                connection = writer.get_extra_info("socket")
                with socket.socket(fileno=socket.dup(connection.fileno())) as copy:
                    go_deaf(copy)
                vanished.append(writer)
                return
            writer.write(
                json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": True}).encode() + b"\n"
            )
        writer.close()

    with anyio.fail_after(TEST_SECONDS):
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            address = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            client: Client | AsyncClient
            client = (
                Client(address, token=SHARED_WORD)
                if blocking
                else AsyncClient(address, token=SHARED_WORD)
            )
            call = calls.Call(
                "echo", EchoParams(value=1), calls._decoder(bool), patience_seconds=None
            )
            assert await run(client, call) is True
            assert heard == ["authenticate", "echo"] * 2
            await close(client)
            for writer in vanished:
                writer.transport.abort()
            await anyio.lowlevel.checkpoint()
