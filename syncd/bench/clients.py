"""Searching clients. Each runs in a process of its own, so that they do not wait for each other."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.synchronize import Barrier
from threading import BrokenBarrierError
from typing import Any

import numpy as np
import psycopg
from numpy.typing import NDArray

from syncd.bench.engines import Connected, Engine
from syncd.errors import SyncdError

START_SECONDS = 60.0
MOST_OPEN = 80
"""Engines that all clients together keep open, but one each at least.

PostgreSQL has 100 connections by default, and a search of pgvector with another setting takes
another one.
"""
OTHER_FAILED = "another client did not begin"
ANSWERS_SECONDS = 20.0
"""Time for the queries of one recall measurement.

A slow engine answers only some of the queries in this time; its recall is measured on those.
"""


@dataclass(frozen=True, slots=True)
class Work:
    """Work of one client: search the queries ``numbers``, once or repeatedly.

    It ends after ``seconds`` at the latest.
    """

    engine: Engine
    numbers: Sequence[int]
    once: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Served:
    """Result of one client: seconds per search; for ``once``, query numbers and answers as well."""

    numbers: list[int]
    latencies: list[float]
    answers: list[list[int]]
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Timing:
    """Result of several clients together."""

    latencies: NDArray[np.float64]
    qps: float
    seconds: float
    """Sum over the clients."""
    cpu_seconds: float
    """CPU seconds of the clients' own processes, in user and in system mode."""
    clients: int

    @property
    def share(self) -> float:
        """Share of the processor that the clients took; one client has one core at most."""
        elapsed = self.seconds / self.clients
        return self.cpu_seconds / (elapsed * min(self.clients, os.cpu_count() or 1))


class Clients:
    """Running clients: each connection is open and warm after its first search."""

    def __init__(self, pipes: Sequence[Connection], queries: range) -> None:
        self.pipes = pipes
        self.queries = queries
        """Numbers of the queries that the clients search."""

    def asking(self, queries: range) -> Clients:
        """The same clients, for these queries."""
        return Clients(self.pipes, queries)

    @property
    def number(self) -> int:
        """Number of clients."""
        return len(self.pipes)

    def answers(self, engine: Engine) -> tuple[list[int], list[list[int]]]:
        """Search every query once; returns the searched numbers and the answers."""
        for client, pipe in enumerate(self.pipes):
            pipe.send(Work(engine, self.queries[client :: self.number], True, ANSWERS_SECONDS))
        served = self.receive()
        numbers = [number for one in served for number in one.numbers]
        return numbers, [keys for one in served for keys in one.answers]

    def search(self, engine: Engine, seconds: float) -> Timing:
        """Search for ``seconds``, one query after the other; each client begins elsewhere."""
        self.start(engine, seconds)
        return self.finish()

    def start(self, engine: Engine, seconds: float) -> None:
        """``search``, without waiting for the end."""
        for client, pipe in enumerate(self.pipes):
            begin = client * len(self.queries) // self.number
            pipe.send(Work(engine, [*self.queries[begin:], *self.queries[:begin]], False, seconds))

    def finish(self) -> Timing:
        """Wait for the end; returns the result since ``start``."""
        served = self.receive()
        latencies = np.concatenate([one.latencies for one in served])
        return Timing(
            latencies,
            sum(len(one.latencies) / one.seconds for one in served),
            sum(one.seconds for one in served),
            sum(one.cpu_seconds for one in served),
            len(served),
        )

    def receive(self) -> list[Served]:
        """One result per client; raises ``SyncdError`` if a client failed."""
        results: list[Served | str] = []
        for pipe in self.pipes:
            try:
                results.append(pipe.recv())
            except (EOFError, ConnectionError):
                results.append("its process ended")
        reasons = [result for result in results if isinstance(result, str)]
        if reasons:  # prefer one that is not the consequence of another client's failure
            raise SyncdError(f"a searching client failed: {min(reasons, key=OTHER_FAILED.__eq__)}")
        return [result for result in results if isinstance(result, Served)]


@contextmanager
def clients(
    number: int, queries: NDArray[np.float32], together: int | None = None
) -> Iterator[Clients]:
    """Start the processes; they end with the block.

    ``together`` is the number of clients that run at that time, these and others.
    """
    most_open = max(MOST_OPEN // (together or number), 1)
    context = process_context()
    barrier = context.Barrier(number)
    pipes, processes = [], []
    try:
        for _ in range(number):
            mine, theirs = context.Pipe()
            pipes.append(mine)
            process = context.Process(
                target=serve, args=(theirs, barrier, queries, most_open), daemon=True
            )
            process.start()
            processes.append(process)
            theirs.close()
        yield Clients(pipes, range(len(queries)))
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        for pipe in pipes:
            pipe.close()


def serve(pipe: Connection, barrier: Barrier, queries: NDArray[np.float32], most_open: int) -> None:
    """Run in a client's process: do one piece of work after the other, until the pipe is closed."""
    leave_ctrl_c_to_the_parent()
    opened: dict[Engine, tuple[ExitStack, Connected[Any]]] = {}  # the last used one at the end
    while True:
        try:
            work: Work = pipe.recv()
        except EOFError:
            return
        try:
            if work.engine in opened:
                opened[work.engine] = opened.pop(work.engine)
            else:
                while len(opened) >= most_open:
                    opened.pop(next(iter(opened)))[0].close()
                stack = ExitStack()
                opened[work.engine] = stack, stack.enter_context(work.engine.open())
            connected = opened[work.engine][1]
            requests = [connected.request(queries[number]) for number in work.numbers]
            barrier.wait(START_SECONDS)
            pipe.send(run(work, connected, requests))
        except BrokenBarrierError:
            pipe.send(OTHER_FAILED)
        except (SyncdError, psycopg.Error) as error:
            barrier.abort()
            pipe.send(str(error))


def run(work: Work, connected: Connected[Any], requests: list[bytes]) -> Served:
    """Search and measure; answers are kept and decoded only if each query is searched once."""
    ask, clock = connected.ask, time.perf_counter
    latencies, answers = [], []
    used = cpu_seconds()
    begun = before = clock()
    for request in requests if work.once else itertools.cycle(requests):
        answer = ask(request)
        now = clock()
        latencies.append(now - before)
        if work.once:
            answers.append(answer)
        before = now
        if now - begun > work.seconds:
            break
    used = cpu_seconds() - used
    return Served(
        [*work.numbers[: len(answers)]],
        latencies,
        [connected.keys(answer) for answer in answers],
        before - begun,
        used,
    )


def cpu_seconds() -> float:
    """CPU seconds that this process has used, in user and in system mode."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def process_context() -> ForkServerContext:
    """A context whose processes start with this module in memory.

    A process that imports the whole program takes a second to start.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["syncd.bench.environment", __name__])
    return context


def leave_ctrl_c_to_the_parent() -> None:
    """Ignore Ctrl-C in this process: the parent ends it, and cleans up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
