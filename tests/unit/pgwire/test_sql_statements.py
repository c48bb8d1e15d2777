"""The SQL that the listener for PostgreSQL clients accepts."""

from __future__ import annotations

import random
from typing import Any

import pytest
from pygwire import messages as pg

from syncd.pgwire import calls, results
from syncd.pgwire.calls import Bound
from syncd.pgwire.errors import SqlError
from syncd.pgwire.lexer import MOST_TEXT, Parameter, split_literals
from syncd.pgwire.parsed import Command, Select, Statement
from syncd.pgwire.statements import parse
from syncd.protocol.messages import Params, SearchParams

SEED = 20_261_128


class Recorder:
    """Stands in for the RPC: keeps the parameters of the last call."""

    params: Params | None = None

    def call(self, method: str, params: Params, size: int) -> Any:
        assert (method, size > 0) == ("search", True)
        self.params = params
        return []


def searched(text: str) -> SearchParams:
    """The parameters with which a statement searches."""
    recorder = Recorder()
    (statement,) = parse(text)
    calls.run(statement, Bound(), recorder, len(text))
    assert isinstance(recorder.params, SearchParams)
    return recorder.params


def refused(text: str) -> SqlError:
    with pytest.raises(SqlError) as raised:
        parse(text)
    assert raised.value.hint
    return raised.value


@pytest.mark.parametrize(
    "text",
    [
        "SELECT key, distance FROM search('d', '[1,2]', 5, '{\"a\": 1}', 0.5, 2.5, true)",
        "select * from syncd.search('d', E'[1,\\u0032]', k => 5, filter => '{\"a\": 1}'::jsonb, "
        "recall => '0.5'::real, max_distance => CAST('2.5' AS float8), fresh => 't') s;",
        "SELECT distance FROM search(dataset => $$d$$, query => ARRAY[1,2]::real[], k := 5, "
        "max_distance => 25e-1, recall => .5, fresh => 'yes', filter => $x${\"a\": 1}$x$)",
        "SELECT s.key AS \"My Id\" FROM search('d', '{1,2}', 5, '{\"a\": 1}', 0.5, 2.5, 'on') AS s",
        "/* a 'comment' */ SELECT key -- another\n FROM search('d', '[1,2]', recall => 0.5, "
        "k => 5, filter => E'{\"a\"\\x3a 1}', max_distance => 2.5, fresh => true)",
    ],
)
def test_one_search_in_many_forms_is_the_same_search(text: str) -> None:
    params = searched(text)
    assert params.dataset == "d"
    vector = params.vector
    assert vector in ([1.0, 2.0], b"\0\0\x80?\0\0\0@")
    assert (params.k, params.filter, params.recall) == (5, {"a": 1}, 0.5)
    assert (params.max_distance, params.consistency) == (2.5, "strong")


def test_a_search_by_key_is_more_like_this_row() -> None:
    params = searched("SELECT * FROM search_key('d', 'it''s', 3)")
    assert (params.key, params.vector, params.k, params.consistency) == (
        "it's",
        None,
        3,
        "eventual",
    )


@pytest.mark.parametrize(
    "text",
    [
        "SELECT 1",
        "SELECT now()",
        "SELECT pg_read_file('x')",
        "SELECT * FROM chunks",
        "SELECT * FROM other.search('d', '[1]')",
        "SELECT * FROM search('d', '[1]'), datasets()",
        "SELECT * FROM search('d', '[1]') JOIN chunks USING (key)",
        "SELECT * FROM search('d', '[1]') WHERE distance < 1",
        "SELECT * FROM search('d', '[1]') ORDER BY key",
        "SELECT * FROM search('d', '[1]') OFFSET 1",
        "SELECT * FROM search('d', '[1]') FOR UPDATE",
        "SELECT DISTINCT key FROM search('d', '[1]')",
        "SELECT key || 'x' FROM search('d', '[1]')",
        "SELECT count(*) FROM search('d', '[1]')",
        "SELECT x.key FROM search('d', '[1]')",
        "SELECT * FROM search('d', (SELECT '[1]'))",
        "SELECT * FROM search('d', '[1]'::xml)",
        "SELECT * FROM search('d', b'1')",
        "SELECT * FROM search('d', '[1]' 'x')",
        "SELECT * FROM search('d', '[1]') UNION SELECT * FROM datasets()",
        "WITH s AS (SELECT * FROM search('d', '[1]')) SELECT * FROM s",
        "SELECT * INTO t FROM search('d', '[1]')",
        "INSERT INTO t VALUES (1)",
        "COPY t FROM 'x'",
        "CREATE TABLE t ()",
        "DO $$BEGIN END$$",
        "VALUES (1)",
        "FETCH BACKWARD 1 FROM c",
        "PREPARE x AS SELECT * FROM datasets()",
        "\u00e4",
    ],
)
def test_every_other_statement_is_refused_with_what_works(text: str) -> None:
    error = refused(text)
    assert error.sqlstate == "0A000", error
    assert "search('dataset'" in error.hint


