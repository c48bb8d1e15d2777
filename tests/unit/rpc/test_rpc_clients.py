"""Calls of both clients: methods, parameters, results, and errors by their kind."""

from __future__ import annotations

import copy
import inspect
import threading
from pathlib import Path
from typing import Any, TypeVar

import anyio
import numpy as np
import pytest
from anyio.to_thread import run_sync
from msgspec import UNSET

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
    SyncdError,
    TimedOut,
    TooLarge,
    UnknownDataset,
    UnknownKey,
)
from syncd.protocol import messages, status_messages
from syncd.protocol.messages import WirePosition
from syncd.protocol.wire import vector_from_wire
from syncd.rpc.protocol import Method
from tests.unit.rpc.rpc_service import serving

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
    """Methods with fixed answers, and the parameters that they were called with."""

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
                messages.NoParams, list[status_messages.DatasetStatus], self.datasets, "List."
            ),
            "status": Method(
                messages.NoParams, status_messages.ServiceStatus, self.status, "Show."
            ),
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

    def datasets(self, _: messages.NoParams) -> list[status_messages.DatasetStatus]:
        return [
            status_messages.DatasetStatus(
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

    def status(self, _: messages.NoParams) -> status_messages.ServiceStatus:
        return status_messages.ServiceStatus(
            version="1",
            consumer="default",
            state="ready",
            position=POSITION,
            lag_rows=0,
            lag_seconds=0.0,
            listener_connected=True,
            checkpoint=status_messages.CheckpointStatus(),
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


async def test_the_service_gets_the_parameters_that_a_client_is_given(path: Path) -> None:
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
            partial="allow",
            at="cut",
        )
        asked = library.asked.pop()
        assert isinstance(asked, messages.SearchParams)
        assert (asked.partial, asked.at) == ("allow", "cut")
        assert vector_from_wire(asked.vector or b"").tolist() == [1.0]
        assert (asked.k, asked.recall, asked.exact, asked.max_distance) == (3, 0.9, True, 0.5)
        assert (asked.consistency, asked.after, asked.timeout_ms) == ("strong", "7", 100)
        numpy_integer: Any = np.int64(5)
        await client.get("c", [2**53 + 1, numpy_integer, (1, "a")])
        asked = library.asked.pop()
        assert isinstance(asked, messages.GetParams)
        assert asked.keys == [str(2**53 + 1), 5, [1, "a"]]
        assert (asked.partial, asked.at) == ("refuse", None)
        await client.get("c", [1], partial="allow", at=POSITION)
        asked = library.asked.pop()
        assert isinstance(asked, messages.GetParams)
        assert (asked.partial, asked.at) == ("allow", POSITION)


async def test_an_answer_is_a_list_that_says_what_it_covers(path: Path) -> None:
    old = messages.WirePosition("5:5:", 1)
    covers = {"0/3": POSITION, "1/3": old}, 0.66, [messages.MissingShard("2/3", "gone")]
    found = messages.SearchResult([7], [0.5], old, 1.5, UNSET, *covers)
    many = messages.SearchResult([[7], []], [[0.5], []], old, 1.5, UNSET, *covers)
    page = messages.KeysResult([7], None, *covers)
    library = Library()
    methods = library.methods() | {
        "search": Method(
            messages.SearchParams,
            messages.SearchResult,
            lambda params: found if params.vectors is None else many,
            "",
        ),
        "get": Method(
            messages.GetParams,
            messages.GetResult,
            lambda _: messages.GetResult([messages.WireRow(7)], *covers),
            "",
        ),
        "keys": Method(messages.KeysParams, messages.KeysResult, lambda _: page, ""),
    }
    async with serving(path, methods=methods), AsyncClient(path) as client:
        hits = await client.search("c", [1.0])
        lists = await client.search("c", vectors=[[1.0], [2.0]])
        rows = await client.get("c", [7])
        assert (hits, lists) == ([Hit(7, 0.5)], [[Hit(7, 0.5)], []])
        assert hits.lag_seconds == 1.5
        for one in (hits, lists, rows, await client.keys_page("c", partial="allow")):
            assert (one.positions, one.coverage, list(one.missing)) == covers
        assert hits.position == lists.position == rows.position == old
        copied = copy.deepcopy(hits)
        assert (copied, copied.missing) == (hits, hits.missing)


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
                await client.search("c", [1.0], filter=unsendable)  # type: ignore[arg-type]
        with pytest.raises(InvalidVector):
            await client.search("c", [float("nan")])
    async with serving(path) as service, AsyncClient(path) as client:
        del service
        with pytest.raises(RequestError, match="there is no method 'status'"):
            await client.status()
