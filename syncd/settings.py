"""The settings of one syncd.

Invariant: each setting comes from the first place that has it: flag, ``SYNCD_*`` variable,
``syncd.toml``, default.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from syncd.cores import available_cores
from syncd.errors import SettingsError
from syncd.host_port import split_host_port
from syncd.shard import Shard

SYSTEM_DATA_DIR = Path("/var/lib/syncd")
CONFIG_FILES = (Path("syncd.toml"), Path("/etc/syncd/syncd.toml"))
SOCKET_NAME = "syncd.sock"
OFF = "off"
MOST_DEFAULT_READERS = 16
"""Most readers that are started on a machine with many cores, unless more are set."""


def user_data_dir() -> Path:
    """The data directory of a user without a system-wide one.

    Source: XDG Base Directory Specification.
    """
    base = os.environ.get("XDG_DATA_HOME")
    if base and Path(base).is_absolute():
        return Path(base) / "syncd"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "syncd"
    return Path.home() / ".local" / "share" / "syncd"


def default_data_dir() -> Path:
    """``/var/lib/syncd`` if this process may write or create it, else the user's data directory."""
    system = SYSTEM_DATA_DIR
    writable = os.access(system, os.W_OK) if system.exists() else os.access(system.parent, os.W_OK)
    return system if writable else user_data_dir()


def name_of_shard(shard: Shard, replica: str) -> str:
    """The consumer's name of a replica of a shard, unless another one is set."""
    name = f"shard-{shard.number}-of-{shard.of}"
    return f"{name}-{replica}" if replica else name


def listening_address(address: str) -> str:
    """The address if it is ``off`` or ``host:port``; raises ``ValueError``."""
    if address != OFF:
        try:
            split_host_port(address)
        except SettingsError as error:
            raise ValueError(f"{error.message}; {error.hint}, [::1]:7432, or {OFF}") from None
    return address


def readable_shard(text: str | None) -> str | None:
    """The name of a shard, ``i/n``; raises ``ValueError``."""
    return None if text is None else str(Shard.parse(text))


def advertised_address(address: str) -> str:
    """The address if it is empty or ``host:port``, with or without a scheme.

    Raises ``ValueError``.
    """
    if address:
        host_port = address.removeprefix("tcp://").removeprefix("tcps://")
        try:
            split_host_port(host_port)
        except SettingsError as error:
            raise ValueError(f"{error.message}; {error.hint}") from None
    return address


def url_to_post_to(url: SecretStr) -> SecretStr:
    """The URL if a POST to it is possible; raises ``ValueError``.

    The message does not repeat the URL: such URLs are often secrets.
    """
    try:
        parts = urlsplit(url.get_secret_value())
        usable = not url.get_secret_value() or (
            url.get_secret_value().isascii()
            and parts.scheme in ("http", "https")
            and parts.hostname
            and parts.port != 0
        )
    except ValueError:
        usable = False
    if not usable:
        raise ValueError("is not an http:// or https:// URL with a host")
    return url


def readable_dsn(dsn: SecretStr) -> SecretStr:
    """The connection string if libpq can read it; raises ``ValueError``.

    The message does not repeat the string: it may contain a password.
    """
    # Imported here because most commands only ask the service and do not need the driver.
    from psycopg import ProgrammingError
    from psycopg.conninfo import conninfo_to_dict

    try:
        parsed = conninfo_to_dict(dsn.get_secret_value())
    except ProgrammingError:
        raise ValueError("is not a connection string or URI that libpq can read") from None
    if not all(port == "" or port.isdigit() for port in str(parsed.get("port") or "").split(",")):
        raise ValueError("the port is not a number")
    return dsn


