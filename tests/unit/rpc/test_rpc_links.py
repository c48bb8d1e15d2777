"""Connections that give no answer, or the answer of another call.

They are given up, and the calls are asked over another connection.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
import pytest

from syncd.client import calls
from syncd.client.async_client import AsyncClient
from syncd.client.client import Client
from syncd.errors import ServiceUnavailable, TimedOut
from syncd.protocol import messages
from tests.unit.rpc.rpc_calls import EchoParams, close, hold_call, ping, run
from tests.unit.rpc.rpc_service import SHARED_WORD, TEST_SECONDS, serving

pytestmark = pytest.mark.anyio
CALLS = 20
SHORT_SECONDS = 0.2

Speak = Callable[[int, int], list[dict[str, object]]]
"""Answers of a peer to the number of the connection, from 0, and the id of the request."""


class Peer:
    """A server in the place of syncd."""

    def __init__(self, speak: Speak) -> None:
        self.speak = speak
        self.connections = 0
        self.asked = 0
        self.changed = anyio.Event()

    async def until(self, asked: int) -> None:
        while self.asked < asked:
            await self.changed.wait()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number, self.connections = self.connections, self.connections + 1
        with suppress(ConnectionError):  # the client has closed
            while line := await reader.readline():
                self.asked += 1
                for answer in self.speak(number, json.loads(line)["id"]):
                    writer.write(json.dumps({"jsonrpc": "2.0"} | answer).encode() + b"\n")
                self.changed.set()
                self.changed = anyio.Event()
        writer.close()


@asynccontextmanager
async def peer(path: Path, speak: Speak) -> AsyncIterator[Peer]:
    made = Peer(speak)
    with anyio.fail_after(TEST_SECONDS):
        async with await asyncio.start_unix_server(made.serve, path):
            yield made


def client_of(path: Path, blocking: bool, timeout: float = TEST_SECONDS) -> Client | AsyncClient:
    return Client(path, timeout=timeout) if blocking else AsyncClient(path, timeout=timeout)


def echo_call(value: int, patience_seconds: float = 0.0) -> calls.Call[int]:
    return calls.Call("echo", EchoParams(value=value), calls._decoder(int), patience_seconds)


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize(
    "foreign",
    [
        pytest.param(
            lambda asked: {"id": asked + 7, "result": "foreign"}, id="an id that was not asked"
        ),
        pytest.param(lambda _: {"id": 0, "result": "foreign"}, id="an id that no call has"),
        pytest.param(
            lambda _: {"id": -1, "error": {"code": -32000, "message": "foreign"}},
            id="a foreign error",
        ),
        pytest.param(lambda _: {"id": None, "result": "foreign"}, id="a result without an id"),
        pytest.param(lambda _: {"result": "foreign"}, id="no id at all"),
    ],
)
async def test_an_answer_to_a_call_that_was_not_asked_is_never_returned(
    path: Path, blocking: bool, foreign: Callable[[int], dict[str, object]]
) -> None:
    client = client_of(path, blocking)
    async with peer(
        path, lambda at, _: [{"id": 1, "result": "own"}] if at or once.asked == 1 else [foreign(2)]
    ) as once:
        assert await ping(client) == "own"
        assert await ping(client) == "own"
        assert once.connections == 2
        await close(client)
    async with peer(path.with_name("other"), lambda _, asked: [foreign(asked)]):
        client = client_of(path.with_name("other"), blocking)
        with pytest.raises(ServiceUnavailable):
            await ping(client)
        await close(client)


@pytest.mark.parametrize("blocking", [True, False])
async def test_an_answer_that_comes_twice_is_not_that_of_the_next_call(
    path: Path, blocking: bool
) -> None:
    def twice(_: int, asked: int) -> list[dict[str, object]]:
        return [{"id": asked, "result": asked}] * 2

    async with peer(path, twice) as spoken:
        client = client_of(path, blocking)
        for _ in range(CALLS):
            began = spoken.asked
            answer = await run(client, calls.Call("ping", messages.NoParams(), calls._decoder(int)))
            assert answer == (1 if blocking else began + 1)
        await close(client)


@pytest.mark.parametrize("blocking", [True, False])
async def test_a_connection_that_has_gone_silent_costs_one_timeout(
    path: Path, blocking: bool
) -> None:
    async with peer(
        path, lambda at, asked: [{"id": asked, "result": "pong"}] if at or asked == 1 else []
    ) as spoken:
        client = client_of(path, blocking)
        assert await ping(client) == "pong"
        client.timeout = SHORT_SECONDS
        with pytest.raises(TimedOut):
            await ping(client)
        client.timeout = TEST_SECONDS
        for _ in range(CALLS):
            assert await ping(client) == "pong"
        assert spoken.connections == 2
        await close(client)


async def test_calls_on_a_silent_connection_are_asked_over_the_next_one_once_one_of_them_times_out(
    path: Path,
) -> None:
    async with peer(
        path, lambda at, asked: [{"id": asked, "result": asked}] if at else []
    ) as spoken:
        client = AsyncClient(path, timeout=SHORT_SECONDS)
        answers: list[int] = []

        async def ask(number: int) -> None:
            answers.append(await client.run(echo_call(number, patience_seconds=2 * TEST_SECONDS)))

        async with anyio.create_task_group() as tasks:
            for number in range(CALLS):
                tasks.start_soon(ask, number)
            await spoken.until(asked=CALLS)
            with pytest.raises(TimedOut):
                await client.run(echo_call(CALLS))
        assert sorted(answers) == list(range(1, CALLS + 1))
        assert spoken.connections == 2
        await client.close()


async def test_a_call_that_times_out_on_a_busy_service_takes_no_answer_from_the_others(
    path: Path,
) -> None:
    async with serving(path) as service:
        client = AsyncClient(path, timeout=TEST_SECONDS)
        answers: list[int] = []

        async def hold(number: int) -> None:
            call = calls.Call(
                "hold", EchoParams(value=number), calls._decoder(int), patience_seconds=TEST_SECONDS
            )
            answers.append(await client.run(call))

        async with anyio.create_task_group() as tasks:
            for number in range(CALLS):
                tasks.start_soon(hold, number)
            await service.until(started=CALLS)
            client.timeout = SHORT_SECONDS
            late = asyncio.ensure_future(client.run(hold_call(CALLS)))
            await service.until(started=CALLS + 1)
            client.timeout = TEST_SECONDS
            assert await client.ping() == "pong"
            with pytest.raises(TimedOut):
                await late
            assert await client.ping() == "pong"
            assert service.server.connections == 2
            service.release.set()
        assert sorted(answers) == list(range(CALLS))
        assert service.started == CALLS + 1, "a call was asked twice"
        while service.server.connections > 1:
            assert await client.ping() == "pong"
        await client.close()


async def test_many_calls_share_the_time_that_a_failing_connection_attempt_takes() -> None:
    accepted = 0

    async def never_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        accepted += 1
        await reader.read()
        writer.close()

    with anyio.fail_after(TEST_SECONDS):
        async with await asyncio.start_server(never_answer, "127.0.0.1", 0) as server:
            host, port = server.sockets[0].getsockname()
            client = AsyncClient(f"tcp://{host}:{port}", token=SHARED_WORD, timeout=SHORT_SECONDS)
            found = await asyncio.gather(
                *[client.ping() for _ in range(100)], return_exceptions=True
            )
            assert all(isinstance(each, TimedOut) for each in found)
            assert accepted == 1
            await client.close()
