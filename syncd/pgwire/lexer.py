"""The literals of a statement, apart from the rest of its text.

Most of a search is one literal, the vector. Without literals and parameters the same text comes
again and again, so its parse is kept. Invariant: the text between literals has no quote, comment or
dollar sign left, so that no parser can read a literal's text as SQL. The rules are those of
PostgreSQL's scan.l with standard_conforming_strings on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from syncd.pgwire.errors import SqlError, not_supported, syntax_error

MOST_TEXT = 2000
"""Characters of a statement without its literals. The parser takes up to 8 ms for as many."""
MOST_TOKENS = 500
"""Literals, parameters and comments in a statement."""
MOST_ESCAPES = 10_000
"""Backslashes, and doubled quotes, in a statement: each takes up to 0.3 µs."""

_SPECIAL = re.compile(r"['\"$\[]|--|/\*")
_PLAIN = re.compile(r"'([^']*+(?:''[^']*+)*+)'")
_ESCAPED = re.compile(r"'([^'\\]*+(?:(?:''|\\.)[^'\\]*+)*+)'", re.S)
_NAME = re.compile(r'"([^"]++(?:""[^"]*+)*+)"')
_TAG = re.compile(r"\$((?:[^\W\d]\w*)?)\$")
_PARAMETER = re.compile(r"\$(\d{1,5})(?!\w)")
_NUMBERS = re.compile(r"\[([-+\d.eE,\s]*+)\]")
_ENDS_WITH_ARRAY = re.compile(r"(?<![\w$])array\s*$", re.I)
_ENDS_WITH_E = re.compile(r"(?<![\w$])[eE]$")
_COMMENT_MARK = re.compile(r"/\*|\*/")
_ESCAPE = re.compile(
    rb"\\(?:([0-7]{1,3})|x([0-9a-fA-F]{1,2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.S
)
_BEFORE_LITERALS = frozenset(" \t\n(,=>")
_LETTERS = {b"b": b"\b", b"f": b"\f", b"n": b"\n", b"r": b"\r", b"t": b"\t"}


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter: ``$1`` has number 1."""

    number: int


Piece = str | Parameter


def split_literals(text: str) -> tuple[str, list[Piece]]:
    """A statement's text with ``'0'``, ``'1'``, … for its literals and parameters, and these.

    A quoted name becomes ``"2"``, an array of numbers its text form. Raises ``SqlError``.
    """
    return _split_plain(text) or _split(text)


def _split_plain(text: str) -> tuple[str, list[Piece]] | None:
    """The same for a text whose only special characters are the quotes of plain literals.

    None for other texts. It takes a third of the time for a search.
    """
    parts = text.split("'", 2 * MOST_TOKENS + 1)  # a text of millions of quotes takes no memory
    outside, literals = parts[::2], parts[1::2]
    # An empty part between two literals would be a doubled quote, a letter a literal's prefix.
    if (
        len(outside) == len(literals)
        or len(literals) > MOST_TOKENS
        or not all(part[-1:] in _BEFORE_LITERALS for part in outside[:-1])
    ):
        return None
    rest = "".join(outside)
    if len(rest) > MOST_TEXT or _SPECIAL.search(rest):
        return None
    for place, part in enumerate(outside[1:]):
        outside[place + 1] = f"'{place}'{part}"
    return "".join(outside), list[Piece](literals)


