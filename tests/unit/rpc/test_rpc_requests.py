from __future__ import annotations

import json
import random
from pathlib import Path

import anyio
import pytest
from structlog.testing import capture_logs

from syncd.rpc.dispatch import Limits
from syncd.rpc.protocol import Method
from tests.unit.rpc.rpc_service import ANYTHING, SHARED_WORD, AnyParams, lines_to, serving

pytestmark = pytest.mark.anyio
SEED = 7


async def test_ping_authenticate_and_discover_are_there_without_being_asked_for(path: Path) -> None:
    async with serving(path), lines_to(path) as client:
        assert await client.ask("ping") == {"jsonrpc": "2.0", "id": 1, "result": "pong"}
        assert (await client.ask("authenticate", token=SHARED_WORD))["result"] is True
        names = [
            method["name"] for method in (await client.ask("rpc.discover"))["result"]["methods"]
        ]
        assert names == [
            "authenticate",
            "big",
            "echo",
            "fail",
            "hold",
            "ping",
            "rpc.discover",
            "spin",
        ]


async def test_an_unknown_method_and_a_wrong_parameter_fail_alone(path: Path) -> None:
    async with serving(path), lines_to(path) as client:
        unknown = await client.ask("x" * 5000, "a")
        assert (unknown["id"], unknown["error"]["code"]) == ("a", -32601)
        assert len(unknown["error"]["message"]) < 200
        wrong = await client.ask("ping", "b", colour="red")
        assert (wrong["id"], wrong["error"]["code"]) == ("b", -32602)
        assert "colour" in wrong["error"]["message"]
        assert (await client.ask("ping"))["result"] == "pong"


async def test_a_method_that_raises_is_an_internal_error_with_a_traceback_in_the_log(
    path: Path,
) -> None:
    async def fail_later(_: AnyParams) -> None:
        await anyio.lowlevel.checkpoint()
        raise KeyError("inside")

    def unspeakable(_: AnyParams) -> object:
        return object()

    methods = {
        "fail_later": Method(AnyParams, ANYTHING, fail_later, "Raise after a while."),
        "unspeakable": Method(AnyParams, ANYTHING, unspeakable, "A result that is not JSON."),
    }
    async with serving(path, methods=methods), lines_to(path) as client:
        with capture_logs() as logs:
            for method in ("fail", "fail_later", "unspeakable"):
                answer = await client.ask(method, method)
                assert answer["id"] == method
                assert answer["error"]["code"] == -32000
                assert answer["error"]["data"]["kind"] == "internal_error"
        assert [(log["event"], log["method"]) for log in logs] == [
            ("request_failed", method) for method in ("fail", "fail_later", "unspeakable")
        ]
        assert (await client.ask("ping"))["result"] == "pong"


async def test_a_notification_is_executed_and_never_answered(path: Path) -> None:
    async with serving(path) as service, lines_to(path) as client:
        service.release.set()
        with capture_logs() as logs:
            for method in ("echo", "hold", "fail", "no such method"):
                client.send(method, None, value=1)
            await service.until(echoed=1, ended=1)
            assert (await client.ask("ping", 5))["id"] == 5
        assert [log["method"] for log in logs] == ["fail"]
        client.write(b'{"jsonrpc":"2.0","method":"ping","id":null}\n')
        assert await client.receive() == {"jsonrpc": "2.0", "id": None, "result": "pong"}


async def test_a_notification_runs_to_its_end_although_its_client_is_gone(path: Path) -> None:
    async with serving(path) as service:
        async with lines_to(path) as client:
            client.send("hold", None)
            await service.until(started=1)
        async with lines_to(path) as other:
            assert (await other.ask("ping"))["result"] == "pong"
        assert service.ended == 0
        service.release.set()
        await service.until(ended=1)


async def test_answers_of_pipelined_requests_come_as_they_are_ready(path: Path) -> None:
    async with serving(path) as service, lines_to(path) as client:
        client.send("hold", "slow", value=1)
        for number in range(200):
            client.send("echo", number, value=number)
        for number in range(200):
            assert (await client.receive())["id"] == number
        service.release.set()
        assert await client.receive() == {"jsonrpc": "2.0", "id": "slow", "result": 1}


