"""A server whose methods wait for the test, and a client that sends raw lines."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio

from syncd.protocol.messages import Params
from syncd.rpc.dispatch import Limits
from syncd.rpc.protocol import Method
from syncd.rpc.server import Server

READ_LIMIT = 64 << 20
SHARED_WORD = "secret-ü"
TEST_SECONDS = 60
ANYTHING: Any = Any


class AnyParams(Params, frozen=True):
    value: Any = None


class Service:
    """A running server. ``started`` counts calls of ``hold``, ``ended`` those that are over."""

    def __init__(
        self, path: Path, *, tcp: bool, limits: Limits, methods: dict[str, Method[Any, Any]]
    ) -> None:
        own: dict[str, Method[Any, Any]] = {
            "echo": Method(AnyParams, ANYTHING, self.echo, "Give the value back."),
            "hold": Method(
                AnyParams, ANYTHING, self.hold, "Wait for the test, then give the value back."
            ),
            "fail": Method(AnyParams, ANYTHING, self.fail, "Raise."),
            "spin": Method(
                AnyParams, ANYTHING, self.spin, "Keep the loop busy for this many seconds."
            ),
            "big": Method(AnyParams, str, self.big, "This many bytes."),
        }
        self.path = path
        self.server = Server(
            own | methods,
            socket=path,
            listen="127.0.0.1:0" if tcp else None,
            token=SHARED_WORD if tcp else None,
            limits=limits,
            version="test",
        )
        self.release = anyio.Event()
        self.echoed: list[object] = []
        self.started = self.ended = self.spun = self.big_calls = 0
        self.changed = anyio.Event()
        self.stopped = anyio.Event()
        self.scope = anyio.CancelScope()

    @property
    def tcp(self) -> tuple[str, int]:
        return self.server.tcp_addresses[0]

    def echo(self, params: AnyParams) -> object:
        self.echoed.append(params.value)
        self.change()
        return params.value

    async def hold(self, params: AnyParams) -> object:
        self.started += 1
        self.change()
        try:
            await self.release.wait()
        finally:
            self.ended += 1
            self.change()
        return params.value

    def fail(self, params: AnyParams) -> object:
        raise RuntimeError(f"a fault of syncd's own: {params.value}")

    def spin(self, params: AnyParams) -> object:
        until = time.perf_counter() + params.value
        while time.perf_counter() < until:
            pass
        self.spun += 1
        return None

    def big(self, params: AnyParams) -> str:
        self.big_calls += 1
        return "x" * int(params.value)

    def change(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()

    async def until(self, *, started: int = 0, ended: int = 0, echoed: int = 0) -> None:
        while self.started < started or self.ended < ended or len(self.echoed) < echoed:
            await self.changed.wait()

    async def run(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        with self.scope:
            await self.server.serve(task_status=task_status)
        self.stopped.set()

    def cancel(self) -> None:
        self.scope.cancel()


@asynccontextmanager
async def serving(
    path: Path,
    *,
    tcp: bool = False,
    limits: Limits | None = None,
    methods: dict[str, Method[Any, Any]] | None = None,
) -> AsyncIterator[Service]:
    """A server for the duration of a test; connections still open at its end are cut off."""
    service = Service(path, tcp=tcp, limits=limits or Limits(), methods=methods or {})
    with anyio.fail_after(TEST_SECONDS):
        async with anyio.create_task_group() as tasks:
            await tasks.start(service.run)
            yield service
            tasks.cancel_scope.cancel()


class Lines:
    """A client of raw lines."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, method: str, request_id: object = None, **params: object) -> None:
        message: dict[str, object] = {"jsonrpc": "2.0", "method": method, "params": params}
        if request_id is not None:
            message["id"] = request_id
        self.write(json.dumps(message).encode() + b"\n")

    def write(self, data: bytes) -> None:
        self.writer.write(data)

    async def receive(self) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(await self.reader.readuntil(b"\n"))
        return answer

    async def ask(self, method: str, request_id: object = 1, **params: object) -> dict[str, Any]:
        self.send(method, request_id, **params)
        return await self.receive()

    async def is_closed(self) -> bool:
        """Wait for the end of the connection, and return whether no byte came before it."""
        try:
            return await self.reader.read(1) == b""
        except ConnectionError:
            return True


@asynccontextmanager
async def lines_to(address: Path | tuple[str, int]) -> AsyncIterator[Lines]:
    """A connection, closed at the end of the block."""
    if isinstance(address, Path):
        reader, writer = await asyncio.open_unix_connection(address, limit=READ_LIMIT)
    else:
        reader, writer = await asyncio.open_connection(*address, limit=READ_LIMIT)
    try:
        yield Lines(reader, writer)
    finally:
        writer.transport.abort()
        with anyio.CancelScope(shield=True):
            await anyio.lowlevel.checkpoint()
