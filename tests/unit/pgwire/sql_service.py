"""A listener for PostgreSQL clients whose searches wait for the test."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import struct
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import psycopg
from anyio.abc import TaskStatus
from psycopg.rows import TupleRow

from syncd.errors import UnknownDataset
from syncd.pgwire.scram import prepared
from syncd.pgwire.server import SqlServer
from syncd.protocol import status_messages
from syncd.protocol.messages import NoParams, SearchParams, SearchResult, WirePosition
from syncd.rpc.dispatch import Dispatcher, Limits
from syncd.rpc.protocol import Method

WORD = "secret-\u00fc\ufb01"
TEST_SECONDS = 60
POSITION = WirePosition("10:10:", 1)
DATASET = status_messages.DatasetStatus(
    dataset="default/chunks",
    source="public.chunks",
    state="ready",
    count=3,
    tombstones=0,
    dim=2,
    metric="l2",
    index="exact",
    recall=None,
    verified=True,
    bytes=1 << 40,
    lag_seconds=0.25,
)


class Service:
    """A running listener. ``asked`` has the parameters of each search."""

    def __init__(self, limits: Limits, tls: tuple[Path, Path] | None) -> None:
        methods: dict[str, Method[Any, Any]] = {
            "search": Method(SearchParams, SearchResult, self.search, "The nearest rows."),
            "datasets": Method(NoParams, list[Any], lambda _: [DATASET], "", immediate=True),
        }
        self.dispatcher = Dispatcher(methods, limits)
        self.server = SqlServer(self.dispatcher, listen="127.0.0.1:0", token=WORD, tls=tls)
        self.asked: list[SearchParams] = []
        self.release = anyio.Event()
        self.waiting = anyio.Event()
        self.gone = anyio.Event()
        self.stopped = anyio.Event()
        self.keys: list[Any] = [7, "\u00e4", [1, "a"]]

    @property
    def port(self) -> int:
        return self.server.tcp_addresses[0][1]

    def search(self, params: SearchParams) -> SearchResult | Awaitable[SearchResult]:
        self.asked.append(params)
        if params.dataset == "nope":
            raise UnknownDataset(params.dataset)
        if params.dataset == "broken":
            raise RuntimeError("a fault of syncd's own")
        return self.later() if params.dataset == "later" else self.result(params.k)

    def result(self, k: int) -> SearchResult:
        keys = self.keys[:k]
        return SearchResult(keys, [place + 0.5 for place in range(len(keys))], POSITION, 0.0)

    async def later(self) -> SearchResult:
        self.waiting.set()
        try:
            await self.release.wait()
        finally:
            self.gone.set()
        return self.result(10)

    async def turn(self) -> None:
        """Let the service's loop take one turn."""
        await anyio.lowlevel.checkpoint()

    def conninfo(self, **more: Any) -> dict[str, Any]:
        given = {"host": "127.0.0.1", "port": self.port, "user": "anyone", "password": WORD}
        return given | {"dbname": "any", "sslmode": "disable", "connect_timeout": 10} | more

    async def connect(self, **more: Any) -> psycopg.AsyncConnection[TupleRow]:
        autocommit = more.pop("autocommit", True)
        return await psycopg.AsyncConnection.connect(**self.conninfo(**more), autocommit=autocommit)


@asynccontextmanager
async def serving(
    limits: Limits | None = None, tls: tuple[Path, Path] | None = None
) -> AsyncIterator[Service]:
    """A listener for the duration of a test."""
    service = Service(limits or Limits(), tls)
    with anyio.fail_after(TEST_SECONDS):
        async with anyio.create_task_group() as tasks:

            async def run(*, task_status: TaskStatus[None]) -> None:
                await service.server.serve(task_status=task_status)
                service.stopped.set()

            await tasks.start(run)
            yield service
            tasks.cancel_scope.cancel()
    assert service.dispatcher.held_bytes == 0
    assert service.dispatcher.requests == 0


class Raw:
    """A client that sends bytes and reads whole messages."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def write(self, data: bytes) -> None:
        self.writer.write(data)

    async def message(self) -> tuple[bytes, bytes]:
        """The next message: its type and its payload."""
        kind = await self.reader.readexactly(1)
        (length,) = struct.unpack("!I", await self.reader.readexactly(4))
        return kind, await self.reader.readexactly(length - 4)

    async def log_in(self) -> None:
        """Log in by SCRAM-SHA-256, as RFC 5802 describes the client's side."""
        self.write(startup(user="u"))
        await self.message()
        first = b"n=,r=nonce"
        named = b"SCRAM-SHA-256\0" + struct.pack("!I", len(first) + 3) + b"n,," + first
        self.write(framed(b"p", named))
        _, payload = await self.message()
        parts = dict(part.split(b"=", 1) for part in payload[4:].split(b","))
        salt, rounds = base64.b64decode(parts[b"s"]), int(parts[b"i"])
        salted = hashlib.pbkdf2_hmac("sha256", prepared(WORD), salt, rounds)
        key = hmac.digest(salted, b"Client Key", "sha256")
        final = b"c=biws,r=" + parts[b"r"]
        signed = b",".join((first, payload[4:], final))
        signature = hmac.digest(hashlib.sha256(key).digest(), signed, "sha256")
        proof = bytes(a ^ b for a, b in zip(key, signature, strict=True))
        self.write(framed(b"p", final + b",p=" + base64.b64encode(proof)))
        while (await self.message())[0] != b"Z":
            pass

    async def until_ready(self) -> list[bytes]:
        """Types of all messages up to ReadyForQuery, or to the end of the connection."""
        kinds: list[bytes] = []
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while kinds[-1:] != [b"Z"]:
                kinds.append((await self.message())[0])
        return kinds

    async def fatal(self) -> str:
        """SQLSTATE of the error with which the connection ends."""
        while True:
            kind, payload = await self.message()
            if kind == b"E":
                fields = {part[:1]: part[1:] for part in payload.split(b"\0") if part}
                assert fields[b"S"] == b"FATAL"
                assert await self.reader.read() == b""
                return fields[b"C"].decode()


@asynccontextmanager
async def raw(service: Service) -> AsyncIterator[Raw]:
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    try:
        yield Raw(reader, writer)
    finally:
        writer.close()


def startup(code: int = 0x30000, **parameters: str) -> bytes:
    """A startup packet."""
    pairs = b"".join(
        name.encode() + b"\0" + value.encode() + b"\0" for name, value in parameters.items()
    )
    return struct.pack("!II", len(pairs) + 9, code) + pairs + b"\0"


def framed(kind: bytes, payload: bytes) -> bytes:
    """A message."""
    return kind + struct.pack("!I", len(payload) + 4) + payload
