"""What a session keeps between messages: prepared statements and portals.

Invariant: each is counted from when it is kept until it is dropped, so that a client cannot take
memory without a bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from syncd.pgwire.calls import Bound
from syncd.pgwire.errors import SqlError
from syncd.pgwire.parsed import Statement
from syncd.pgwire.results import Column

OBJECT_BYTES = 500
"""Bytes that a prepared statement or a portal takes besides its text, values and rows."""


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


class Kept:
    """The prepared statements and the portals of one session, by name. Raises ``SqlError``."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._prepared: dict[str, Prepared] = {}
        self._portals: dict[str, Portal] = {}

    def prepared(self, name: str) -> Prepared:
        """The prepared statement of this name."""
        if name not in self._prepared:
            raise SqlError(
                "26000",
                f"prepared statement {name[:60]!r} does not exist",
                hint="Prepare it on this connection.",
            )
        return self._prepared[name]

    def portal(self, name: str) -> Portal:
        """The portal, or cursor, of this name."""
        if name not in self._portals:
            raise SqlError(
                "34000", f"cursor {name[:60]!r} does not exist", hint="Declare it first."
            )
        return self._portals[name]

    def keep_prepared(self, name: str, prepared: Prepared) -> None:
        """Keep a prepared statement; the one without a name replaces the previous one."""
        if name and name in self._prepared:
            raise SqlError(
                "42P05", f"prepared statement {name[:60]!r} already exists", hint="Close it first."
            )
        self.drop_prepared(name)
        self._account.keep(prepared.size)
        self._prepared[name] = prepared

    def keep_portal(self, name: str, portal: Portal) -> None:
        """Keep a portal; the one without a name replaces the previous one."""
        if name and name in self._portals:
            raise SqlError("42P03", f"cursor {name[:60]!r} already exists", hint="Close it first.")
        self.drop_portal(name)
        self._account.keep(portal.size)
        self._portals[name] = portal

    def keep_rows(self, portal: Portal) -> None:
        """Count the rows that a portal keeps."""
        if not portal.rows_kept:
            portal.rows_kept = True
            size = sum(map(len, portal.rows or ()))
            try:
                self._account.keep(size)
            except SqlError:
                portal.rows = []
                raise
            portal.size += size

    def drop_prepared(self, name: str) -> None:
        """Drop a prepared statement, if it is there."""
        prepared = self._prepared.pop(name, None)
        if prepared is not None:
            self._account.keep(-prepared.size)

    def drop_portal(self, name: str) -> None:
        """Drop a portal, if it is there."""
        portal = self._portals.pop(name, None)
        if portal is not None:
            self._account.keep(-portal.size)

    def drop_all_prepared(self) -> None:
        """Drop every prepared statement."""
        for name in list(self._prepared):
            self.drop_prepared(name)

    def drop_portals(self, *, but_held: bool = False) -> None:
        """Drop every portal, or those that do not outlive their transaction."""
        for name, portal in list(self._portals.items()):
            if not (but_held and portal.holds):
                self.drop_portal(name)