@pytest.mark.parametrize(
    "text",
    [
        "SELECT 'x",
        "SELECT E'x\\'",
        'SELECT "x',
        "SELECT $$x",
        "SELECT $x$ $$",
        "SELECT $",
        "SELECT /* /* */",
        "SELECT * FROM search('d'",
        "SELECT * FROM search('d')",
        "SELECT * FROM search(k => 1, '[1]')",
        "SELECT * FROM search('d', '[1]', dataset => 'd')",
        "SELECT * FROM search('d', '[1]', x => 1)",
        "SELECT * FROM datasets(1)",
        "SELECT " + "(" * 500,
    ],
)
def test_a_malformed_statement_is_a_syntax_error(text: str) -> None:
    assert refused(text).sqlstate == "42601"


def test_a_long_statement_is_refused_unless_its_length_is_in_literals() -> None:
    vector = "[" + ",".join(["0.1"] * 100_000) + "]"
    assert len(searched(f"SELECT * FROM search('d', '{vector}')").vector or ()) == 100_000
    with pytest.raises(SqlError, match="250000 numbers"):
        searched(f"SELECT * FROM search('d', '[{'1,' * 300_000}1]')")
    assert refused("SELECT " + "a, " * MOST_TEXT).sqlstate == "54000"
    assert refused("SELECT " + "'a' " * MOST_TEXT).sqlstate == "54000"
    assert refused("SELECT " + "/**/" * MOST_TEXT).sqlstate == "54000"


def test_what_pools_send_between_uses_is_accepted() -> None:
    text = "SELECT pg_advisory_unlock_all();\nCLOSE ALL;\nUNLISTEN *;\nRESET ALL; DISCARD ALL;"
    assert [type(each.parsed) for each in parse(text)] == [Select, *[Command] * 4]


@pytest.mark.parametrize("text", ["", " ; ;", "-- nothing", "/* nothing */"])
def test_an_empty_statement_is_no_error(text: str) -> None:
    assert parse(text) == []


def test_literals_are_read_as_postgresql_reads_them() -> None:
    text = r"""'a''b' E'\t\'\\x41\101\u00e4\U0001F600\ud83d\ude00' $$a'b$$ $t$ $$ $t$ "a""b" $12"""
    template, pieces = split_literals(text)
    assert template == """'0' '1' '2' '3' "4" '5'"""
    expected = "\t'\\x41A\u00e4\U0001f600\U0001f600"
    assert pieces == ["a'b", expected, "a'b", " $$ ", 'a"b', Parameter(12)]


@pytest.mark.parametrize("text", ["'{}'", "E'{}'", '"{}"'])
@pytest.mark.parametrize("mark", ["\\\\", "''", '""'])
def test_a_statement_that_takes_long_to_read_is_refused(text: str, mark: str) -> None:
    error = refused("$1 " + text.format(mark * 20_000))
    assert error.sqlstate == "54000"
    assert "doubled quotes" in error.message


def test_a_literal_is_never_read_as_sql() -> None:
    rng = random.Random(SEED)
    marks = ["'", '"', "$", "$$", "--", "/*", "*/", ";", "\\", "\n", "E", "x", "[", "$1", "\u00e4"]
    for _ in range(2000):
        value = "".join(rng.choices(marks, k=rng.randint(0, 12)))
        escaped = value.replace("\\", "\\\\").replace("'", "''")
        for literal in ("'" + value.replace("'", "''") + "'", f"E'{escaped}'"):
            params = searched(f"SELECT * FROM search_key('d', {literal}, 3)")
            assert params.key == value


