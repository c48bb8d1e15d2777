"""The number of connections fits the system's limit of open files."""

from __future__ import annotations

import os
import resource
import socket
from contextlib import suppress

import anyio

from syncd.errors import Overloaded
from syncd.readers.link import CLIENT, open_link
from syncd.service import FILES_BESIDE_CONNECTIONS, connections_within_files
from tests.forks import Child


def test_connections_are_at_most_as_many_as_the_limit_of_open_files_leaves() -> None:
    def allowed(files: int) -> list[int]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        return [connections_within_files(wanted) for wanted in (1, 100, 1000)]

    assert Child(lambda: allowed(FILES_BESIDE_CONNECTIONS + 1000)).result() == [1, 100, 1000]
    assert Child(lambda: allowed(FILES_BESIDE_CONNECTIONS + 999)).result() == [1, 100, 999]
    assert Child(lambda: allowed(64)).result() == [1, 1, 1]


def test_two_listeners_share_the_limit_of_open_files() -> None:
    def allowed() -> int:
        files = FILES_BESIDE_CONNECTIONS + 1001
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        return connections_within_files(1000, listeners=2)

    assert Child(allowed).result() == 500


def test_a_connection_in_a_reader_takes_two_descriptors() -> None:
    def allowed() -> int:
        files = FILES_BESIDE_CONNECTIONS + 1001
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
        return connections_within_files(1000, files_each=2)

    assert Child(allowed).result() == 500


def test_a_reader_without_a_free_descriptor_refuses_a_request_and_names_the_limit() -> None:
    async def refused() -> tuple[str, str]:
        control, _ = socket.socketpair()
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        with suppress(OSError):
            while True:
                os.dup(0)
        try:
            await open_link(control, CLIENT)
        except Overloaded as error:
            return error.message, error.hint
        raise AssertionError("there was a descriptor")

    message, hint = Child(lambda: anyio.run(refused)).result()
    assert "Too many open files" in message
    assert "ulimit -n" in hint
