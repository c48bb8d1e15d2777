"""Commands that return no rows of a search: settings, transactions, cursors, and what pools send.

Their texts are compared whole, with patterns: a parser for SELECT would accept more than is meant.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from syncd.pgwire.parsed import Command, Declare, Fetch, Parsed, Select, Show

ParseSelect = Callable[[str], Select]
Build = Callable[[re.Match[str], ParseSelect], Parsed]


def parse_command(text: str, select: ParseSelect) -> Parsed | None:
    """The command that a text without literals is; None if it is none.

    ``select`` parses the SELECT of a cursor.
    """
    for pattern, build in _COMMANDS:
        found = pattern.fullmatch(text)
        if found is not None:
            return build(found, select)
    return None


_WORD = r"[A-Za-z_]\w*"
_CURSOR = rf'(?P<name>{_WORD}|"\d+")'


def _identifier(text: str) -> str | int:
    return int(text[1:-1]) if text.startswith('"') else text.lower()


def _declare(found: re.Match[str], select: ParseSelect) -> Parsed:
    return Declare(_identifier(found["name"]), select(found["select"]), found["hold"] is not None)


def _fetch(found: re.Match[str], _: ParseSelect) -> Parsed:
    count = (found["count"] or "1").upper()
    moves = found["what"].upper() == "MOVE"
    if count == "NEXT":
        count = "1"
    return Fetch(_identifier(found["name"]), None if count == "ALL" else int(count), moves)


def _set(found: re.Match[str], _: ParseSelect) -> Parsed:
    name, value = found["name"].lower(), found["value"].strip()
    if name == "names":
        name = "client_encoding"
    piece = re.fullmatch(r"'(\d+)'|\"(\d+)\"", value)
    return Command("SET", "set", name, int(piece[1] or piece[2]) if piece else value)


def _show(found: re.Match[str], _: ParseSelect) -> Parsed:
    return Show(re.sub(r"\s+", "_", found["name"].lower()))


def _plain(tag: str, effect: str = "") -> Build:
    def build(found: re.Match[str], _: ParseSelect) -> Parsed:
        name = found.groupdict().get("name")
        return Command(tag, effect, "", "" if name is None else _identifier(name))

    return build


def _patterns() -> Iterator[tuple[re.Pattern[str], Build]]:
    work = r"(?:\s+(?:WORK|TRANSACTION))?"
    modes = r"(?:\s+[\w\s,]*)?"
    chain = r"(?:\s+AND\s+(?:NO\s+)?CHAIN)?"
    for pattern, build in (
        (rf"BEGIN{work}{modes}", _plain("BEGIN", "begin")),
        (rf"START\s+TRANSACTION{modes}", _plain("START TRANSACTION", "begin")),
        (rf"(?:COMMIT|END){work}{chain}", _plain("COMMIT", "commit")),
        (rf"(?:ROLLBACK|ABORT){work}{chain}", _plain("ROLLBACK", "rollback")),
        (
            rf"ROLLBACK{work}\s+TO\s+(?:SAVEPOINT\s+)?{_CURSOR}",
            _plain("ROLLBACK", "rollback_to"),
        ),
        (rf"SAVEPOINT\s+{_CURSOR}", _plain("SAVEPOINT")),
        (rf"RELEASE\s+(?:SAVEPOINT\s+)?{_CURSOR}", _plain("RELEASE")),
        (
            r"SET\s+(?:SESSION\s+|LOCAL\s+)?TIME\s+ZONE\s+(?:'\d+'|[\w.-]+)",
            _plain("SET"),
        ),
        (r"SET\s+(?:SESSION\s+CHARACTERISTICS\s+AS\s+)?TRANSACTION\s+[\w\s,]+", _plain("SET")),
        (r"SET\s+(?P<name>NAMES)\s+(?P<value>'\d+'|\w+)", _set),
        (
            rf"SET\s+(?:SESSION\s+|LOCAL\s+)?(?P<name>{_WORD}(?:\.{_WORD})?)\s*(?:=|\s+TO\s+)"
            r"(?P<value>[\w\s'\",.+-]+)",
            _set,
        ),
        (rf"RESET\s+(?:{_WORD}(?:\.{_WORD})?|SESSION\s+AUTHORIZATION)", _plain("RESET")),
        (
            rf"SHOW\s+(?P<name>{_WORD}(?:\.{_WORD})?|TRANSACTION\s+ISOLATION\s+LEVEL|TIME\s+ZONE)",
            _show,
        ),
        (r"DISCARD\s+ALL", _plain("DISCARD ALL", "discard")),
        (r"DISCARD\s+PLANS", _plain("DISCARD PLANS")),
        (r"DISCARD\s+SEQUENCES", _plain("DISCARD SEQUENCES")),
        (r"DISCARD\s+TEMP(?:ORARY)?", _plain("DISCARD TEMP")),
        (r"CLOSE\s+ALL", _plain("CLOSE CURSOR ALL", "close_all")),
        (rf"CLOSE\s+{_CURSOR}", _plain("CLOSE CURSOR", "close")),
        (r"UNLISTEN\s+(?:\*|\w+)", _plain("UNLISTEN")),
        (r"DEALLOCATE\s+(?:PREPARE\s+)?ALL", _plain("DEALLOCATE ALL", "deallocate_all")),
        (rf"DEALLOCATE\s+(?:PREPARE\s+)?{_CURSOR}", _plain("DEALLOCATE", "deallocate")),
        (
            rf"DECLARE\s+{_CURSOR}(?:\s+(?:INSENSITIVE|ASENSITIVE|NO\s+SCROLL))*\s+CURSOR"
            r"(?:\s+(?P<hold>WITH\s+HOLD)|\s+WITHOUT\s+HOLD)?\s+FOR\s+(?P<select>SELECT\b.*)",
            _declare,
        ),
        (
            rf"(?P<what>FETCH|MOVE)(?:\s+FORWARD)?(?:\s+(?P<count>\d{{1,9}}|ALL|NEXT))?"
            rf"(?:\s+(?:FROM|IN))?\s+{_CURSOR}",
            _fetch,
        ),
    ):
        yield re.compile(pattern, re.I | re.S), build


_COMMANDS = list(_patterns())
