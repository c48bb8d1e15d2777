"""Clients of the listener that send noise or ask for too much: no other client notices them."""

from __future__ import annotations

import random
import struct
from contextlib import AsyncExitStack

import pytest

from syncd.pgwire.connection import READ_AHEAD_BYTES
from syncd.rpc.dispatch import Limits
from tests.unit.pgwire.sql_service import Raw, Service, framed, raw, serving, startup

pytestmark = pytest.mark.anyio
SEED = 20_261_128
TRIES = 120
SYNC = framed(b"S", b"")
GOOD = [
    framed(b"Q", b"SELECT key, distance FROM search('d', '[1,2]', k => 2)\0"),
    framed(b"Q", b"BEGIN; DECLARE c CURSOR FOR SELECT * FROM datasets(); FETCH 1 FROM c; COMMIT\0"),
    framed(b"P", b"s\0SELECT key FROM search($1, $2)\0\0\1\0\0\0\x19"),
    framed(b"B", b"p\0s\0\0\1\0\1\0\2\0\0\0\1d\0\0\0\3[1]\0\1\0\1"),
    framed(b"D", b"Ss\0"),
    framed(b"D", b"Pp\0"),
    framed(b"E", b"p\0\0\0\0\1"),
    framed(b"C", b"Pp\0"),
    framed(b"C", b"Ss\0"),
    framed(b"H", b""),
    framed(b"F", b"\0\0\0\0"),
    framed(b"d", b"x"),
    SYNC,
]


async def answers(client: Raw) -> bool:
    """Whether a connection still answers a search with rows."""
    client.write(GOOD[0])
    return b"D" in await client.until_ready()


def damaged(rng: random.Random) -> bytes:
    """Messages with changed bytes, in which the framing may be wrong as well."""
    data = bytearray(b"".join(rng.choices(GOOD, k=rng.randint(1, 6))))
    for _ in range(rng.randint(0, 4)):
        data[rng.randrange(len(data))] = rng.choice([0, 1, 4, 0x27, 0x7F, 0x80, 0xFF])
    return bytes(data[: rng.randint(1, len(data))] if rng.random() < 0.2 else data)


async def test_no_message_however_damaged_disturbs_another_client() -> None:
    rng = random.Random(SEED)
    ended = 0
    async with serving() as service, raw(service) as other:
        await other.log_in()
        for _ in range(TRIES):
            async with raw(service) as client:
                await client.log_in()
                client.write(damaged(rng))
                client.writer.write_eof()
                ended += b"Z" not in await client.until_ready()
            assert service.server.connections <= 3
        assert await answers(other)
        assert 0 < ended < TRIES


async def test_a_good_sequence_of_messages_has_exactly_these_answers() -> None:
    async with serving() as service, raw(service) as client:
        await client.log_in()
        client.write(b"".join(GOOD[2:7]) + GOOD[6] + GOOD[9] + b"".join(GOOD[7:9]) + SYNC)
        expected = [b"1", b"2", b"t", b"T", b"T", b"D", b"s", b"D", b"s", b"3", b"3", b"Z"]
        assert await client.until_ready() == expected
        client.write(GOOD[1])
        assert await client.until_ready() == [b"C", b"C", b"T", b"D", b"C", b"C", b"Z"]
        client.write(framed(b"Q", b" ; \0"))
        assert await client.until_ready() == [b"I", b"Z"]
        client.write(framed(b"E", b"p\0\0\0\0\0") + GOOD[0] + GOOD[2] + SYNC)
        assert await client.until_ready() == [b"E", b"Z"]  # skipped until Sync
        client.write(framed(b"B", b"\0s\0\0\0\0\0\0\0") + SYNC)
        assert await client.until_ready() == [b"E", b"Z"]


async def test_a_message_that_arrives_byte_by_byte_is_answered() -> None:
    async with serving() as service, raw(service) as client:
        await client.log_in()
        for byte in GOOD[0]:
            client.write(bytes([byte]))
            await client.writer.drain()
        assert b"D" in await client.until_ready()


async def test_a_huge_message_is_refused_before_it_arrives() -> None:
    async with serving(Limits(line_bytes=1000)) as service, raw(service) as client:
        await client.log_in()
        client.write(b"Q" + struct.pack("!I", 1 << 30) + b"x" * 10_000)
        assert await client.fatal() == "54000"


async def test_incomplete_messages_of_all_clients_together_are_bounded() -> None:
    async with (
        serving(Limits(held_bytes=100_000)) as service,
        raw(service) as one,
        raw(service) as two,
    ):
        await one.log_in()
        await two.log_in()
        one.write(b"Q" + struct.pack("!I", 1 << 20) + b"x" * 60_000)
        while service.dispatcher.held_bytes < 60_000:
            await service.turn()
        two.write(b"Q" + struct.pack("!I", 1 << 20) + b"x" * 60_000)
        assert await two.fatal() == "53000"


async def test_input_behind_a_running_statement_waits_in_the_clients_socket() -> None:
    async with serving() as service, raw(service) as client:
        await client.log_in()
        client.write(framed(b"Q", b"SELECT * FROM search('later', '[1]')\0"))
        await service.waiting.wait()
        client.write(GOOD[0] * 200_000)
        while service.dispatcher.held_bytes < READ_AHEAD_BYTES:
            await service.turn()
        for _ in range(50):
            await service.turn()
        assert service.dispatcher.held_bytes < READ_AHEAD_BYTES + (1 << 19)


async def test_hundreds_of_silent_connections_delay_no_client() -> None:
    async with serving(Limits(connections=300)) as service, AsyncExitStack() as stack:
        for _ in range(299):
            silent = await stack.enter_async_context(raw(service))
            silent.write(startup(user="u")[:5])
        client = await stack.enter_async_context(raw(service))
        await client.log_in()
        assert await answers(client)
        assert await beyond(service) == "53000"


async def test_clients_that_never_read_why_they_were_ended_keep_no_place() -> None:
    limits = Limits(connections=30, lingering=5, linger_seconds=60, authenticate_seconds=0.05)
    async with serving(limits) as service, AsyncExitStack() as stack:
        silent = [await stack.enter_async_context(raw(service)) for _ in range(30)]
        while service.server.connections > 5:
            await service.turn()
        await stack.enter_async_context(await service.connect())
        assert len(silent) == 30


async def beyond(service: Service) -> str:
    async with raw(service) as client:
        client.write(startup(user="u"))
        return await client.fatal()
