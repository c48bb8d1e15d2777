from __future__ import annotations

import inspect
import threading
from pathlib import Path
from typing import Any, TypeVar

import anyio
import numpy as np
import pytest
from anyio.to_thread import run_sync

from syncd.client import calls
from syncd.client.async_client import AsyncClient
from syncd.client.calls import Hit
from syncd.client.client import Client, connect
from syncd.errors import (
    DimensionMismatch,
    InvalidFilter,
    InvalidParams,
    InvalidVector,
    NotReady,
    Overloaded,
    RequestError,
    ServiceUnavailable,
    SyncdError,
    TimedOut,
    TooLarge,
    Unauthorized,
    UnknownDataset,
    UnknownKey,
)
from syncd.protocol import messages
from syncd.protocol.messages import WirePosition
from syncd.protocol.wire import vector_from_wire
from syncd.rpc.dispatch import Limits
from syncd.rpc.protocol import Method
from tests.unit.rpc.rpc_service import SHARED_WORD, serving

pytestmark = pytest.mark.anyio
T = TypeVar("T")
POSITION = WirePosition("10:20:11", 5)
ERRORS: dict[str, RequestError] = {
    "dataset": UnknownDataset("c"),
    "key": UnknownKey("c", 5),
    "dimension": DimensionMismatch("c", expected=3, got=2),
    "vector": InvalidVector("zero norm", hint="h"),
    "filter": InvalidFilter("no such column"),
    "params": InvalidParams("wrong"),
    "ready": NotReady("catching up", hint="wait"),
    "overloaded": Overloaded(7),
    "timeout": TimedOut("over"),
    "large": TooLarge("big"),
}


class Library:
    """Methods with fixed answers, and what they were asked."""

    def __init__(self) -> None:
        self.asked: list[messages.Params] = []
        self.release = threading.Event()

    def methods(self) -> dict[str, Method[Any, Any]]:
        return {
            "search": Method(messages.SearchParams, messages.SearchResult, self.search, "Search."),
            "get": Method(messages.GetParams, messages.GetResult, self.get, "Get."),
            "keys": Method(messages.KeysParams, messages.KeysResult, self.keys, "Keys."),
            "wait": Method(messages.WaitParams, messages.WaitResult, self.wait, "Wait."),
            "checkpoint": Method(
                messages.NoParams, messages.CheckpointResult, self.checkpoint, "Save."
            ),
            "datasets": Method(
                messages.NoParams, list[messages.DatasetStatus], self.datasets, "List."
            ),
            "status": Method(messages.NoParams, messages.ServiceStatus, self.status, "Show."),
        }

    def search(self, params: messages.SearchParams) -> messages.SearchResult:
        self.asked.append(params)
        if params.dataset in ERRORS:
            raise ERRORS[params.dataset]
        if params.dataset == "fault":
            raise RuntimeError
        if params.vectors is not None:
            first = [float(vector_from_wire(vector)[0]) for vector in params.vectors]
            return messages.SearchResult(
                [[[1, "a"], [2, "b"]]] * len(first), [[x, x + 1] for x in first], POSITION, 0.0
            )
        if params.vector is None:
            return messages.SearchResult([[1, "a"], 2, "c"], [0.0, 0.5, 1.0], POSITION, 0.0)
        first = [float(vector_from_wire(params.vector)[0])]
        return messages.SearchResult([7], list(first), POSITION, 0.0, {"lang": ["en"]})

    def get(self, params: messages.GetParams) -> messages.GetResult:
        self.asked.append(params)
        if params.vectors:
            return messages.GetResult([messages.WireRow(key, [0.5, 1.5]) for key in params.keys])
        return messages.GetResult([messages.WireRow(key) for key in params.keys])

    def keys(self, params: messages.KeysParams) -> messages.KeysResult:
        start = 0 if params.after_key is None else params.after_key
        assert isinstance(start, int)
        page: list[messages.WireKey] = list(range(start + 1, min(start + params.limit, 25) + 1))
        return messages.KeysResult(page, page[-1] if len(page) == params.limit else None)

    async def wait(self, params: messages.WaitParams) -> messages.WaitResult:
        with anyio.move_on_after(params.timeout_ms / 1000):
            await run_sync(self.release.wait, 5)
            return messages.WaitResult(POSITION)
        raise TimedOut("the token has not come")

    def checkpoint(self, _: messages.NoParams) -> messages.CheckpointResult:
        return messages.CheckpointResult(POSITION, 0.5, 100)

    def datasets(self, _: messages.NoParams) -> list[messages.DatasetStatus]:
        return [
            messages.DatasetStatus(
                dataset="default/c",
                source="public.chunks",
                state="ready",
                count=1,
                tombstones=0,
                dim=None,
                metric="cosine",
                index=None,
                recall=None,
                verified=True,
                bytes=10,
                lag_seconds=0.0,
            )
        ]

    def status(self, _: messages.NoParams) -> messages.ServiceStatus:
        return messages.ServiceStatus(
            version="1",
            consumer="default",
            state="ready",
            position=POSITION,
            lag_rows=0,
            lag_seconds=0.0,
            listener_connected=True,
            checkpoint=messages.CheckpointStatus(),
            quarantined=0,
            uptime_seconds=1.0,
        )


