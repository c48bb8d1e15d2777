from __future__ import annotations

import socket
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.to_thread import run_sync

from syncd.rpc.dispatch import Limits
from syncd.rpc.protocol import Method
from tests.unit.rpc.rpc_service import ANYTHING, SHARED_WORD, AnyParams, lines_to, serving

pytestmark = pytest.mark.anyio
MEBIBYTE = 1 << 20


async def test_a_connection_over_the_limit_is_told_so_and_closed_and_the_next_finds_room(
    path: Path,
) -> None:
    async with serving(path, limits=Limits(connections=2)) as service, lines_to(path) as first:
        async with lines_to(path) as second:
            assert (await second.ask("ping"))["result"] == "pong"
            async with lines_to(path) as third:
                third.send("ping", 1)
                answer = await third.receive()
                assert (answer["id"], answer["error"]["data"]["kind"]) == (None, "overloaded")
                assert "SYNCD_MAX_CONNECTIONS" in answer["error"]["data"]["hint"]
                assert await third.is_closed()
        while service.server.connections > 1:
            assert (await first.ask("ping"))["result"] == "pong"
        async with lines_to(path) as fourth:
            assert (await fourth.ask("ping"))["result"] == "pong"


async def test_a_connection_with_its_fill_of_requests_is_not_read_until_one_is_done(
    path: Path,
) -> None:
    async with (
        serving(path, limits=Limits(connection_requests=3)) as service,
        lines_to(path) as client,
    ):
        for number in range(10):
            client.send("hold", number)
        await service.until(started=3)
        async with lines_to(path) as other:
            assert (await other.ask("ping"))["result"] == "pong"
        assert service.started == 3
        service.release.set()
        assert sorted([(await client.receive())["id"] for _ in range(10)]) == list(range(10))


async def test_requests_over_the_total_are_overloaded_and_ping_is_still_answered(
    path: Path,
) -> None:
    async with (
        serving(path, limits=Limits(requests=2)) as service,
        lines_to(path) as client,
        lines_to(path) as other,
    ):
        client.send("hold", 1)
        client.send("hold", 2)
        await service.until(started=2)
        answer = await other.ask("hold", 3)
        assert (answer["id"], answer["error"]["code"]) == (3, -32000)
        assert answer["error"]["data"]["kind"] == "overloaded"
        assert (await other.ask("ping"))["result"] == "pong"
        service.release.set()
        assert {(await client.receive())["id"], (await client.receive())["id"]} == {1, 2}
        assert (await other.ask("hold", 4))["id"] == 4


async def test_requests_that_hold_too_much_memory_together_are_overloaded(path: Path) -> None:
    async with (
        serving(path, limits=Limits(held_bytes=100_000)) as service,
        lines_to(path) as client,
    ):
        client.send("hold", 1, value="x" * 60_000)
        await service.until(started=1)
        async with lines_to(path) as other:
            answer = await other.ask("echo", 2, value="x" * 60_000)
            assert answer["error"]["data"]["kind"] == "overloaded"
        service.release.set()
        assert (await client.receive())["id"] == 1
        assert (await client.ask("echo", 3, value="y"))["result"] == "y"
        assert service.server.dispatcher.held_bytes == 0


@pytest.mark.parametrize("over", ["unix", "tcp"])
async def test_a_line_of_100_mb_is_answered_too_large_and_its_connection_closed(
    path: Path, over: str
) -> None:
    async with serving(path, tcp=True) as service, lines_to(path) as other:

        def send() -> bytes:
            with socket.socket(socket.AF_UNIX if over == "unix" else socket.AF_INET) as client:
                client.settimeout(10)
                client.connect(str(path) if over == "unix" else service.tcp)
                if over == "tcp":
                    client.sendall(
                        b'{"jsonrpc":"2.0","method":"authenticate","id":1,'
                        b'"params":{"token":"%b"}}\n' % SHARED_WORD.encode()
                    )
                    assert b"true" in client.recv(1000)
                for _ in range(100):
                    client.sendall(b"x" * 1_000_000)
                client.sendall(b'\n{"jsonrpc":"2.0","method":"echo","id":2}\n')
                return client.makefile("rb").read()

        answer = await run_sync(send)
        assert answer.count(b"\n") == 1
        assert b'"id":null' in answer
        assert b'"too_large"' in answer
        assert (await other.ask("ping"))["result"] == "pong"
        assert service.echoed == []
        assert service.server.dispatcher.held_bytes == 0
        while service.server.lingering:
            assert (await other.ask("ping"))["result"] == "pong"


