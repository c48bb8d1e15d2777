"""One login's statements: the simple and the extended protocol, cursors, and transactions.

A session answers messages with messages; it knows no socket. Where a call has to wait, it yields
the awaitable and goes on with its result, so that a search that is answered at once costs no task.
Invariant: what a client makes the session keep is counted, and bounded.

Source: PostgreSQL's documentation, "Frontend/Backend Protocol".
"""

from __future__ import annotations

import struct
from collections.abc import Awaitable, Generator, Sequence
from typing import Any, TypeVar

from pygwire import messages as pg
from pygwire.constants import TransactionStatus
from pygwire.exceptions import PygwireError

from syncd.pgwire import calls, results, types
from syncd.pgwire.calls import Bound, Caller
from syncd.pgwire.client_settings import ClientSettings
from syncd.pgwire.encodings import UTF8
from syncd.pgwire.errors import PROTOCOL_VIOLATION, SqlError, as_sql_error, not_supported
from syncd.pgwire.kept import OBJECT_BYTES, Account, Kept, Portal, Prepared
from syncd.pgwire.parsed import Command, Declare, Fetch, Select, Show, Statement
from syncd.pgwire.results import Column
from syncd.pgwire.statements import parse

IDLE, OPEN, FAILED = (
    TransactionStatus.IDLE,
    TransactionStatus.IN_TRANSACTION,
    TransactionStatus.ERROR_TRANSACTION,
)
Message = TypeVar("Message", bound=pg.PGMessage)
Steps = Generator[Awaitable[Any], Any, None]
"""What answers a message: it yields awaitables and is sent their results."""


