"""Searches in worker threads: a lone one starts at once, and waiting ones go together.

A search is refused at once or not at all, and no search is lost.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import anyio
import anyio.lowlevel
import pytest
from anyio import create_task_group, fail_after, to_thread

from syncd.errors import Overloaded
from syncd.rpc.search_queue import BATCH_QUERIES, SearchQueue

pytestmark = pytest.mark.anyio
LONG = 60.0


@dataclass(frozen=True)
class Search:
    name: str
    together_with: object = "one dataset"
    cost: int = 1
    query_count: int = 1


class Threads:
    """Batches that last until the test lets them go."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.begun = threading.Semaphore(0)
        self.go = threading.Semaphore(0)

    def run(self, searches: Sequence[Search]) -> list[str | Exception]:
        self.batches.append([each.name for each in searches])
        self.begun.release()
        assert self.go.acquire(timeout=LONG)
        return [
            ValueError(each.name) if each.name == "bad" else each.name.upper() for each in searches
        ]

    async def until_begun(self) -> None:
        assert await to_thread.run_sync(self.begun.acquire, True, LONG / 2)


@pytest.fixture
def threads() -> Iterator[Threads]:
    it = Threads()
    yield it
    it.go.release(100)


async def test_waiting_searches_go_together_once_a_thread_is_free(threads: Threads) -> None:
    queue: SearchQueue[Search, str] = SearchQueue(1, threads.run)
    answers: list[str] = []

    async def ask(search: Search) -> None:
        answers.append(await queue.run(search, LONG))

    with fail_after(LONG):
        async with create_task_group() as tasks:
            tasks.start_soon(ask, Search("first"))
            await threads.until_begun()
            for search in (
                Search("a"),
                Search("alone", None),
                Search("b"),
                Search("other", "another dataset"),
                Search("c"),
            ):
                tasks.start_soon(ask, search)
            await anyio.wait_all_tasks_blocked()
            threads.go.release(4)
    assert threads.batches == [["first"], ["a", "b", "c"], ["alone"], ["other"]]
    assert sorted(answers) == ["A", "ALONE", "B", "C", "FIRST", "OTHER"]


async def test_searches_start_at_once_up_to_the_number_of_threads(threads: Threads) -> None:
    queue: SearchQueue[Search, str] = SearchQueue(2, threads.run)
    with fail_after(LONG):
        async with create_task_group() as tasks:
            for name in ("a", "b"):
                tasks.start_soon(queue.run, Search(name), LONG)
            await threads.until_begun()
            await threads.until_begun()
            threads.go.release(2)
    assert sorted(threads.batches) == [["a"], ["b"]]


async def test_a_batch_has_a_limit(threads: Threads) -> None:
    queue: SearchQueue[Search, str] = SearchQueue(1, threads.run)
    with fail_after(LONG):
        async with create_task_group() as tasks:
            tasks.start_soon(queue.run, Search("first"), LONG)
            await threads.until_begun()
            for number in range(3):
                tasks.start_soon(
                    queue.run, Search(str(number), query_count=BATCH_QUERIES // 2), LONG
                )
            await anyio.wait_all_tasks_blocked()
            threads.go.release(3)
    assert threads.batches == [["first"], ["0", "1"], ["2"]]


async def test_an_error_is_that_of_its_own_search(threads: Threads) -> None:
    queue: SearchQueue[Search, str] = SearchQueue(1, threads.run)
    errors: list[str] = []

    async def ask(name: str) -> None:
        try:
            assert await queue.run(Search(name), LONG) == name.upper()
        except ValueError as error:
            errors.append(str(error))

    with fail_after(LONG):
        async with create_task_group() as tasks:
            tasks.start_soon(ask, "first")
            await threads.until_begun()
            for name in ("a", "bad", "b"):
                tasks.start_soon(ask, name)
            await anyio.wait_all_tasks_blocked()
            threads.go.release(2)
    assert errors == ["bad"]


async def test_a_search_that_would_be_answered_too_late_is_refused_at_once(
    threads: Threads,
) -> None:
    queue: SearchQueue[Search, str] = SearchQueue(1, threads.run)
    with fail_after(LONG):
        async with create_task_group() as tasks:
            tasks.start_soon(queue.run, Search("an hour", cost=10**14), LONG)
            await threads.until_begun()
            refused = False
            with anyio.CancelScope() as at_once:
                at_once.cancel()  # a search that begins to wait is cancelled
                try:
                    await queue.run(Search("late"), LONG)
                except Overloaded:
                    refused = True
            assert refused
            threads.go.release(1)
        threads.go.release(1)
        assert await queue.run(Search("later"), LONG) == "LATER"
    assert threads.batches == [["an hour"], ["later"]]


async def test_a_search_whose_client_is_gone_is_not_searched_and_delays_no_other(
    threads: Threads,
) -> None:
    queue: SearchQueue[Search, str] = SearchQueue(1, threads.run)
    with fail_after(LONG):
        async with create_task_group() as tasks:
            tasks.start_soon(queue.run, Search("first"), LONG)
            await threads.until_begun()
            async with create_task_group() as impatient:
                impatient.start_soon(queue.run, Search("gone", None), LONG)
                await anyio.wait_all_tasks_blocked()
                impatient.cancel_scope.cancel()
            tasks.start_soon(queue.run, Search("next"), LONG)
            await anyio.wait_all_tasks_blocked()
            threads.go.release(3)
        assert await queue.run(Search("last"), LONG) == "LAST"
    assert threads.batches == [["first"], ["next"], ["last"]]


@pytest.mark.parametrize("moments", range(4))
async def test_a_search_that_is_cancelled_when_its_turn_comes_delays_no_other(
    threads: Threads, moments: int
) -> None:
    queue: SearchQueue[Search, str] = SearchQueue(1, threads.run)
    leaving = anyio.CancelScope()
    answers: list[str] = []

    async def first() -> None:
        await queue.run(Search("first"), LONG)
        for _ in range(moments):
            await anyio.lowlevel.checkpoint()
        leaving.cancel()

    async def leader() -> None:
        with leaving:
            await queue.run(Search("leader"), LONG)

    async def follower() -> None:
        answers.append(await queue.run(Search("follower"), LONG))

    with fail_after(LONG):
        async with create_task_group() as tasks:
            tasks.start_soon(first)
            await threads.until_begun()
            for task in (leader, follower):
                tasks.start_soon(task)
                await anyio.wait_all_tasks_blocked()
            threads.go.release(9)
        assert answers == ["FOLLOWER"]
        assert await queue.run(Search("last"), LONG) == "LAST"


async def test_a_search_that_is_cancelled_at_the_moment_of_its_turn_passes_the_turn_on(
    threads: Threads,
) -> None:
    leaving = anyio.CancelScope()

    class Queue(SearchQueue[Search, str]):
        def _next_turn(self) -> None:
            leaving.cancel()
            super()._next_turn()

    queue = Queue(1, threads.run)

    async def leave() -> None:
        with leaving:
            await queue.run(Search("leaver", None), LONG)

    with fail_after(LONG):
        async with create_task_group() as tasks:
            tasks.start_soon(queue.run, Search("first"), LONG)
            await threads.until_begun()
            tasks.start_soon(leave)
            await anyio.wait_all_tasks_blocked()
            threads.go.release(2)
        assert await queue.run(Search("last"), LONG) == "LAST"
    assert threads.batches == [["first"], ["last"]]