def exercise(client: Client, library: Library) -> None:
    """Every method of the blocking client."""
    assert client.search("c", [0.5, 1.0]) == [Hit(7, 0.5, {"lang": "en"})]
    assert client.search("c", np.array([0.25, 1.0])) == [Hit(7, 0.25, {"lang": "en"})]
    assert client.search("c", key=3) == [Hit((1, "a"), 0.0), Hit(2, 0.5), Hit("c", 1.0)]
    assert client.search("c", vectors=np.eye(2, dtype=np.float32)) == [
        [Hit((1, "a"), 1.0), Hit((2, "b"), 2.0)],
        [Hit((1, "a"), 0.0), Hit((2, "b"), 1.0)],
    ]
    assert [row.key for row in client.get("c", [1, "a", (1, "a")])] == [1, "a", (1, "a")]
    vector = client.get("c", [1], vectors=True)[0].vector
    assert vector is not None
    assert vector.tolist() == [0.5, 1.5]
    assert list(client.keys("c", limit=10)) == list(range(1, 26))
    assert client.keys_page("c", limit=5).next == 5
    assert client.checkpoint().bytes_written == 100
    assert client.ping() == "pong"
    assert client.datasets()[0].dataset == "default/c"
    assert client.status().position == POSITION
    assert client.discover()["info"]["title"] == "syncd"
    library.release.set()
    assert client.wait("5") == POSITION


async def test_the_blocking_client_has_every_method(path: Path) -> None:
    library = Library()
    async with serving(path, methods=library.methods()):

        def use() -> None:
            with connect(path) as client:
                exercise(client, library)

        await run_sync(use)


async def test_the_asynchronous_client_has_every_method(path: Path) -> None:
    library = Library()
    async with serving(path, methods=library.methods()), AsyncClient(path) as client:
        assert await client.search("c", [0.5, 1.0]) == [Hit(7, 0.5, {"lang": "en"})]
        assert (await client.search("c", vectors=[[3.0]]))[0][0].distance == 3.0
        assert [row.key for row in await client.get("c", [(1, "a")])] == [(1, "a")]
        assert [key async for key in client.keys("c", limit=10)] == list(range(1, 26))
        assert (await client.keys_page("c", after_key=20)).keys == list(range(21, 26))
        assert (await client.checkpoint()).position == POSITION
        assert await client.ping() == "pong"
        assert (await client.datasets())[0].state == "ready"
        assert (await client.status()).consumer == "default"
        assert "methods" in await client.discover()
        library.release.set()
        assert await client.wait("5", timeout_ms=1000) == POSITION


