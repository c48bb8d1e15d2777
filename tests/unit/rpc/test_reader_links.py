"""A reader's links to the main process: one that is lost costs the requests on it, no others."""

from __future__ import annotations

import socket
from typing import Any

import anyio
import msgspec
import pytest

from syncd.errors import Overloaded
from syncd.readers.handing_over import HandingOver
from syncd.readers.link import CLIENT, open_link, take_links
from syncd.rpc.dispatch import Limits
from syncd.rpc.protocol import Request


async def asked(readers: HandingOver, client: object) -> dict[str, Any]:
    """The answer to a request that is handed over."""
    request = Request(b"7", "datasets", msgspec.Raw(b"{}"))
    line = await readers.finish(request, readers.start(request, 10, client))  # type: ignore[arg-type]
    assert line is not None
    answer: dict[str, Any] = msgspec.json.decode(line)
    return answer


def ends() -> tuple[socket.socket, socket.socket]:
    """The two ends of a reader's control socket."""
    mine, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    mine.setblocking(False)
    control.setblocking(False)
    return mine, control


async def main_end(control: socket.socket) -> socket.socket:
    await anyio.wait_readable(control)
    ((_, link),) = take_links(control)
    link.setblocking(False)
    return link


@pytest.mark.anyio
async def test_a_client_whose_link_was_lost_gets_another_one_for_its_next_request() -> None:
    mine, control = ends()
    readers, client = HandingOver({}, Limits(), mine), object()
    answers: list[dict[str, Any]] = []

    async def ask() -> None:
        answers.append(await asked(readers, client))

    with mine, control, anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            (await main_end(control)).close()
        assert "stopped" in answers[0]["error"]["message"]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            with await main_end(control) as link:
                await anyio.wait_readable(link)
                link.recv(1 << 16)
                link.sendall(b'{"jsonrpc":"2.0","id":1,"result":[]}\n')
                while len(answers) < 2:
                    await anyio.lowlevel.checkpoint()
        assert answers[1]["result"] == []
        readers.forget(client)


@pytest.mark.anyio
async def test_a_reader_without_memory_for_an_answer_says_so() -> None:
    mine, control = ends()
    with mine, control, anyio.fail_after(60):
        link = await open_link(mine, CLIENT)
        with await main_end(control):
            async with anyio.create_task_group() as tasks:

                async def lose() -> None:
                    link.connection_lost(MemoryError())

                tasks.start_soon(lose)
                with pytest.raises(Overloaded, match="too little memory") as raised:
                    await link.ask("datasets", b"")
            assert "ulimit -v" in raised.value.hint
            link.close()