class Settings(BaseSettings):
    """All settings. ``syncd config`` prints each field's description."""

    model_config = SettingsConfigDict(
        env_prefix="SYNCD_",
        env_ignore_empty=True,
        extra="forbid",
        frozen=True,
        validate_default=True,
    )

    dsn: Annotated[
        SecretStr,
        AfterValidator(readable_dsn),
        Field(description="libpq connection string or URI; empty: libpq's own PG* variables"),
    ] = SecretStr("")
    data_dir: Annotated[
        Path,
        AfterValidator(Path.absolute),
        Field(
            description="checkpoints and embedded PostgreSQL; default: /var/lib/syncd if writable, "
            "else the user's data directory",
            default_factory=default_data_dir,
        ),
    ]
    socket: Annotated[
        Path | None,
        Field(description="RPC socket; default: <data dir>/syncd.sock"),
    ] = None
    listen: Annotated[
        str,
        AfterValidator(listening_address),
        Field(description="host:port for the RPC over TCP, or off; needs a token"),
    ] = OFF
    sql_listen: Annotated[
        str,
        AfterValidator(listening_address),
        Field(
            description="host:port for PostgreSQL clients and syncd.search(), or off; needs a "
            "token, which is the password"
        ),
    ] = OFF
    token: Annotated[
        SecretStr,
        Field(description="shared secret that a client sends first over TCP"),
    ] = SecretStr("")
    tls_cert: Annotated[
        Path | None,
        Field(
            description="certificate chain (PEM) for TCP; with it and its key, clients use tcps://",
        ),
    ] = None
    tls_key: Annotated[
        Path | None,
        Field(description="the certificate's key (PEM, not encrypted)"),
    ] = None
    http: Annotated[
        str,
        AfterValidator(listening_address),
        Field(
            description="host:port of /livez /readyz /status /metrics and /, no password; or off",
        ),
    ] = "127.0.0.1:9464"
    consumer: Annotated[
        str,
        Field(
            min_length=1,
            max_length=50,
            pattern=r"^[^\x00-\x1f\x7f]*$",
            description="this syncd's name in the database",
        ),
    ] = "default"
    shard: Annotated[
        str | None,
        AfterValidator(readable_shard),
        Field(
            description="i/n: serve only shard i of n, from 0; its consumer is shard-i-of-n unless "
            "it is set; default: all rows",
        ),
    ] = None
    replica: Annotated[
        str,
        Field(
            max_length=20,
            pattern=r"^[A-Za-z0-9_.-]*$",
            description="name of another syncd of the same shard, such as b, at the end of its "
            "consumer's name",
        ),
    ] = ""
    advertise: Annotated[
        str,
        AfterValidator(advertised_address),
        Field(
            description="host:port at which syncd route reaches this shard; default: SYNCD_LISTEN "
            "with this machine's name, else the RPC socket",
        ),
    ] = ""
    checkpoint_seconds: Annotated[
        float,
        Field(gt=0, allow_inf_nan=False, description="seconds between checkpoints"),
    ] = 60.0
    poll_seconds: Annotated[
        float | None,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="longest time that a change waits without a notification, in seconds; "
            "default: 1, or 0.02 without NOTIFY",
        ),
    ] = None
    verify_seconds: Annotated[
        float,
        Field(
            ge=0,
            allow_inf_nan=False,
            description="seconds between comparisons of all indexes with their tables; 0: never",
        ),
    ] = 86400.0
    max_staleness_seconds: Annotated[
        float | None,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="/readyz fails if answers are older than this; default: no limit",
        ),
    ] = None
    webhook_url: Annotated[
        SecretStr,
        AfterValidator(url_to_post_to),
        Field(
            description="URL that gets a JSON POST on drift, failed checkpoint, must_rebuild, "
            "missed recall",
        ),
    ] = SecretStr("")
    notify: Annotated[
        Literal["guarded", "off"] | None,
        Field(
            description="how writers wake syncd: guarded, or off if max_prepared_transactions > 0",
        ),
    ] = None
    max_connections: Annotated[
        int,
        Field(
            gt=0,
            description="most RPC connections; the local socket keeps some for status and health",
        ),
    ] = 1000
    outbox_max_rows: Annotated[
        int | None,
        Field(
            gt=0,
            lt=2**63,
            description="rows kept for a slow consumer, stored in the database; default 10 million",
        ),
    ] = None
    readers: Annotated[
        int | None,
        Field(
            ge=0,
            le=64,
            description="processes that answer searches beside the one that follows; 0: that one; "
            "default: one per core, at most 16",
        ),
    ] = None
    recall: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            allow_inf_nan=False,
            description="share of the nearest rows that searches of large datasets find; 1: all",
        ),
    ] = 0.95

    @model_validator(mode="before")
    @classmethod
    def name_shard(cls, given: Any) -> Any:
        """Give a shard its own consumer's name, so that shards and layouts have different ones."""
        if not isinstance(given, dict) or given.get("consumer") or not given.get("shard"):
            return given
        try:
            shard = Shard.parse(str(given["shard"]))
        except ValueError:  # the setting's own validator reports it
            return given
        return given | {"consumer": name_of_shard(shard, str(given.get("replica") or ""))}

    @property
    def own_shard(self) -> Shard | None:
        """The shard of this syncd; None if it is not sharded."""
        return None if self.shard is None else Shard.parse(self.shard)

    @property
    def socket_path(self) -> Path:
        """Absolute path of the RPC socket."""
        return (self.socket or self.data_dir / SOCKET_NAME).absolute()

    @property
    def tcp_listen(self) -> str | None:
        """Address of the RPC over TCP; None if it is off."""
        return None if self.listen == OFF else self.listen

    @property
    def sql_address(self) -> str | None:
        """Address for PostgreSQL clients; None if it is off."""
        return None if self.sql_listen == OFF else self.sql_listen

    @property
    def tls(self) -> tuple[Path, Path] | None:
        """Certificate chain and key of the listeners on TCP."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        return self.tls_cert, self.tls_key

    @property
    def reader_count(self) -> int:
        """Number of reader processes."""
        if self.readers is not None:
            return self.readers
        cores = available_cores()
        return min(cores, MOST_DEFAULT_READERS) if cores > 1 and sys.platform == "linux" else 0

    @property
    def http_was_chosen(self) -> bool:
        """Whether the user chose the ops page's address; then it is an error if it is in use."""
        return "http" in self.model_fields_set

    @property
    def conninfo(self) -> str:
        """The connection string in libpq's form."""
        return self.dsn.get_secret_value()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, variables, then the first configuration file that exists."""
        del dotenv_settings, file_secret_settings
        sources = [init_settings, env_settings]
        config = config_file()
        if config is not None:
            sources.append(TomlConfigSettingsSource(settings_cls, toml_file=config))
        return tuple(sources)


def config_file() -> Path | None:
    """The configuration file: the first one that exists."""
    return next((path for path in CONFIG_FILES if path.is_file()), None)


def load_settings(**flags: Any) -> Settings:
    """Read all settings; a flag that is ``None`` was not given.

    Raises ``SettingsError`` that names each wrong setting.
    """
    try:
        given = {name: value for name, value in flags.items() if value is not None}
        return agreeing(Settings(**given))
    except ValidationError as error:
        problems = error.errors()
        lines = [
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in problems
        ]
        names = {str(problem["loc"][0]) for problem in problems if problem["loc"]}
        variables = " and ".join(sorted(f"SYNCD_{name.upper()}" for name in names))
        raise SettingsError(
            "wrong setting: " + "; ".join(lines),
            hint=f"correct it where it is set: {variables}, the flag, or syncd.toml",
        ) from None
    except (OSError, ValueError) as error:  # an unreadable or malformed syncd.toml
        raise SettingsError(
            f"the configuration file cannot be read: {error}",
            hint="correct syncd.toml, or remove it",
        ) from error


def agreeing(settings: Settings) -> Settings:
    """The settings, if each one has the other settings that it needs; raises ``SettingsError``."""
    if settings.tcp_listen and not settings.token.get_secret_value():
        raise SettingsError(
            f"listen is {settings.listen} but no token is set: any client could read the indexes",
            hint="set SYNCD_TOKEN to a long random word, for example from: openssl rand -hex 32; "
            "or set SYNCD_LISTEN=off",
        )
    if settings.sql_listen != OFF and not settings.token.get_secret_value():
        raise SettingsError(
            f"sql_listen is {settings.sql_listen} but no token is set: the token is the password",
            hint="set SYNCD_TOKEN to a long random word, for example from: openssl rand -hex 32; "
            "or set SYNCD_SQL_LISTEN=off",
        )
    if settings.shard is None and (settings.replica or settings.advertise):
        name = "replica" if settings.replica else "advertise"
        raise SettingsError(
            f"{name} is {getattr(settings, name)} but no shard is set: only a shard has one",
            hint=f"set SYNCD_SHARD too, for example 0/4; or do not set SYNCD_{name.upper()}",
        )
    if (settings.tls_cert is None) != (settings.tls_key is None):
        missing = "tls_key" if settings.tls_key is None else "tls_cert"
        raise SettingsError(
            f"a certificate needs its key, and a key its certificate: {missing} is not set",
            hint=f"set SYNCD_{missing.upper()} too, or set neither",
        )
    return settings


def service_socket() -> Path:
    """The socket of the running service.

    It is ``SYNCD_SOCKET``, else the system-wide one, else the one in the user's data directory.
    """
    given = os.environ.get("SYNCD_SOCKET")
    if given:
        return Path(given).absolute()
    data_dir = os.environ.get("SYNCD_DATA_DIR")
    if data_dir:
        return Path(data_dir).absolute() / SOCKET_NAME
    system = SYSTEM_DATA_DIR / SOCKET_NAME
    return system if system.exists() else user_data_dir() / SOCKET_NAME
