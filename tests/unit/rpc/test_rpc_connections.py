"""A client's connection: shared by calls at once, lost with the service, limited and refused."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
from anyio.to_thread import run_sync

from syncd.client import calls
from syncd.client.async_client import AsyncClient
from syncd.client.client import Client
from syncd.errors import Overloaded, ServiceUnavailable, TimedOut, TooLarge, Unauthorized
from syncd.rpc.dispatch import Limits
from tests.unit.rpc.rpc_calls import EchoParams, close, hold_call, ping, run
from tests.unit.rpc.rpc_service import SHARED_WORD, TEST_SECONDS, serving

pytestmark = pytest.mark.anyio


async def test_calls_of_one_asynchronous_client_run_at_once_and_find_their_answers(
    path: Path,
) -> None:
    async with serving(path) as service, AsyncClient(path) as client:
        answers: dict[int, int] = {}

        async def hold(number: int) -> None:
            answers[number] = await client.run(hold_call(number))

        async with anyio.create_task_group() as tasks:
            for number in range(50):
                tasks.start_soon(hold, number)
            await service.until(started=50)
            assert await client.ping() == "pong"
            assert service.server.connections == 1
            service.release.set()
        assert answers == {number: number for number in range(50)}


async def test_a_cancelled_call_takes_no_other_with_it(path: Path) -> None:
    async with serving(path) as service, AsyncClient(path) as client:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run, client, hold_call(1))
            await service.until(started=1)
            tasks.cancel_scope.cancel()
        service.release.set()
        assert await client.run(hold_call(2)) == 2


async def test_threads_share_a_blocking_client(path: Path) -> None:
    async with serving(path) as service:
        client = Client(path)
        answers: dict[int, int] = {}

        def echo(number: int) -> None:
            for _ in range(20):
                answers[number] = client.run(
                    calls.Call("echo", EchoParams(value=number), calls._decoder(int))
                )

        async with anyio.create_task_group() as tasks:
            for number in range(8):
                tasks.start_soon(run_sync, echo, number)
        assert answers == {number: number for number in range(8)}
        assert service.server.connections == 1
        await run_sync(client.close)


@pytest.mark.parametrize("blocking", [True, False])
async def test_a_client_goes_on_after_the_service_was_restarted(path: Path, blocking: bool) -> None:
    client: Client | AsyncClient = Client(path) if blocking else AsyncClient(path)
    for _ in range(3):
        async with serving(path) as service:
            assert await ping(client) == "pong"
            assert await ping(client) == "pong"
            service.server.stop()
            await service.stopped.wait()
    with pytest.raises(ServiceUnavailable) as caught:
        await ping(client)
    assert caught.value.hint == "start it with: syncd serve"
    assert str(path) in caught.value.message
    await close(client)


@pytest.mark.parametrize("blocking", [True, False])
async def test_a_service_that_does_not_answer_in_time_is_a_timeout_and_the_client_goes_on(
    path: Path, blocking: bool
) -> None:
    async with serving(path) as service:
        client: Client | AsyncClient = (
            Client(path, timeout=0.05) if blocking else AsyncClient(path, timeout=0.05)
        )
        with pytest.raises(TimedOut, match="has not answered hold within"):
            await run(client, hold_call(1))
        client.timeout = TEST_SECONDS
        service.release.set()
        assert await run(client, hold_call(2)) == 2
        await close(client)


@pytest.mark.parametrize("blocking", [True, False])
async def test_over_tcp_a_client_gives_its_token_first(path: Path, blocking: bool) -> None:
    async with serving(path, tcp=True) as service:
        address = f"tcp://127.0.0.1:{service.tcp[1]}"
        for token, works in ((SHARED_WORD, True), ("wrong", False), (None, False)):
            client: Client | AsyncClient
            client = Client(address, token=token) if blocking else AsyncClient(address, token=token)
            if works:
                assert await ping(client) == "pong"
            else:
                with pytest.raises(Unauthorized):
                    await ping(client)
            await close(client)


@pytest.mark.parametrize("blocking", [True, False])
async def test_a_request_that_is_too_large_says_so_and_the_client_goes_on(
    path: Path, blocking: bool
) -> None:
    async with serving(path, limits=Limits(line_bytes=10_000)):
        client: Client | AsyncClient = Client(path) if blocking else AsyncClient(path)
        with pytest.raises(TooLarge):
            await run(client, calls.authenticate("x" * 2_000_000))
        assert await ping(client) == "pong"
        await close(client)


@pytest.mark.parametrize("blocking", [True, False])
async def test_a_connection_over_the_limit_is_overloaded(path: Path, blocking: bool) -> None:
    async with serving(path, limits=Limits(connections=1)), AsyncClient(path):
        client: Client | AsyncClient = Client(path) if blocking else AsyncClient(path)
        with pytest.raises(Overloaded, match="1 connections are already open"):
            await ping(client)
        await close(client)