def _split(text: str) -> tuple[str, list[Piece]]:
    if any(text.count(mark) > MOST_ESCAPES for mark in ("\\", "''", '""')):
        raise SqlError(
            "54000",
            f"the statement has more than {MOST_ESCAPES} backslashes or doubled quotes",
            detail="too_large",
            hint="Pass the text as a parameter.",
        )
    rest: list[str] = []
    pieces: list[Piece] = []
    place, room, tokens = 0, MOST_TEXT, 0
    while True:
        found = _SPECIAL.search(text, place, place + room + 2)
        if found is None:
            if len(text) - place > room:
                raise _too_long()
            rest.append(text[place:])
            return "".join(rest), pieces
        start = found.start()
        before = text[place:start]
        room -= len(before)
        tokens += 1
        if room < 0 or tokens > MOST_TOKENS:
            raise _too_long()
        mark = found.group()
        if mark in ("--", "/*"):
            place = _end_of_comment(text, start)
            rest += before, " "
        elif mark == "[":
            numbers = _ENDS_WITH_ARRAY.search(before) and _NUMBERS.match(text, start)
            if numbers:
                before = before.rstrip()[: -len("array")]
                rest += before, f"'{len(pieces)}'"
                pieces.append(f"[{numbers[1]}]")
                place = numbers.end()
            else:
                rest += before, "["
                place = start + 1
        elif mark == '"':
            name = _match(_NAME, text, start, "a quoted name")
            rest += before, f'"{len(pieces)}"'
            pieces.append(name[1].replace('""', '"'))
            place = name.end()
        elif mark == "$":
            place, piece = _dollar(text, start)
            rest += before, f"'{len(pieces)}'"
            pieces.append(piece)
        elif _ENDS_WITH_E.search(before):
            literal = _match(_ESCAPED, text, start, "a literal")
            rest += before[:-1], f"'{len(pieces)}'"
            pieces.append(_unescaped(literal[1]))
            place = literal.end()
        else:
            if before[-1:].isalnum() or before[-1:] in ("_", "&"):
                raise not_supported("a literal with this prefix")
            literal = _match(_PLAIN, text, start, "a literal")
            rest += before, f"'{len(pieces)}'"
            pieces.append(literal[1].replace("''", "'"))
            place = literal.end()


def _match(pattern: re.Pattern[str], text: str, start: int, what: str) -> re.Match[str]:
    found = pattern.match(text, start)
    if found is None:
        raise syntax_error(f"{what} is not terminated")
    return found


def _dollar(text: str, start: int) -> tuple[int, Piece]:
    parameter = _PARAMETER.match(text, start)
    if parameter is not None:
        return parameter.end(), Parameter(int(parameter[1]))
    tag = _TAG.match(text, start)
    if tag is None:
        raise syntax_error("a dollar sign begins neither a parameter nor a literal")
    end = text.find(tag[0], tag.end())
    if end < 0:
        raise syntax_error("a literal is not terminated")
    return end + len(tag[0]), text[tag.end() : end]


def _end_of_comment(text: str, start: int) -> int:
    if text.startswith("--", start):
        end = text.find("\n", start)
        return len(text) if end < 0 else end
    depth, place = 0, start
    for _ in range(MOST_TOKENS):
        mark = _COMMENT_MARK.search(text, place)
        if mark is None:
            raise syntax_error("a comment is not terminated")
        depth += 1 if mark[0] == "/*" else -1
        place = mark.end()
        if not depth:
            return place
    raise _too_long()


def _unescaped(text: str) -> str:
    raw = _ESCAPE.sub(_one_unescaped, text.replace("''", "'").encode("utf-8", "surrogatepass"))
    try:
        # Two escapes may be the halves of one character above U+FFFF.
        halves = raw.decode("utf-8", "surrogatepass").encode("utf-16", "surrogatepass")
        return halves.decode("utf-16")
    except UnicodeError:
        raise SqlError(
            "22021",
            "a literal's escapes are not valid UTF-8",
            hint="Write the characters as they are.",
        ) from None


def _one_unescaped(found: re.Match[bytes]) -> bytes:
    octal, hexadecimal, short, long, letter = found.groups()
    if octal is not None:
        return bytes([int(octal, 8) & 0xFF])
    if hexadecimal is not None:
        return bytes([int(hexadecimal, 16)])
    if letter is not None:
        return _LETTERS.get(letter, letter)
    number = int(short or long, 16)
    if number > 0x10FFFF:
        return b"\xff"  # refused as invalid UTF-8
    return chr(number).encode("utf-8", "surrogatepass")


def _too_long() -> SqlError:
    return SqlError(
        "54000",
        f"the statement has more than {MOST_TEXT} characters outside its literals, "
        f"or more than {MOST_TOKENS} literals and comments",
        detail="too_large",
        hint="Write the vector as a literal '[0.1, 0.2]', or pass it as a parameter.",
    )
