"""One login's statements: the simple and the extended protocol, cursors, and transactions.

A session answers messages with messages; it knows no socket. Where a call has to wait, it yields
the awaitable and goes on with its result, so that a search that is answered at once costs no task.
Invariant: what a client makes the session keep is counted, and bounded.

Source: PostgreSQL's documentation, "Frontend/Backend Protocol".
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from pygwire import messages as pg
from pygwire.constants import TransactionStatus
from pygwire.exceptions import PygwireError

from syncd.pgwire import calls, types
from syncd.pgwire.calls import Bound, Caller, Column
from syncd.pgwire.encodings import UTF8, codec_of
from syncd.pgwire.errors import PROTOCOL_VIOLATION, SqlError, as_sql_error, not_supported
from syncd.pgwire.statements import Command, Declare, Fetch, Select, Show, Statement, parse

IDLE, OPEN, FAILED = (
    TransactionStatus.IDLE,
    TransactionStatus.IN_TRANSACTION,
    TransactionStatus.ERROR_TRANSACTION,
)
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
OBJECT_BYTES = 500
"""Bytes that a prepared statement or a portal takes besides its text, values and rows."""

Message = TypeVar("Message", bound=pg.PGMessage)
Steps = Generator[Awaitable[Any], Any, None]
"""What answers a message: it yields awaitables and is sent their results."""


class Account(Protocol):
    """Where a session counts the bytes that it keeps between messages."""

    def keep(self, size: int) -> None:
        """Count bytes, fewer if negative; raises ``SqlError`` if they are too many."""


@dataclass(slots=True)
class Prepared:
    """A prepared statement; ``statement`` is None for an empty one."""

    statement: Statement | None
    oids: list[int]
    size: int


@dataclass(slots=True)
class Portal:
    """A statement with its parameters, and its rows that are still to be sent."""

    statement: Statement | None
    bound: Bound
    formats: Sequence[bool]
    size: int
    holds: bool = False
    rows: list[bytes] | None = None
    """Encoded DataRow messages, next one last; None before the first Execute."""
    rows_kept: bool = False
    """Whether the rows are counted in ``size``."""
    done: bool = False
    """Whether its command has run: it runs once."""
    columns: list[Column] = field(default_factory=list)


class Session:
    """The statements of one connection, after its login."""

    def __init__(self, caller: Caller, account: Account, parameters: dict[str, str]) -> None:
        self._caller = caller
        self._account = account
        self._prepared: dict[str, Prepared] = {}
        self._portals: dict[str, Portal] = {}
        self._codec = UTF8
        self._skips = False
        """Whether messages are skipped until Sync, after an error in the extended protocol."""
        self.status = IDLE
        self.out: list[bytes] = []
        """Messages for the client."""
        self._reported = dict(REPORTED) | {"session_authorization": parameters.get("user", "")}
        self._reported["application_name"] = parameters.get("application_name", "")
        if "client_encoding" in parameters:
            self._set_encoding(parameters["client_encoding"].strip("'\""))

    def greet(self) -> None:
        """Tell the client of the settings, and that the session begins."""
        for name, value in self._reported.items():
            self._send(pg.ParameterStatus(name=name, value=_ascii(value, self._codec)))

    def ready(self) -> None:
        """Ask for the next statement."""
        self._send(pg.ReadyForQuery(status=self.status))

    def answer(self, kind: bytes, payload: bytes) -> Steps:
        """Answer one message. Errors in it become an ErrorResponse, except fatal ones."""
        if self._skips and kind != b"S":
            return
        try:
            yield from self._answer(kind, payload)
        except Exception as error:  # the top of a request
            failure = as_sql_error(error)
            if failure.fatal:
                raise failure from error
            self.fail(failure)
            if kind == b"Q":
                self._end_of_statement()
            else:
                self._skips = True

    def fail(self, error: SqlError) -> None:
        """Send an error."""
        fields = {name: _ascii(text, self._codec) for name, text in error.fields().items()}
        self._send(pg.ErrorResponse(fields=fields))
        if self.status is OPEN:
            self.status = FAILED

    def close(self) -> None:
        """Forget everything."""
        for portal in self._portals.values():
            self._account.keep(-portal.size)
        for prepared in self._prepared.values():
            self._account.keep(-prepared.size)
        self._portals.clear()
        self._prepared.clear()

    def _answer(self, kind: bytes, payload: bytes) -> Steps:
        if kind == b"Q":
            yield from self._simple(_decoded(payload.rstrip(b"\0"), self._codec), len(payload))
            self._end_of_statement()
        elif kind == b"P":
            self._parse(payload)
        elif kind == b"B":
            self._bind(_message(pg.Bind, payload), len(payload))
        elif kind == b"D":
            described = _message(pg.Describe, payload)
            self._describe(described.kind, described.name)
        elif kind == b"E":
            execute = _message(pg.Execute, payload)
            portal = self._portal(execute.portal)
            yield from self._execute(portal, execute.max_rows, len(payload) + portal.size)
        elif kind == b"C":
            closed = _message(pg.Close, payload)
            self._close(closed.kind, closed.name)
            self._send(pg.CloseComplete())
        elif kind == b"S":
            self._skips = False
            self._end_of_statement()
        elif kind == b"F":
            raise not_supported("the function call of protocol 2")
        elif kind not in (b"H", b"d", b"c", b"f"):  # Flush; what is left of a COPY is ignored
            raise SqlError(
                PROTOCOL_VIOLATION, f"unknown message {kind!r}", hint="Use libpq.", fatal=True
            )

    def _simple(self, text: str, size: int) -> Steps:
        statements = parse(text)
        if not statements:
            self._send(pg.EmptyQueryResponse())
        for statement in statements:
            portal = Portal(statement, Bound(codec=self._codec), (), size)
            if self._columns(portal):
                self._row_description(portal)
            yield from self._execute(portal, 0, size)

    def _end_of_statement(self) -> None:
        """The end of an implicit transaction: its portals go."""
        if self.status is IDLE:
            for name in [name for name, portal in self._portals.items() if not portal.holds]:
                self._drop_portal(name)
        self.ready()

    def _parse(self, payload: bytes) -> None:
        name, text, tail = (*payload.split(b"\0", 2), b"", b"")[:3]
        head = _message(pg.Parse, b"\0\0" + tail)
        statements = parse(_decoded(text, self._codec))
        if len(statements) > 1:
            raise SqlError(
                "42601",
                "a prepared statement holds one command",
                hint="Send them one by one.",
            )
        statement = statements[0] if statements else None
        label = _decoded(name, self._codec)
        if not label:
            self._drop_prepared(label)
        elif label in self._prepared:
            raise SqlError(
                "42P05", f"prepared statement {label[:60]!r} already exists", hint="Close it first."
            )
        oids = (
            list(head.param_types)
            if statement is None
            else calls.parameter_oids(statement, head.param_types)
        )
        if statement is not None and isinstance(statement.parsed, Select):
            calls.columns_of(statement)
        size = OBJECT_BYTES + len(payload)
        self._account.keep(size)
        self._prepared[label] = Prepared(statement, oids, size)
        self._send(pg.ParseComplete())

    def _bind(self, bind: pg.Bind, size: int) -> None:
        prepared = self._prepared_statement(bind.statement)
        count = len(bind.param_values)
        formats = bind.param_formats
        results = bind.result_formats
        if count != len(prepared.oids) or len(formats) not in (0, 1, count):
            raise SqlError(
                PROTOCOL_VIOLATION,
                f"the statement has {len(prepared.oids)} parameters, got {count}",
                hint="Bind one value to each.",
            )
        if any(each not in (0, 1) for each in (*formats, *results)):
            raise SqlError("22023", "a format is neither 0 nor 1", hint="0 is text, 1 is binary.")
        if bind.portal in self._portals:
            if bind.portal:
                raise SqlError(
                    "42P03", f"cursor {bind.portal[:60]!r} already exists", hint="Close it first."
                )
            self._drop_portal("")
        binary = [bool(each) for each in formats]
        binary = binary * count if len(binary) == 1 else binary or [False] * count
        bound = Bound(prepared.oids, binary, bind.param_values, self._codec)
        size += OBJECT_BYTES
        portal = Portal(prepared.statement, bound, [bool(each) for each in results], size)
        if self._columns(portal):
            self._formats(portal)
        self._account.keep(size)
        self._portals[bind.portal] = portal
        self._send(pg.BindComplete())

    def _describe(self, kind: str, name: str) -> None:
        if kind == "S":
            prepared = self._prepared_statement(name)
            self._send(pg.ParameterDescription(type_oids=prepared.oids))
            portal = Portal(prepared.statement, Bound(), (), 0)
        else:
            portal = self._portal(name)
        if self._columns(portal):
            self._row_description(portal)
        else:
            self._send(pg.NoData())

    def _execute(self, portal: Portal, most: int, size: int) -> Steps:
        statement = portal.statement
        if statement is None:
            self._send(pg.EmptyQueryResponse())
            return
        parsed = statement.parsed
        if self.status is FAILED and not (
            isinstance(parsed, Command) and parsed.effect in ("commit", "rollback", "rollback_to")
        ):
            raise SqlError(
                "25P02",
                "current transaction is aborted, commands ignored until end of transaction block",
                hint="Send ROLLBACK.",
            )
        if isinstance(parsed, Command | Declare):
            if portal.done:
                raise SqlError("55000", "the portal has run already", hint="Bind it again.")
            portal.done = True
            if isinstance(parsed, Command):
                self._command(statement, parsed)
            else:
                self._declare(statement, parsed, portal.bound, size)
                self._complete("DECLARE CURSOR")
        elif isinstance(parsed, Fetch):
            yield from self._fetch(statement, parsed, portal, size)
        else:
            if portal.rows is None:
                yield from self._fill(portal, size)
            self._send_rows(portal, most)

    def _fill(self, portal: Portal, size: int) -> Steps:
        """Run a portal's statement, and encode its rows."""
        statement = portal.statement
        assert statement is not None
        rows: Sequence[Sequence[Any]]
        columns = self._columns(portal)
        if isinstance(statement.parsed, Show):
            rows = [(self._shown(statement.parsed.name),)]
        else:
            result = calls.run(statement, portal.bound, self._caller, size)
            if calls.awaits(result):
                result = yield result
            rows = calls.rows_of(statement, portal.bound, result)
        encoders = [
            types.encoder_of(column.oid, is_binary, self._codec)
            for column, is_binary in zip(columns, self._formats(portal), strict=True)
        ]
        try:
            portal.rows = types.data_rows(rows, encoders)
        except UnicodeEncodeError:
            raise SqlError(
                "22P05",
                f"a key has a character that {self._codec} lacks",
                hint="SET client_encoding = 'UTF8'.",
            ) from None
        portal.rows.reverse()

    def _send_rows(self, portal: Portal, most: int) -> None:
        rows = portal.rows
        assert rows is not None
        assert portal.statement is not None
        count = min(most or len(rows), len(rows))
        self.out += reversed(rows[len(rows) - count :])
        del rows[len(rows) - count :]
        if rows or (most and count == most):
            self._keep_rows(portal)
            self._send(pg.PortalSuspended())
        elif isinstance(portal.statement.parsed, Show):
            self._complete("SHOW")
        else:
            self._complete(f"SELECT {count}")

    def _keep_rows(self, portal: Portal) -> None:
        """Count the rows that a portal keeps; they are counted until it is dropped."""
        if not portal.rows_kept:
            portal.rows_kept = True
            size = sum(map(len, portal.rows or ()))
            self._account.keep(size)
            portal.size += size

    def _declare(self, statement: Statement, declare: Declare, bound: Bound, size: int) -> None:
        if self.status is IDLE and not declare.holds:
            raise SqlError(
                "25P01",
                "DECLARE CURSOR can only be used in transaction blocks",
                hint="Send BEGIN first, or DECLARE … WITH HOLD.",
            )
        name = statement.name(declare.name)
        if name in self._portals:
            raise SqlError("42P03", f"cursor {name[:60]!r} already exists", hint="Close it first.")
        selected = Statement(declare.select, statement.pieces)
        calls.columns_of(selected)
        portal = Portal(selected, bound, (), OBJECT_BYTES + size, holds=declare.holds)
        self._account.keep(portal.size)
        self._portals[name] = portal

    def _fetch(self, statement: Statement, fetch: Fetch, portal: Portal, size: int) -> Steps:
        cursor = self._portal(statement.name(fetch.name))
        if cursor.rows is None:
            cursor.formats = self._formats(portal)
            yield from self._fill(cursor, size)
            self._keep_rows(cursor)
        rows = cursor.rows or []
        count = len(rows) if fetch.count is None else min(fetch.count, len(rows))
        if not fetch.moves:
            self.out += reversed(rows[len(rows) - count :])
        del rows[len(rows) - count :]
        self._complete(f"{'MOVE' if fetch.moves else 'FETCH'} {count}")

    def _command(self, statement: Statement, command: Command) -> None:
        tag, name = command.tag, statement.name(command.value)
        if command.effect == "begin":
            self.status = OPEN
        elif command.effect in ("commit", "rollback"):
            if self.status is FAILED:
                tag = "ROLLBACK"
            self.status = IDLE
        elif command.effect == "rollback_to":
            self.status = OPEN if self.status is FAILED else self.status
        elif command.effect == "set":
            self._set(command.name, name)
        elif command.effect == "close":
            self._portal(name)
            self._drop_portal(name)
        elif command.effect == "deallocate":
            self._prepared_statement(name)
            self._drop_prepared(name)
        if command.effect in ("close_all", "discard"):
            for portal in list(self._portals):
                self._drop_portal(portal)
        if command.effect in ("deallocate_all", "discard"):
            for prepared in list(self._prepared):
                self._drop_prepared(prepared)
        self._complete(tag)

    def _set(self, name: str, value: str) -> None:
        """Only a client's encoding and its name matter; other settings have no effect."""
        if name == "client_encoding":
            self._set_encoding("UTF8" if value.upper() == "DEFAULT" else value)
        elif name == "application_name":
            self._reported["application_name"] = value
        else:
            return
        shown = "client_encoding" if name == "client_encoding" else "application_name"
        self._send(pg.ParameterStatus(name=shown, value=_ascii(self._reported[shown], self._codec)))

    def _set_encoding(self, name: str) -> None:
        codec = codec_of(name)
        if codec is None:
            raise SqlError(
                "22023",
                f"client_encoding {name[:60]!r} is not supported",
                hint="SET client_encoding = 'UTF8'.",
            )
        self._codec = codec
        self._reported["client_encoding"] = "UTF8" if codec == UTF8 else name.upper()

    def _shown(self, name: str) -> str:
        for known, value in self._reported.items():
            if known.lower() == name:
                return value
        return SHOWN.get(name, "")

    def _columns(self, portal: Portal) -> list[Column]:
        """The columns of a portal's rows; none for a command."""
        if not portal.columns and portal.statement is not None:
            parsed = portal.statement.parsed
            if isinstance(parsed, Select):
                portal.columns = calls.columns_of(portal.statement)
            elif isinstance(parsed, Show):
                portal.columns = [Column(parsed.name, types.TEXT)]
            elif isinstance(parsed, Fetch) and not parsed.moves:
                cursor = self._portal(portal.statement.name(parsed.name))
                portal.columns = self._columns(cursor)
        return portal.columns

    def _formats(self, portal: Portal) -> list[bool]:
        """Whether each column is sent in binary."""
        columns, formats = self._columns(portal), list(portal.formats)
        if len(formats) not in (0, 1, len(columns)):
            raise SqlError(
                PROTOCOL_VIOLATION,
                f"{len(formats)} formats for {len(columns)} columns",
                hint="Pass none, one, or one for each column.",
            )
        return formats * len(columns) if len(formats) == 1 else formats or [False] * len(columns)

    def _row_description(self, portal: Portal) -> None:
        self._send(
            pg.RowDescription(
                fields=[
                    pg.FieldDescription(
                        name=_ascii(column.name, self._codec),
                        type_oid=column.oid,
                        type_size=types.size_of(column.oid),
                        type_modifier=-1,
                        format_code=int(is_binary),
                    )
                    for column, is_binary in zip(
                        self._columns(portal), self._formats(portal), strict=True
                    )
                ]
            )
        )

    def _portal(self, name: str) -> Portal:
        if name not in self._portals:
            raise SqlError(
                "34000", f"cursor {name[:60]!r} does not exist", hint="Declare it first."
            )
        return self._portals[name]

    def _prepared_statement(self, name: str) -> Prepared:
        if name not in self._prepared:
            raise SqlError(
                "26000",
                f"prepared statement {name[:60]!r} does not exist",
                hint="Prepare it on this connection.",
            )
        return self._prepared[name]

    def _close(self, kind: str, name: str) -> None:
        if kind == "S":
            self._drop_prepared(name)
        else:
            self._drop_portal(name)

    def _drop_prepared(self, name: str) -> None:
        prepared = self._prepared.pop(name, None)
        if prepared is not None:
            self._account.keep(-prepared.size)

    def _drop_portal(self, name: str) -> None:
        portal = self._portals.pop(name, None)
        if portal is not None:
            self._account.keep(-portal.size)

    def _complete(self, tag: str) -> None:
        self._send(pg.CommandComplete(tag=tag))

    def _send(self, message: pg.PGMessage) -> None:
        self.out.append(message.to_wire())


def _message(kind: type[Message], payload: bytes) -> Message:
    """A decoded message; raises ``SqlError``."""
    try:
        return kind.decode(memoryview(payload))
    except (PygwireError, struct.error, IndexError, ValueError):
        raise SqlError(
            PROTOCOL_VIOLATION, f"the message {kind.__name__} is malformed", hint="Use a driver."
        ) from None


def _decoded(raw: bytes, codec: str) -> str:
    try:
        return raw.decode(codec)
    except UnicodeDecodeError:
        raise SqlError(
            "22021", f"the statement is not valid {codec}", hint="Set client_encoding."
        ) from None


def _ascii(text: str, codec: str) -> str:
    """Text that is the same bytes in UTF-8 and in the client's encoding."""
    return text if codec == UTF8 else text.encode("ascii", "backslashreplace").decode()
