"""A client's settings: those that it is told of, and the two that have an effect."""

from __future__ import annotations

from syncd.pgwire.encodings import UTF8, codec_of
from syncd.pgwire.errors import SqlError

SERVER_VERSION = "16.0 (syncd)"
"""Clients derive from it which protocol and which statements they may send."""
REPORTED = {
    "server_version": SERVER_VERSION,
    "server_encoding": "UTF8",
    "client_encoding": "UTF8",
    "application_name": "",
    "DateStyle": "ISO, MDY",
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "integer_datetimes": "on",
    "standard_conforming_strings": "on",
    "is_superuser": "off",
    "in_hot_standby": "off",
    "default_transaction_read_only": "off",
}
"""The settings that a client is told of at its login."""
SHOWN = {
    **{name.lower(): value for name, value in REPORTED.items()},
    "transaction_isolation": "read committed",
    "transaction_isolation_level": "read committed",
    "transaction_read_only": "on",
    "time_zone": "UTC",
    "server_version_num": "160000",
    "max_identifier_length": "63",
}


class ClientSettings:
    """The settings of one session, from the parameters of its startup packet on."""

    def __init__(self, parameters: dict[str, str]) -> None:
        self.codec = UTF8
        """Python's codec of the client's encoding."""
        self.reported = REPORTED | {
            "session_authorization": parameters.get("user", ""),
            "application_name": parameters.get("application_name", ""),
        }
        """The settings that the client is told of when they change, with their values."""
        if "client_encoding" in parameters:
            self._set_encoding(parameters["client_encoding"].strip("'\""))

    def change(self, name: str, value: str) -> bool:
        """SET a setting; returns whether it is a reported one that changed.

        Only a client's encoding and its name matter. Raises ``SqlError``.
        """
        if name == "client_encoding":
            self._set_encoding("UTF8" if value.upper() == "DEFAULT" else value)
        elif name == "application_name":
            self.reported[name] = value
        else:
            return False
        return True

    def shown(self, name: str) -> str:
        """The value that SHOW shows; empty for a setting that there is not."""
        for known, value in self.reported.items():
            if known.lower() == name:
                return value
        return SHOWN.get(name, "")

    def wire_text(self, text: str) -> str:
        """Text that pygwire, which writes UTF-8, writes as the client reads it."""
        return text if self.codec == UTF8 else ascii_text(text)

    def _set_encoding(self, name: str) -> None:
        codec = codec_of(name)
        if codec is None:
            raise SqlError(
                "22023",
                f"client_encoding {name[:60]!r} is not supported",
                hint="SET client_encoding = 'UTF8'.",
            )
        self.codec = codec
        self.reported["client_encoding"] = "UTF8" if codec == UTF8 else name.upper()


def ascii_text(text: str) -> str:
    """Text with its other characters escaped."""
    return text.encode("ascii", "backslashreplace").decode()
