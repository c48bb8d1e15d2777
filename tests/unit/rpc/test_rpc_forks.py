"""Clients in a child process have a connection of their own, and the parent's goes on."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import threading
from pathlib import Path

import anyio
import pytest
from anyio.to_thread import run_sync

from syncd.client import calls
from syncd.client.async_client import AsyncClient
from syncd.client.client import Client
from tests.forks import Child
from tests.unit.rpc.rpc_calls import EchoParams, close, hold_call, ping
from tests.unit.rpc.rpc_service import SHARED_WORD, serving
from tests.unit.rpc.test_rpc_clients import Library

pytestmark = pytest.mark.anyio
CHILDREN = 3
CALLS = 100


def echo_call(value: int) -> calls.Call[int]:
    return calls.Call("echo", EchoParams(value=value), calls._decoder(int))


@pytest.mark.parametrize("tcp", [False, True])
async def test_a_client_made_before_a_fork_gives_each_process_its_own_answers(
    path: Path, tcp: bool
) -> None:
    async with serving(path, tcp=tcp) as service:
        address = f"tcp://127.0.0.1:{service.tcp[1]}" if tcp else str(path)

        def use() -> list[list[int]]:
            with Client(address, token=SHARED_WORD) as client:

                def ask(first: int) -> list[int]:
                    return [client.run(echo_call(first + number)) for number in range(CALLS)]

                children = [
                    Child(lambda first=first: ask(first * CALLS))  # type: ignore[misc]
                    for first in range(1, CHILDREN + 1)
                ]
                return [ask(0), *[child.result() for child in children]]

        answers = await run_sync(use)
        assert answers == [
            list(range(first * CALLS, (first + 1) * CALLS)) for first in range(CHILDREN + 1)
        ]


async def test_a_fork_while_another_thread_waits_neither_blocks_the_child_nor_takes_the_answer(
    path: Path,
) -> None:
    async with serving(path) as service:
        client = Client(path)
        held: list[int] = []
        thread = threading.Thread(target=lambda: held.append(client.run(hold_call(1))))
        thread.start()
        await service.until(started=1)
        child = Child(client.ping)
        assert await run_sync(child.result) == "pong"
        service.release.set()
        await run_sync(thread.join)
        assert held == [1]
        client.close()


@pytest.mark.parametrize("ends", ["closes", "forgets"])
async def test_a_child_that_is_done_with_a_client_leaves_the_parents_connection_open(
    path: Path, ends: str
) -> None:
    async with serving(path) as service:
        clients = [Client(path)]
        await run_sync(clients[0].ping)

        def finish() -> None:
            if ends == "closes":
                clients[0].close()
            else:
                clients[0].ping()
                clients.clear()
            gc.collect()

        child: Child[None] = Child(finish)
        await run_sync(child.result)
        link = clients[0]._own.get().link
        assert await run_sync(clients[0].ping) == "pong"
        assert clients[0]._own.get().link is link
        assert service.server.connections == 1
        clients[0].close()


async def test_a_parent_that_closes_ends_its_connection_though_a_child_has_its_descriptor(
    path: Path,
) -> None:
    async with serving(path) as service:
        client = Client(path)
        await run_sync(client.ping)
        read, write = os.pipe()

        def live_until_told() -> bytes:
            os.close(write)
            return os.read(read, 1)

        child = Child(live_until_told)
        client.close()
        async with AsyncClient(path) as other:
            await other.ping()
            while service.server.connections > 1:
                await other.ping()
        os.close(write)
        assert await run_sync(child.result) == b""
        os.close(read)


async def test_keys_go_on_after_a_fork_in_both_processes(path: Path) -> None:
    async with serving(path, methods=Library().methods()):

        def use() -> None:
            with Client(path) as client:
                keys = client.keys("c", limit=10)
                first = [next(keys) for _ in range(5)]
                child = Child(lambda: list(keys))
                assert first + list(keys) == list(range(1, 26))
                assert first + child.result() == list(range(1, 26))

        await run_sync(use)


async def test_an_asynchronous_client_works_in_a_child_and_goes_on_in_the_parent(
    path: Path,
) -> None:
    """The event loop's own thread forks: the child inherits its queue, which it must not touch."""
    async with serving(path) as service, AsyncClient(path) as client:
        assert await client.ping() == "pong"

        async def ask(first: int) -> list[int]:
            answers = [await client.run(echo_call(first + number)) for number in range(CALLS)]
            await client.close()
            return answers

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.run, hold_call(1))
            await service.until(started=1)
            child = Child(lambda: asyncio.run(ask(CALLS)))
            mine = [await client.run(echo_call(number)) for number in range(CALLS)]
            assert await run_sync(child.result) == list(range(CALLS, 2 * CALLS))
            assert mine == list(range(CALLS))
            service.release.set()
        assert await client.ping() == "pong"
        assert service.server.connections == 1


@pytest.mark.parametrize("blocking", [True, False])
async def test_a_pickled_client_connects_in_the_process_that_unpickles_it(
    path: Path, blocking: bool
) -> None:
    async with serving(path) as service:
        client: Client | AsyncClient = (
            Client(path, timeout=7) if blocking else AsyncClient(path, timeout=7)
        )
        assert await ping(client) == "pong"
        again = pickle.loads(pickle.dumps(client))  # noqa: S301 - our own
        assert again.timeout == 7
        assert await ping(again) == "pong"
        assert service.server.connections == 2
        await close(client)
        await close(again)
