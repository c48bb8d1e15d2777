"""What a command works on: a database, or the running service."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from pydantic import SecretStr

from syncd.client.client import Client
from syncd.settings import Settings, load_settings, service_socket


@contextmanager
def database(
    settings: Settings, *, embedded: bool, server_settings: Mapping[str, str] | None = None
) -> Iterator[Settings]:
    """Settings whose ``dsn`` is to be used: the user's, or that of the embedded PostgreSQL, which
    runs for the block at least.
    """
    if not embedded:
        yield settings
        return
    from syncd.postgres.embedded.embedded import EmbeddedPostgres

    settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
    with EmbeddedPostgres(settings.data_dir, server_settings) as server:
        yield settings.model_copy(update={"dsn": SecretStr(server.conninfo)})


def service(socket: str | None) -> Client:
    """A client of the running service; raises ``ServiceUnavailable`` with the command that starts
    it.
    """
    load_settings()  # a wrong setting is an error even where this command would not need it
    return Client(socket or service_socket())
