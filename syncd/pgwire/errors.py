"""Errors in PostgreSQL's form: SQLSTATE, message, DETAIL and HINT.

DETAIL is the RPC's kind of the error, HINT is its hint.
"""

from __future__ import annotations

from syncd.errors import RequestError
from syncd.rpc.protocol import as_request_error

FEATURE_NOT_SUPPORTED = "0A000"
SYNTAX_ERROR = "42601"
PROTOCOL_VIOLATION = "08P01"
QUERY_CANCELED = "57014"
INVALID_TEXT = "22P02"

SQLSTATES = {
    "unknown_dataset": "42P01",  # undefined_table
    "unknown_key": "P0002",  # no_data_found
    "dimension_mismatch": "22000",  # data_exception, as in pgvector
    "invalid_vector": "22023",  # invalid_parameter_value
    "invalid_filter": "22023",
    "invalid_params": "22023",
    "not_ready": "55000",  # object_not_in_prerequisite_state
    "overloaded": "53000",  # insufficient_resources
    # lock_not_available: clients may try again. In PL/pgSQL WHEN OTHERS does not catch 57014.
    "timeout": "55P03",
    "unauthorized": "28P01",  # invalid_password
    "too_large": "54000",  # program_limit_exceeded
    "shards_unavailable": "58000",  # system_error
}
INTERNAL_ERROR = "XX000"

WORKS = (
    "This works: SELECT key, distance FROM search('dataset', '[0.1, 0.2]', k => 10, "
    "filter => '{}'); search_key('dataset', 'key'); datasets(); status(). "
    "Send other statements to the database itself."
)
"""The hint for a statement that is not supported."""


class SqlError(Exception):
    """A statement failed. ``fatal`` ends the connection."""

    def __init__(
        self, sqlstate: str, message: str, *, detail: str = "", hint: str = "", fatal: bool = False
    ) -> None:
        super().__init__(message)
        self.sqlstate = sqlstate
        self.message = message
        self.detail = detail
        self.hint = hint
        self.fatal = fatal

    def copy(self) -> SqlError:
        """An equal error that has not been raised yet."""
        return SqlError(
            self.sqlstate, self.message, detail=self.detail, hint=self.hint, fatal=self.fatal
        )

    def fields(self) -> dict[str, str]:
        """The fields of an ErrorResponse."""
        severity = "FATAL" if self.fatal else "ERROR"
        fields = {"S": severity, "V": severity, "C": self.sqlstate, "M": self.message}
        if self.detail:
            fields["D"] = self.detail
        if self.hint:
            fields["H"] = self.hint
        return {name: text.replace("\0", "") for name, text in fields.items()}


def as_sql_error(error: Exception) -> SqlError:
    """The SQL form of any exception of a request; only those of syncd's own faults are logged."""
    if isinstance(error, SqlError):
        return error
    return from_request_error(as_request_error(error, "sql"))


def from_request_error(error: RequestError, *, fatal: bool = False) -> SqlError:
    """The SQL form of an error of the RPC."""
    return SqlError(
        SQLSTATES.get(error.kind, INTERNAL_ERROR),
        error.message,
        detail=error.kind,
        hint=error.hint,
        fatal=fatal,
    )


def not_supported(what: str) -> SqlError:
    """The error for SQL that this listener does not run."""
    return SqlError(FEATURE_NOT_SUPPORTED, f"{what} is not supported here", hint=WORKS)


def syntax_error(message: str) -> SqlError:
    """The error for text that is not SQL."""
    return SqlError(SYNTAX_ERROR, message, hint=WORKS)
