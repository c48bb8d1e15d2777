"""One ``AsyncClient`` on several event loops, one after the other and at the same time."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop
from anyio.to_thread import run_sync

from syncd.client import calls
from syncd.client.async_client import AsyncClient
from tests.unit.rpc.rpc_calls import EchoParams, hold_call
from tests.unit.rpc.rpc_service import SHARED_WORD, serving

pytestmark = pytest.mark.anyio
RUNS = 3
Run = Callable[[Coroutine[Any, Any, Any]], Any]


def by_hand(main: Coroutine[Any, Any, Any]) -> Any:
    """Run as programs did before ``asyncio.run``, with all documented steps of the shutdown."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(main)
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run, by_hand])
@pytest.mark.parametrize("tcp", [False, True])
async def test_each_event_loop_connects_and_its_end_closes_the_connection_without_a_warning(
    path: Path, tcp: bool, run: Run
) -> None:
    async with serving(path, tcp=tcp) as service, AsyncClient(path) as other:
        client = AsyncClient(
            f"tcp://127.0.0.1:{service.tcp[1]}" if tcp else path, token=SHARED_WORD
        )
        for _ in range(RUNS):
            assert await run_sync(run, client.ping()) == "pong"
            gc.collect()
            while service.server.connections > 1:
                await other.ping()
        (left,) = client._own.get()._loops
        assert left.is_closed()


@pytest.mark.filterwarnings(
    "ignore:unclosed transport:ResourceWarning"
)  # asyncio's own, for a loop closed in this way
async def test_a_loop_that_was_closed_without_its_shutdown_is_forgotten_and_its_connection_closed(
    path: Path,
) -> None:
    async with serving(path) as service, AsyncClient(path) as other:
        client = AsyncClient(path)

        def run(main: Coroutine[Any, Any, Any]) -> Any:
            loop = asyncio.new_event_loop()
            try:
                return loop.run_until_complete(main)
            finally:
                loop.close()

        for _ in range(RUNS):
            assert await run_sync(run, client.ping()) == "pong"
            while service.server.connections > 2:
                await other.ping()
            assert len(client._own.get()._loops) == 1
        assert await run_sync(asyncio.run, client.ping()) == "pong"
        while service.server.connections > 1:
            await other.ping()
        gc.collect()  # here the warning is ignored


async def test_two_loops_at_the_same_time_have_a_connection_each_and_their_own_answers(
    path: Path,
) -> None:
    async with serving(path) as service, AsyncClient(path) as client:
        answers: dict[int, list[int]] = {}

        async def ask(number: int) -> None:
            held = asyncio.create_task(client.run(hold_call(number)))
            values = range(number * 100, number * 100 + 50)
            echoed = [
                client.run(calls.Call("echo", EchoParams(value=each), calls._decoder(int)))
                for each in values
            ]
            answers[number] = [*await asyncio.gather(*echoed), await held]

        threads = [
            threading.Thread(target=asyncio.run, args=[ask(number)]) for number in range(1, 4)
        ]
        for thread in threads:
            thread.start()
        await service.until(started=3, echoed=150)
        assert service.server.connections == 4
        assert await client.ping() == "pong"
        service.release.set()
        for thread in threads:
            await run_sync(thread.join)
        assert answers == {
            number: [*range(number * 100, number * 100 + 50), number] for number in range(1, 4)
        }