async def test_a_line_of_the_largest_size_is_taken(path: Path) -> None:
    frame = b'{"jsonrpc":"2.0","method":"echo","id":1,"params":{"value":"%b"}}'
    filler = b"x" * (16 * MEBIBYTE - len(frame) + 2)
    async with serving(path), lines_to(path) as client:
        client.write(frame % filler + b"\n")
        assert (await client.receive())["result"] == filler.decode()
        client.write(frame % (filler + b"x") + b"\n")
        assert (await client.receive())["error"]["data"]["kind"] == "too_large"
        assert await client.is_closed()


async def test_a_refused_client_that_sends_forever_is_cut_off(path: Path) -> None:
    limits = Limits(line_bytes=1000, linger_bytes=2 * MEBIBYTE)
    async with serving(path, limits=limits):

        def send() -> int:
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(10)
                client.connect(str(path))
                for sent in range(1000):
                    try:
                        client.sendall(b"x" * 100_000)
                    except OSError:
                        return sent
            return 1000

        assert await run_sync(send) < 100


async def test_a_refused_client_that_goes_silent_is_cut_off(path: Path) -> None:
    async with (
        serving(path, limits=Limits(line_bytes=1000, linger_seconds=0.05)) as service,
        lines_to(path) as client,
    ):
        client.write(b"x" * 2000)
        assert (await client.receive())["error"]["data"]["kind"] == "too_large"
        await client.reader.read()
        async with lines_to(path) as other:
            while service.server.lingering:
                assert (await other.ask("ping"))["result"] == "pong"


async def test_the_answers_under_way_come_before_a_refused_connection_closes(path: Path) -> None:
    async with serving(path, limits=Limits(line_bytes=1000)) as service, lines_to(path) as client:
        client.send("hold", 1, value="late")
        await service.until(started=1)
        client.write(b"x" * 2000)
        assert (await client.receive())["id"] is None
        service.release.set()
        assert (await client.receive())["result"] == "late"
        assert await client.is_closed()


async def test_a_client_that_does_not_read_is_not_read_from_and_gets_all_its_answers_later(
    path: Path,
) -> None:
    requests = 400
    async with serving(path) as service, lines_to(path) as other:
        slow = socket.socket(socket.AF_UNIX)
        with slow:
            slow.setblocking(False)
            slow.connect(str(path))
            line = b'{"jsonrpc":"2.0","method":"big","id":%d,"params":{"value":100000}}\n'
            asked = b"".join(line % number for number in range(requests))
            assert slow.send(asked) == len(asked)
            calls = -1
            while calls != service.big_calls:
                calls = service.big_calls
                for _ in range(20):
                    assert (await other.ask("ping"))["result"] == "pong"
            assert 0 < service.big_calls < requests / 4
            received = 0
            while received < requests:
                try:
                    received += slow.recv(MEBIBYTE).count(b"\n")
                except BlockingIOError:
                    await anyio.wait_readable(slow)
        assert service.big_calls == requests


async def test_tcp_answers_nothing_before_the_right_token(path: Path) -> None:
    async with serving(path, tcp=True) as service, lines_to(service.tcp) as client:
        for request_id, method, params in (
            (1, "ping", {}),
            (2, "authenticate", {"token": "wrong"}),
            (3, "echo", {"value": 1}),
            (4, "no such method", {}),
        ):
            answer = await client.ask(method, request_id, **params)
            assert (answer["id"], answer["error"]["data"]["kind"]) == (request_id, "unauthorized")
            assert answer["error"]["code"] == -32000
        client.send("echo", None, value=1)
        client.write(b"nonsense\n")
        assert (await client.receive())["error"]["data"]["kind"] == "unauthorized"
        assert (await client.ask("authenticate", token=5))["error"]["code"] == -32602
        assert (await client.ask("authenticate", token=SHARED_WORD))["result"] is True
        assert (await client.ask("echo", value=2))["result"] == 2
        assert service.echoed == [2]