class Session:
    """The statements of one connection, after its login."""

    def __init__(self, caller: Caller, account: Account, parameters: dict[str, str]) -> None:
        self._caller = caller
        self._kept = Kept(account)
        self._settings = ClientSettings(parameters)
        self._skips = False
        """Whether messages are skipped until Sync, after an error in the extended protocol."""
        self.status = IDLE
        self.out: list[bytes] = []
        """Messages for the client."""

    def greet(self) -> None:
        """Tell the client of the settings, and that the session begins."""
        for name in self._settings.reported:
            self._report(name)

    def ready(self) -> None:
        """Ask for the next statement."""
        self.out.append(results.READY[self.status])

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
        fields = {name: self._settings.wire_text(text) for name, text in error.fields().items()}
        self._send(pg.ErrorResponse(fields=fields))
        if self.status is OPEN:
            self.status = FAILED

    def close(self) -> None:
        """Forget everything."""
        self._kept.drop_portals()
        self._kept.drop_all_prepared()

    def _answer(self, kind: bytes, payload: bytes) -> Steps:
        if kind == b"Q":
            yield from self._simple(
                _decoded(payload.rstrip(b"\0"), self._settings.codec), len(payload)
            )
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
            portal = self._kept.portal(execute.portal)
            yield from self._execute(portal, execute.max_rows, len(payload) + portal.size)
        elif kind == b"C":
            closed = _message(pg.Close, payload)
            drop = self._kept.drop_prepared if closed.kind == "S" else self._kept.drop_portal
            drop(closed.name)
            self.out.append(results.CLOSE_COMPLETE)
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
            self.out.append(results.EMPTY)
        for statement in statements:
            portal = Portal(statement, Bound(codec=self._settings.codec), (), size)
            if self._columns(portal):
                self._row_description(portal)
            yield from self._execute(portal, 0, size)

    def _end_of_statement(self) -> None:
        """The end of an implicit transaction: its portals go."""
        if self.status is IDLE:
            self._kept.drop_portals(but_held=True)
        self.ready()

    def _parse(self, payload: bytes) -> None:
        name, text, tail = (*payload.split(b"\0", 2), b"", b"")[:3]
        head = _message(pg.Parse, b"\0\0" + tail)
        statements = parse(_decoded(text, self._settings.codec))
        if len(statements) > 1:
            raise SqlError(
                "42601",
                "a prepared statement holds one command",
                hint="Send them one by one.",
            )
        statement = statements[0] if statements else None
        oids = (
            list(head.param_types)
            if statement is None
            else calls.parameter_oids(statement, head.param_types)
        )
        if statement is not None and isinstance(statement.parsed, Select):
            calls.columns_of(statement)
        label = _decoded(name, self._settings.codec)
        self._kept.keep_prepared(label, Prepared(statement, oids, OBJECT_BYTES + len(payload)))
        self.out.append(results.PARSE_COMPLETE)

    def _bind(self, bind: pg.Bind, size: int) -> None:
        prepared = self._kept.prepared(bind.statement)
        count = len(bind.param_values)
        formats, wanted = bind.param_formats, bind.result_formats
        if count != len(prepared.oids) or len(formats) not in (0, 1, count):
            raise SqlError(
                PROTOCOL_VIOLATION,
                f"the statement has {len(prepared.oids)} parameters, got {count}",
                hint="Bind one value to each.",
            )
        if any(each not in (0, 1) for each in (*formats, *wanted)):
            raise SqlError("22023", "a format is neither 0 nor 1", hint="0 is text, 1 is binary.")
        binary = [bool(each) for each in formats]
        binary = binary * count if len(binary) == 1 else binary or [False] * count
        bound = Bound(prepared.oids, binary, bind.param_values, self._settings.codec)
        as_asked = [bool(each) for each in wanted]
        portal = Portal(prepared.statement, bound, as_asked, OBJECT_BYTES + size)
        if self._columns(portal):
            self._formats(portal)
        self._kept.keep_portal(bind.portal, portal)
        self.out.append(results.BIND_COMPLETE)

    def _describe(self, kind: str, name: str) -> None:
        if kind == "S":
            prepared = self._kept.prepared(name)
            self._send(pg.ParameterDescription(type_oids=prepared.oids))
            portal = Portal(prepared.statement, Bound(), (), 0)
        else:
            portal = self._kept.portal(name)
        if self._columns(portal):
            self._row_description(portal)
        else:
            self.out.append(results.NO_DATA)

    def _execute(self, portal: Portal, most: int, size: int) -> Steps:
        statement = portal.statement
        if statement is None:
            self.out.append(results.EMPTY)
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
        values: Sequence[Sequence[Any]]
        if isinstance(statement.parsed, Show):
            values = [(self._settings.shown(statement.parsed.name),)]
        else:
            result = calls.run(statement, portal.bound, self._caller, size)
            if calls.awaits(result):
                result = yield result
            values = calls.values_of(statement, portal.bound, result)
        codec = self._settings.codec
        try:
            portal.rows = results.data_rows(
                [
                    results.encoded(column.oid, is_binary, codec, column_values)
                    for column, is_binary, column_values in zip(
                        self._columns(portal), self._formats(portal), values, strict=True
                    )
                ]
            )
        except UnicodeEncodeError:
            raise SqlError(
                "22P05",
                f"a key has a character that {codec} lacks",
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
            self._kept.keep_rows(portal)
            self.out.append(results.SUSPENDED)
        elif isinstance(portal.statement.parsed, Show):
            self._complete("SHOW")
        else:
            self._complete(f"SELECT {count}")

    def _declare(self, statement: Statement, declare: Declare, bound: Bound, size: int) -> None:
        if self.status is IDLE and not declare.holds:
            raise SqlError(
                "25P01",
                "DECLARE CURSOR can only be used in transaction blocks",
                hint="Send BEGIN first, or DECLARE … WITH HOLD.",
            )
        selected = Statement(declare.select, statement.pieces)
        calls.columns_of(selected)
        portal = Portal(selected, bound, (), OBJECT_BYTES + size, holds=declare.holds)
        self._kept.keep_portal(statement.name(declare.name), portal)

    def _fetch(self, statement: Statement, fetch: Fetch, portal: Portal, size: int) -> Steps:
        cursor = self._kept.portal(statement.name(fetch.name))
        if cursor.rows is None:
            cursor.formats = self._formats(portal)
            yield from self._fill(cursor, size)
            self._kept.keep_rows(cursor)
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
            if self._settings.change(command.name, name):
                self._report(command.name)
        elif command.effect == "close":
            self._kept.portal(name)
            self._kept.drop_portal(name)
        elif command.effect == "deallocate":
            self._kept.prepared(name)
            self._kept.drop_prepared(name)
        if command.effect in ("close_all", "discard"):
            self._kept.drop_portals()
        if command.effect in ("deallocate_all", "discard"):
            self._kept.drop_all_prepared()
        self._complete(tag)

    def _report(self, name: str) -> None:
        value = self._settings.wire_text(self._settings.reported[name])
        self._send(pg.ParameterStatus(name=name, value=value))

    def _columns(self, portal: Portal) -> list[Column]:
        """The columns of a portal's rows; none for a command."""
        if not portal.columns and portal.statement is not None:
            parsed = portal.statement.parsed
            if isinstance(parsed, Select):
                portal.columns = calls.columns_of(portal.statement)
            elif isinstance(parsed, Show):
                portal.columns = [Column(parsed.name, types.TEXT)]
            elif isinstance(parsed, Fetch) and not parsed.moves:
                cursor = self._kept.portal(portal.statement.name(parsed.name))
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
        columns = self._columns(portal)
        if self._settings.codec != UTF8:
            wire_text = self._settings.wire_text
            columns = [Column(wire_text(name), oid) for name, oid in columns]
        binary = tuple(self._formats(portal))
        self.out.append(results.row_description(tuple(columns), binary))

    def _complete(self, tag: str) -> None:
        self.out.append(results.complete(tag))

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