def test_both_clients_have_the_same_methods_with_the_same_parameters() -> None:
    names = {
        name for name, value in vars(Client).items() if callable(value) and not name.startswith("_")
    }
    assert names == {
        name
        for name, value in vars(AsyncClient).items()
        if callable(value) and not name.startswith("_")
    }
    for name in (
        "search",
        "get",
        "keys",
        "keys_page",
        "datasets",
        "status",
        "wait",
        "checkpoint",
        "why",
        "ping",
        "discover",
    ):
        assert (
            inspect.signature(getattr(Client, name)).parameters.keys()
            == inspect.signature(getattr(AsyncClient, name)).parameters.keys()
        )
        assert getattr(Client, name).__doc__
    assert list(inspect.signature(Client("/s").search).parameters)[:2] == ["dataset", "vector"]


async def test_what_a_client_is_given_is_what_the_service_is_asked(path: Path) -> None:
    library = Library()
    async with serving(path, methods=library.methods()), AsyncClient(path) as client:
        await client.search(
            "c",
            [1.0],
            k=3,
            recall=0.9,
            exact=True,
            max_distance=0.5,
            consistency="strong",
            after="7",
            timeout_ms=100,
        )
        asked = library.asked.pop()
        assert isinstance(asked, messages.SearchParams)
        assert vector_from_wire(asked.vector or b"").tolist() == [1.0]
        assert (asked.k, asked.recall, asked.exact, asked.max_distance) == (3, 0.9, True, 0.5)
        assert (asked.consistency, asked.after, asked.timeout_ms) == ("strong", "7", 100)
        await client.get("c", [2**53 + 1, np.int64(5), (1, "a")])  # type: ignore[list-item] # numpy's integers are no int
        asked = library.asked.pop()
        assert isinstance(asked, messages.GetParams)
        assert asked.keys == [str(2**53 + 1), 5, [1, "a"]]


@pytest.mark.parametrize("name", ERRORS)
async def test_an_error_of_the_service_is_raised_as_the_class_of_its_kind(
    path: Path, name: str
) -> None:
    async with serving(path, methods=Library().methods()), AsyncClient(path) as client:
        with pytest.raises(SyncdError) as caught:
            await client.search(name, [1.0])
        assert type(caught.value) is type(ERRORS[name])
        assert caught.value.message == str(caught.value) == ERRORS[name].message
        assert caught.value.hint == ERRORS[name].hint
        assert await client.ping() == "pong"


async def test_other_errors_are_request_errors_with_their_message(path: Path) -> None:
    async with serving(path, methods=Library().methods()), AsyncClient(path) as client:
        with pytest.raises(RequestError) as fault:
            await client.search("fault", [1.0])
        assert fault.value.kind == "internal_error"
        with pytest.raises(InvalidParams, match="exactly one of"):
            await client.search("c")
        with pytest.raises(InvalidParams, match="k: "):
            await client.search("c", [1.0], k=0)
        for unsendable in (
            {"lang": object()},
            {"lang": {"a"}},
            {"lang": float("nan")},
            {"lang": "a\0"},
            {1.5: 1},
            [1],
            "lang",
        ):
            with pytest.raises(InvalidFilter):
                await client.search("c", [1.0], filter=unsendable)  # type: ignore[arg-type]  # what a caller may do
        with pytest.raises(InvalidVector):
            await client.search("c", [float("nan")])
    async with serving(path) as service, AsyncClient(path) as client:
        del service
        with pytest.raises(RequestError, match="there is no method 'status'"):
            await client.status()


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


class EchoParams(messages.Params, frozen=True):
    value: int


def hold_call(value: int) -> calls.Call[int]:
    return calls.Call("hold", EchoParams(value=value), calls._decoder(int))


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


async def ping(client: Client | AsyncClient) -> str:
    return await run(client, calls.ping())


async def run(client: Client | AsyncClient, call: calls.Call[T]) -> T:
    if isinstance(client, AsyncClient):
        return await client.run(call)
    return await run_sync(client.run, call)


async def close(client: Client | AsyncClient) -> None:
    if isinstance(client, AsyncClient):
        await client.close()
    else:
        await run_sync(client.close)
