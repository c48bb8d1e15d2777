"""The database or the running service that a command uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pydantic import SecretStr

from syncd.settings import Settings, load_settings, service_socket

if TYPE_CHECKING:
    from syncd.client.client import Client


@contextmanager
def database(
    settings: Settings, *, embedded: bool, server_settings: Mapping[str, str] | None = None
) -> Iterator[Settings]:
    """Settings with the ``dsn`` to use: the user's, or the embedded PostgreSQL's.

    The embedded PostgreSQL runs at least until the block ends.
    """
    if not embedded:
        yield settings
        return
    from syncd.postgres.embedded.embedded import EmbeddedPostgres

    settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o750)
    with EmbeddedPostgres(settings.data_dir, server_settings) as server:
        yield settings.model_copy(update={"dsn": SecretStr(server.conninfo)})


def service(socket: str | None) -> Client:
    """A client of the running service.

    Its calls raise ``ServiceUnavailable``, which names the command that starts the service.
    """
    from syncd.client.client import Client  # imported here: most commands need none

    load_settings()  # a wrong setting is an error even if this command does not need it
    return Client(socket or service_socket())