async def test_a_request_may_come_in_any_pieces_and_between_blank_lines(path: Path) -> None:
    line = json.dumps(
        {"jsonrpc": "2.0", "id": 1, "method": "echo", "params": {"value": "é" * 20}}
    ).encode()
    async with serving(path) as service, lines_to(path) as client:
        for byte in b"\n \r\n\t\n" + line + b"\r\n\n":
            client.write(bytes([byte]))
            await anyio.lowlevel.checkpoint()
        assert (await client.receive())["result"] == "é" * 20
        client.write(line[:10])
        async with lines_to(path) as other:  # half a request delays no other client
            assert (await other.ask("ping"))["result"] == "pong"
        client.write(line[10:] + b"\n" + line[:10])
        assert (await client.receive())["result"] == "é" * 20
        client.write(line[10:] + b"\n")
        assert (await client.receive())["result"] == "é" * 20
        assert service.server.dispatcher.held_bytes == 0


async def test_requests_before_the_end_of_input_are_answered_also_without_a_last_newline(
    path: Path,
) -> None:
    async with serving(path) as service, lines_to(path) as client:
        client.send("hold", 1, value="late")
        client.write(b'{"jsonrpc":"2.0","method":"ping","id":2}')
        client.writer.write_eof()
        assert (await client.receive())["id"] == 2
        service.release.set()
        assert (await client.receive())["result"] == "late"
        assert await client.is_closed()


async def test_no_fuzzed_line_disturbs_its_own_or_another_connection(path: Path) -> None:
    rng = random.Random(SEED)
    seed = b'{"jsonrpc":"2.0","method":"echo","id":1,"params":{"value":[1,"a",null]}}'
    async with serving(path) as service, lines_to(path) as client, lines_to(path) as other:
        for _ in range(60):
            lines = []
            for _ in range(20):
                line = bytearray(seed)
                for _ in range(rng.randint(0, 5)):
                    line[rng.randrange(len(line))] = rng.randrange(256)
                lines.append(bytes(line).replace(b"\n", b" "))
            client.write(b"\n".join(lines) + b'\n{"jsonrpc":"2.0","method":"ping","id":"end"}\n')
            while (await client.receive()).get("id") != "end":
                pass
            assert (await other.ask("ping"))["result"] == "pong"
        assert service.server.connections == 2
        assert service.server.dispatcher.requests == 0


@pytest.mark.parametrize("last", [b"", b'{"jsonrpc":"2.0","meth'])
async def test_a_client_that_vanishes_cancels_the_calls_that_it_waited_for(
    path: Path, last: bytes
) -> None:
    async with serving(path) as service:
        async with lines_to(path) as client:
            for number in range(5):
                client.send("hold", number)
            client.write(last)
            await service.until(started=5)
        await service.until(ended=5)
        async with lines_to(path) as other:
            assert (await other.ask("ping"))["result"] == "pong"
            assert service.server.connections == 1
        assert service.server.dispatcher.requests == 0
        assert service.server.dispatcher.held_bytes == 0


async def test_a_client_that_vanishes_with_answers_pending_costs_nothing(path: Path) -> None:
    async with serving(path) as service, lines_to(path) as other:
        async with lines_to(path) as client:
            for number in range(20):
                client.send("big", number, value=1_000_000)
            await client.receive()
        while service.server.connections > 1:
            assert (await other.ask("ping"))["result"] == "pong"
        assert service.server.dispatcher.held_bytes == 0


async def test_two_hundred_clients_are_served_at_once(path: Path) -> None:
    async with serving(path) as service:
        answered = []

        async def ask(number: int) -> None:
            async with lines_to(path) as client:
                answered.append((await client.ask("hold", number, value=number))["result"])

        async with anyio.create_task_group() as tasks:
            for number in range(200):
                tasks.start_soon(ask, number)
            await service.until(started=200)
            assert service.server.connections == 200
            service.release.set()
        assert sorted(answered) == list(range(200))


async def test_a_client_with_many_pipelined_requests_does_not_starve_another(path: Path) -> None:
    limits = Limits(turn_seconds=0.002)
    async with (
        serving(path, limits=limits) as service,
        lines_to(path) as busy,
        lines_to(path) as other,
    ):
        for number in range(1000):
            busy.send("spin", number, value=0.001)
        await busy.receive()
        assert (await other.ask("ping"))["result"] == "pong"
        assert service.spun < 500
