"""The statements that this listener accepts, parsed.

sqlglot parses a SELECT; a parse is kept under the statement's text without its literals. Invariant:
each node of the parsed tree is one that this module knows. Everything else is refused, so nothing
is ever ignored in silence.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar

import sqlglot
from sqlglot import exp
from sqlglot.dialects.postgres import Postgres
from sqlglot.errors import SqlglotError
from sqlglot.parsers.postgres import PostgresParser

from syncd.pgwire import types
from syncd.pgwire.commands import parse_command
from syncd.pgwire.errors import SqlError, not_supported, syntax_error
from syncd.pgwire.lexer import split_literals
from syncd.pgwire.parsed import Parsed, Select, Statement, Value

KEPT_STATEMENTS = 1000
"""Parsed statements that are kept, over all connections: a parse takes 200 µs, a look-up 1 µs."""
SCHEMAS = frozenset({"", "syncd", "public", "pg_catalog"})
"""Schemas that a function's or a table's name may have."""


ARGUMENTS: dict[str, tuple[str, ...]] = {
    "search": (
        "dataset",
        "query",
        "k",
        "filter",
        "recall",
        "max_distance",
        "fresh",
        "exact",
        "after",
        "timeout_ms",
        "query_array",
    ),
    "search_key": (
        "dataset",
        "key",
        "k",
        "filter",
        "recall",
        "max_distance",
        "fresh",
        "exact",
        "after",
        "timeout_ms",
    ),
    "datasets": (),
    "status": (),
}
"""Each function's arguments, in the order in which they are passed without names.

``query_array`` stands in for ``query``: the base64 of a ``real[]`` in PostgreSQL's binary form,
which ``syncd.search`` sends. No setting of the session changes it.
"""
REQUIRED = {
    "search": ({"dataset"}, {"query", "query_array"}),
    "search_key": ({"dataset"}, {"key"}),
}
"""Sets of arguments, of each of which a call has exactly one."""


def parse(text: str) -> list[Statement]:
    """The statements of one query string, none for an empty one. Raises ``SqlError``."""
    template, pieces = split_literals(text)
    parsed = _parse(template)
    if isinstance(parsed, SqlError):
        raise parsed.copy()
    return [Statement(each, pieces) for each in parsed]


@lru_cache(KEPT_STATEMENTS)
def _parse(template: str) -> list[Parsed] | SqlError:
    """The statements of a text without literals, or why there are none."""
    try:
        return [_parse_one(part.strip()) for part in template.split(";") if part.strip()]
    except SqlError as error:
        return error
    except (SqlglotError, RecursionError):
        return syntax_error("the statement is not valid SQL")


def _parse_one(text: str) -> Parsed:
    word = text[:20].split(None, 1)[0].upper() if text else ""
    if word.startswith("SELECT"):
        return _select(text)
    command = parse_command(text, _select)
    if command is not None:
        return command
    raise not_supported(f"the statement {word[:20]}" if word.isalpha() else "this statement")


_CLAUSES = {"joins": "JOIN", "order": "ORDER BY", "group": "GROUP BY"}
"""Clauses that sqlglot calls otherwise."""


class _Parser(PostgresParser):
    """PostgreSQL's parser, for which ``search`` is not another product's function."""

    FUNCTIONS: ClassVar = {
        name: build for name, build in PostgresParser.FUNCTIONS.items() if name != "SEARCH"
    }


class _Dialect(Postgres):
    """PostgreSQL's dialect with that parser."""

    Parser = _Parser


def _select(text: str) -> Select:
    tree = sqlglot.parse_one(text, dialect=_Dialect)
    if not isinstance(tree, exp.Select):
        raise not_supported("this form of SELECT")
    parts = _parts(tree, "expressions", "from_", "limit")
    source = parts.get("from_")
    if source is None:
        if [each.sql(dialect=_Dialect).upper() for each in tree.expressions] == [
            "PG_ADVISORY_UNLOCK_ALL()"
        ] and not parts.get("limit"):
            return Select("pg_advisory_unlock_all", {}, None, None)
        raise not_supported("a SELECT without FROM")
    function, arguments, alias = _function(_parts(source, "this")["this"])
    limit = parts.get("limit")
    return Select(
        function,
        arguments,
        _columns(tree.expressions, {alias, function}),
        None if limit is None else _value(_parts(limit, "expression")["expression"]),
    )


def _parts(node: exp.Expr, *allowed: str) -> dict[str, Any]:
    """The parts of a node; raises if it has one that is not ``allowed``."""
    parts = {name: part for name, part in node.args.items() if part not in (None, [], False)}
    for name in parts:
        if name not in allowed:
            raise not_supported(f"{_CLAUSES.get(name, name.strip('_').upper())} in this statement")
    return parts