async def test_tcp_takes_requests_that_are_pipelined_behind_the_token(path: Path) -> None:
    async with serving(path, tcp=True) as service, lines_to(service.tcp) as client:
        client.send("authenticate", 1, token=SHARED_WORD)
        client.send("echo", 2, value="x")
        assert (await client.receive())["result"] is True
        assert (await client.receive())["result"] == "x"


async def test_tcp_closes_on_a_client_that_keeps_guessing(path: Path) -> None:
    async with (
        serving(path, tcp=True, limits=Limits(unauthorized_requests=3)) as service,
        lines_to(service.tcp) as client,
    ):
        for _ in range(10):
            client.send("authenticate", 1, token=SHARED_WORD * 2)
        client.send("authenticate", 1, token=SHARED_WORD)
        for _ in range(3):
            assert (await client.receive())["error"]["data"]["kind"] == "unauthorized"
        assert await client.is_closed()


async def test_tcp_closes_on_a_client_that_sends_nothing_or_too_much_before_the_token(
    path: Path,
) -> None:
    async with (
        serving(path, tcp=True, limits=Limits(authenticate_seconds=0.05)) as service,
        lines_to(service.tcp) as client,
    ):
        assert (await client.receive())["error"]["data"]["kind"] == "unauthorized"
        assert await client.is_closed()
    async with serving(path, tcp=True) as service, lines_to(service.tcp) as client:
        client.write(b"x" * 200_000)
        assert (await client.receive())["error"]["data"]["kind"] == "unauthorized"
        assert await client.is_closed()


STATUS: dict[str, Method[Any, Any]] = {
    name: Method(AnyParams, ANYTHING, lambda _: "well", "How it is.", immediate=True)
    for name in ("status", "datasets")
}


@pytest.mark.parametrize("over", ["unix", "tcp"])
async def test_connections_that_do_nothing_keep_no_status_out_whichever_way_they_came(
    path: Path, over: str
) -> None:
    limits = Limits(connections=20, spare_connections=3)
    async with (
        AsyncExitStack() as idle,
        serving(path, tcp=True, limits=limits, methods=STATUS) as service,
    ):
        for number in range(20):
            held = await idle.enter_async_context(lines_to(path if over == "unix" else service.tcp))
            if over == "tcp":
                assert (await held.ask("authenticate", number, token=SHARED_WORD))["result"] is True
            else:
                assert (await held.ask("ping"))["result"] == "pong"
        async with lines_to(service.tcp) as refused:
            assert (await refused.receive())["error"]["data"]["kind"] == "overloaded"
        spares = []
        for _ in range(30):
            spares.append(await idle.enter_async_context(lines_to(path)))
            async with lines_to(path) as asking:
                assert (await asking.ask("status"))["result"] == "well"
                assert (await asking.ask("datasets"))["result"] == "well"
        assert await spares[0].is_closed()
        assert (await spares[-1].ask("echo"))["error"]["data"]["kind"] == "overloaded"
        assert await spares[-1].is_closed()
        assert service.server.connections == 20


async def test_a_connection_over_the_limit_may_ask_anything_once_another_has_closed(
    path: Path,
) -> None:
    async with (
        serving(path, limits=Limits(connections=1), methods=STATUS) as service,
        lines_to(path) as first,
    ):
        assert (await first.ask("ping"))["result"] == "pong"
        async with lines_to(path) as spare:
            assert (await spare.ask("status"))["result"] == "well"
            first.writer.transport.abort()
            while service.server.connections:
                assert (await spare.ask("status"))["result"] == "well"
            assert (await spare.ask("echo", value=1))["result"] == 1
            async with lines_to(path) as next_one:
                assert (await next_one.ask("echo", value=2))["error"]["data"][
                    "kind"
                ] == "overloaded"
            assert (await spare.ask("echo", value=3))["result"] == 3