def test_plain_literals_are_split_in_the_same_way_with_and_without_a_comment() -> None:
    rng = random.Random(SEED)
    marks = ["'", "'", "''", "E'", "\\", "$", "$$", "--", "/*", "*/", "\n", " ", "(", ",", "=>"]
    marks += ["'a'", " 'b'", "='c'", "a", "1", '"', "[", "array", "_", "&", "\u00e4"]
    plain = 0
    for _ in range(3000):
        text = "".join(rng.choices(marks, k=rng.randint(1, 7)))
        outcomes = []
        for each in (text, text + "\n/**/"):  # a comment is not plain
            try:
                template, pieces = split_literals(each)
                outcomes.append((template.split(), pieces))
            except SqlError as error:
                outcomes.append(([error.sqlstate], []))
        assert outcomes[0] == outcomes[1], text
        plain += bool(outcomes[0][1])
    assert plain > 300


@pytest.mark.parametrize(
    ("oid", "values", "texts"),
    [
        (701, [1.0, 0.1, -0.0, 1e22, 2.5e-7, 10.25], ["1", "0.1", "-0", "1e22", "2.5e-7", "10.25"]),
        (701, [1.0, None, float("inf"), 0.5], ["1", None, "Infinity", "0.5"]),
        (701, [float("nan")], ["NaN"]),
        (701, [], []),
        (25, [7, "\u00e4", [1, "a"], True], ["7", "\u00e4", '[1,"a"]', "t"]),
        (16, [True, False, None], ["t", "f", None]),
    ],
)
def test_a_column_of_values_has_postgresqls_texts(
    oid: int, values: list[Any], texts: list[str | None]
) -> None:
    messages = results.data_rows([results.encoded(oid, False, "utf-8", values)])
    rows = [pg.DataRow.decode(memoryview(each)[5:]) for each in messages]
    found = [[None if raw is None else bytes(raw).decode() for raw in row.columns] for row in rows]
    assert found == [[text] for text in texts]


def test_no_text_raises_anything_but_an_sql_error() -> None:
    rng = random.Random(SEED)
    good = (
        "SELECT key AS \"k\", distance FROM search('d', E'[1]', k => $1, filter => $$x$$) LIMIT 5;"
    )
    marks = [
        *"'\"$;()[],.=>-/*\\ \n\u00e4",
        "$$",
        "--",
        "/*",
        "E'",
        "SELECT",
        "FROM",
        "search",
        "::",
    ]
    outcomes = set()
    for _ in range(1500):
        pieces = list(good)
        for _ in range(rng.randint(1, 5)):
            place = rng.randrange(len(pieces))
            pieces[place : place + rng.choice([0, 1, 1, 10])] = [rng.choice(marks)]
        try:
            for statement in parse("".join(pieces)):
                if isinstance(statement.parsed, Select):
                    calls.columns_of(statement)
                    calls.parameter_oids(statement, [])
            outcomes.add("ok")
        except SqlError as error:
            outcomes.add(error.sqlstate)
    assert {"ok", "42601", "0A000"} <= outcomes


def test_parameters_have_the_types_of_their_arguments() -> None:
    (statement,) = parse(
        "SELECT * FROM search($1, $2, k => $3, filter => $4, recall => $5::float8, fresh => $6) "
        "LIMIT $7"
    )
    assert calls.parameter_oids(statement, []) == [25, 25, 23, 25, 701, 16, 20]
    assert calls.parameter_oids(statement, [0, 1021]) == [25, 1021, 23, 25, 701, 16, 20]


def test_a_parse_is_kept_for_other_literals() -> None:
    first, second = (
        parse(f"SELECT * FROM search('{name}', '[1]', k => 3)")[0] for name in ("a", "b")
    )
    assert first.parsed is second.parsed
    assert (first.pieces, second.pieces) == (["a", "[1]"], ["b", "[1]"])
    assert isinstance(first, Statement)