def _function(table: exp.Expr) -> tuple[str, dict[str, Value], str | int]:
    """The function in FROM: its name, its arguments and its alias."""
    if not isinstance(table, exp.Table):
        raise not_supported("this FROM")
    parts = _parts(table, "this", "db", "alias")
    schema = parts.get("db")
    called = parts["this"]
    if isinstance(called, exp.Anonymous):
        name, given = str(called.name).lower(), list(called.expressions)
    elif isinstance(called, exp.Identifier) and not called.quoted:
        name, given = called.name.lower(), []  # a foreign table names no function
    else:
        raise not_supported("this FROM")
    if name not in ARGUMENTS or (isinstance(called, exp.Identifier) and ARGUMENTS[name]):
        raise not_supported(f"FROM {name[:60]}")
    if schema is not None and (schema.args.get("quoted") or schema.name.lower() not in SCHEMAS):
        raise not_supported(f"schema {schema.name[:60]}")
    alias = parts.get("alias")
    label = name if alias is None else _name(_parts(alias, "this")["this"])
    return name, _arguments(name, given), label


def _arguments(function: str, given: list[exp.Expr]) -> dict[str, Value]:
    names = ARGUMENTS[function]
    found: dict[str, Value] = {}
    for place, each in enumerate(given):
        if isinstance(each, exp.Kwarg | exp.PropertyEQ):  # name => value, name := value
            name, value = each.this.name.lower(), each.expression
        elif len(found) < place or any(isinstance(one, exp.Kwarg) for one in given[:place]):
            raise syntax_error("an argument without a name follows one with a name")
        elif place >= len(names):
            raise syntax_error(f"{function} takes at most {len(names)} arguments")
        else:
            name, value = names[place], each
        if name not in names:
            raise syntax_error(f"{function} has no argument {name[:60]!r}: {', '.join(names)}")
        if name in found:
            raise syntax_error(f"the argument {name!r} is given twice")
        found[name] = _value(value)
    for either in REQUIRED.get(function, ()):
        if len(either & found.keys()) != 1:
            raise syntax_error(f"{function} needs the argument {min(either)!r}")
    return found


def _value(node: exp.Expr) -> Value:
    if isinstance(node, exp.Paren):
        return _value(_parts(node, "this")["this"])
    if isinstance(node, exp.Cast) and type(node) is exp.Cast:
        inner = _value(_parts(node, "this", "to")["this"])
        name = node.to.sql(dialect=_Dialect).lower()
        if name not in types.OIDS:
            raise not_supported(f"a cast to {name[:60]}")
        return Value(inner.piece, inner.constant, inner.oid or types.OIDS[name])
    if isinstance(node, exp.Boolean):
        return Value(constant=bool(node.this))
    if isinstance(node, exp.Null):
        return Value()
    if isinstance(node, exp.Neg):
        inner = _value(_parts(node, "this")["this"])
        if isinstance(inner.constant, int | float) and not isinstance(inner.constant, bool):
            return Value(constant=-inner.constant)
    if isinstance(node, exp.Literal):
        if node.is_string:
            return Value(piece=int(node.name))
        try:
            return Value(constant=int(node.name) if node.name.isdigit() else float(node.name))
        except ValueError:
            raise syntax_error("a number is malformed") from None
    raise not_supported("an argument that is neither a literal nor a parameter")


def _columns(
    nodes: list[exp.Expr], tables: set[str | int]
) -> tuple[tuple[str | int, str | int], ...] | None:
    if len(nodes) == 1 and isinstance(nodes[0], exp.Star):
        _parts(nodes[0])
        return None
    return tuple(_column(node, tables) for node in nodes)


def _column(node: exp.Expr, tables: set[str | int]) -> tuple[str | int, str | int]:
    alias: str | int | None = None
    if isinstance(node, exp.Alias):
        parts = _parts(node, "this", "alias")
        node, alias = parts["this"], _name(parts["alias"])
    if not isinstance(node, exp.Column):
        raise not_supported("a column that is an expression")
    parts = _parts(node, "this", "table")
    if "table" in parts and _name(parts["table"]) not in tables:
        raise not_supported("a column of another table")
    if not isinstance(parts["this"], exp.Identifier):
        raise not_supported("a column that is an expression")
    column = _name(parts["this"])
    return column, column if alias is None else alias


def _name(node: exp.Expr) -> str | int:
    """A name in lower case; for a quoted one, the number of its piece."""
    if not isinstance(node, exp.Identifier):
        raise not_supported("this name")
    return int(node.name) if node.quoted else node.name.lower()
