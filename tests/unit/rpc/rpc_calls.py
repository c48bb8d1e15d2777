"""Calls of the methods of ``rpc_service``, by clients of either kind."""

from __future__ import annotations

from typing import TypeVar

from anyio.to_thread import run_sync

from syncd.client import calls
from syncd.client.async_client import AsyncClient
from syncd.client.client import Client
from syncd.protocol import messages

T = TypeVar("T")


class EchoParams(messages.Params, frozen=True):
    value: int


def hold_call(value: int) -> calls.Call[int]:
    return calls.Call("hold", EchoParams(value=value), calls._decoder(int))


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
