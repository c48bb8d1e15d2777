from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest
from anyio.to_thread import run_sync

from syncd.client.address import TcpAddress, UnixAddress, find_service
from syncd.errors import AddressInUse, SettingsError
from syncd.rpc.dispatch import Limits
from syncd.rpc.server import Server
from syncd.rpc.sockets import MAX_PATH_BYTES, bind_tcp, bind_unix
from tests.unit.rpc.rpc_service import SHARED_WORD, lines_to, serving


def leave_stale(path: Path) -> None:
    """Leave a socket file that no server listens on, as a killed server does."""
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))


@pytest.mark.parametrize("umask", [0, 0o022, 0o177])
def test_the_socket_has_mode_0660_whatever_the_umask(path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        bound = bind_unix(path)
    finally:
        os.umask(before)
    bound.socket.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o660


@pytest.mark.skipif(
    os.uname().sysname != "Linux", reason="only Linux gives a socket file its descriptor's mode"
)
def test_the_socket_is_never_wider_than_0660(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "chmod", lambda *_: None)
    before = os.umask(0)
    try:
        bound = bind_unix(path)
    finally:
        os.umask(before)
    bound.socket.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o660


def test_a_path_too_long_is_refused_with_its_length_the_limit_and_the_setting(
    tmp_path: Path,
) -> None:
    path = tmp_path / ("x" * (MAX_PATH_BYTES - len(os.fsencode(tmp_path))))
    with pytest.raises(SettingsError) as caught:
        bind_unix(path)
    assert f"{MAX_PATH_BYTES + 1} bytes" in caught.value.message
    assert f"at most {MAX_PATH_BYTES}" in caught.value.message
    assert "SYNCD_SOCKET" in caught.value.hint
    longest = tmp_path / path.name[:-1]
    bind_unix(longest).socket.close()
    assert longest.is_socket()


def test_a_stale_socket_is_replaced(path: Path) -> None:
    leave_stale(path)
    bound = bind_unix(path)
    bound.socket.listen()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    bound.remove()
    bound.socket.close()
    assert not path.exists()


def test_a_file_that_is_not_a_socket_is_left_alone(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(SettingsError, match="is not a socket"):
        bind_unix(path)
    assert path.read_text() == "precious"


def test_a_directory_that_is_not_there_is_a_setting_to_change(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        bind_unix(tmp_path / "missing" / "s")
    assert "SYNCD_SOCKET" in caught.value.hint


def test_a_socket_that_another_server_has_put_there_since_is_not_removed(path: Path) -> None:
    first = bind_unix(path)
    path.rename(path.with_suffix(".old"))
    second = bind_unix(path)
    first.remove()
    assert path.is_socket()
    second.remove()
    assert not path.exists()
    second.remove()
    first.socket.close()
    second.socket.close()


@pytest.mark.parametrize(
    "listen", ["", "7432", "localhost", ":7432", "localhost:", "localhost:99999", "localhost:http"]
)
def test_an_address_that_is_not_host_and_port_is_refused(listen: str) -> None:
    with pytest.raises(SettingsError, match="is not host:port"):
        bind_tcp(listen)


def test_a_port_in_use_is_a_setting_to_change() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(AddressInUse) as caught:
        bind_tcp(f"127.0.0.1:{taken.getsockname()[1]}")
    assert "SYNCD_LISTEN" in caught.value.hint


def test_listening_on_tcp_needs_a_token(path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        Server({}, socket=path, listen="127.0.0.1:0", token="")
    assert "SYNCD_TOKEN" in caught.value.hint


def test_a_client_finds_the_service_by_path_by_url_or_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SYNCD_TOKEN", raising=False)
    assert find_service("/run/s", None) == UnixAddress("/run/s")
    assert find_service(Path("/run/s"), None) == UnixAddress("/run/s")
    assert find_service("tcp://db.example:7432", "t") == TcpAddress("db.example", 7432, "t")
    assert find_service("tcp://[::1]:7432/", "t") == TcpAddress("::1", 7432, "t")
    monkeypatch.setenv("SYNCD_TOKEN", "from the environment")
    assert find_service("tcp://db:1", None) == TcpAddress("db", 1, "from the environment")
    monkeypatch.setenv("SYNCD_SOCKET", str(tmp_path / "mine"))
    assert find_service(None, None) == UnixAddress(str(tmp_path / "mine"))
    with pytest.raises(SettingsError):
        find_service("tcp://db", None)
    encrypted = find_service("tcps://[::1]:7432/", "t")
    assert isinstance(encrypted, TcpAddress)
    assert encrypted.tls is not None
    assert encrypted.tls.check_hostname
    assert str(encrypted) == "tcps://[::1]:7432"
    with pytest.raises(SettingsError, match="not encrypted") as caught:
        find_service("tcp://db:1", "t", encrypted.tls)
    assert "tcps://db:1" in caught.value.hint


def test_an_address_never_shows_its_token() -> None:
    address = find_service("tcp://db:1", "s3cret")
    assert "s3cret" not in f"{address} {address!r}"


@pytest.mark.anyio
async def test_a_live_socket_is_refused_and_goes_on_answering(path: Path) -> None:
    async with serving(path), lines_to(path) as client:
        with pytest.raises(BaseExceptionGroup) as caught:
            await Server({}, socket=path).serve()
        assert caught.group_contains(SettingsError, match="another syncd answers on")
        assert (await client.ask("ping"))["result"] == "pong"
        async with lines_to(path) as other:
            assert (await other.ask("ping"))["result"] == "pong"


@pytest.mark.anyio
async def test_stop_finishes_the_calls_under_way_and_takes_no_new_ones(path: Path) -> None:
    async with serving(path, tcp=True) as service, lines_to(path) as client, lines_to(path) as idle:
        assert (await idle.ask("ping"))["result"] == "pong"
        client.send("hold", 1, value="done")
        await service.until(started=1)
        service.server.stop()
        assert await idle.is_closed()
        assert not await run_sync(path.exists)
        with pytest.raises(ConnectionRefusedError):
            async with lines_to(service.tcp) as late:
                await late.ask("ping")
        client.send("echo", 2, value="too late")
        service.release.set()
        assert (await client.receive())["result"] == "done"
        assert await client.is_closed()
        await service.stopped.wait()
        assert service.echoed == []


@pytest.mark.anyio
async def test_stop_waits_only_so_long(path: Path) -> None:
    async with serving(path, limits=Limits(stop_seconds=0.05)) as service, lines_to(path) as client:
        client.send("hold", 1)
        await service.until(started=1)
        service.server.stop()
        assert await client.is_closed()
        await service.stopped.wait()
        assert service.ended == 1


@pytest.mark.anyio
async def test_cancelling_closes_at_once_and_leaves_no_file(path: Path) -> None:
    async with (
        serving(path, tcp=True) as service,
        lines_to(path) as client,
        lines_to(service.tcp) as other,
    ):
        client.send("hold", 1)
        assert (await other.ask("authenticate", token=SHARED_WORD))["result"] is True
        await service.until(started=1)
        service.cancel()
        assert await client.is_closed()
        assert await other.is_closed()
        await service.until(ended=1)
        while await run_sync(path.exists):
            pass


@pytest.mark.anyio
async def test_the_same_path_serves_again_after_a_stop(path: Path) -> None:
    for _ in range(3):
        async with serving(path) as service, lines_to(path) as client:
            assert (await client.ask("ping"))["result"] == "pong"
            service.server.stop()
            await service.stopped.wait()
