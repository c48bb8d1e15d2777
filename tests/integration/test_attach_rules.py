"""The rules of a source: project, dataset and live, each one immutable expression over the row.

attach counts the rows, live rows and datasets that they give.
"""

from __future__ import annotations

import psycopg
import pytest

from tests.integration.sources import attach, everything, refused


def test_the_result_counts_rows_live_rows_and_their_datasets(scratch: psycopg.Connection) -> None:
    scratch.execute(
        "CREATE TABLE items "
        "(id int PRIMARY KEY, lang text, gone boolean NOT NULL, embedding real[])"
    )
    scratch.execute(
        "INSERT INTO items SELECT i, CASE WHEN i % 2 = 0 THEN 'en' ELSE 'de' END, i > 8, "
        "CASE WHEN i > 1 THEN '{1,2}'::real[] END FROM generate_series(1, 10) i"
    )
    assert attach(scratch, "items", project="'p' || id % 3", dataset="lang", live="NOT gone") == (
        10,
        7,
        6,
    )


def test_a_rule_that_matches_no_row_raises_a_warning_that_says_so(
    scratch: psycopg.Connection,
) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
    warnings: list[tuple[str | None, ...]] = []
    scratch.add_notice_handler(
        lambda notice: warnings.append(
            (notice.severity, notice.message_primary, notice.message_hint)
        )
    )
    attach(scratch, "items", live="false")
    assert warnings == []  # an empty table does not show that the rule is wrong
    scratch.execute("INSERT INTO items VALUES (1, '{1}')")
    assert attach(scratch, "items", live="id > 1") == (1, 0, 0)
    ((severity, message, hint),) = warnings
    assert severity == "WARNING"
    assert (
        message
        == "none of the 1 rows of items is live: the rule is id > 1 and embedding IS NOT NULL"
    )
    assert hint


@pytest.mark.parametrize(
    "expression",
    [
        "now()::text",
        "(SELECT max(lang) FROM items)",
        "max(lang)",
        "generate_series(1, 2)::text",
        "row_number() OVER ()",
        "nosuch",
        "items.*",
        "",
        "  ",
        "lang lang",
        "lang -- all of them",
        "lang), (lang",
        "1)); DROP TABLE victim; --",
        "1))); DROP TABLE victim; --",
        "'x')))); DROP TABLE victim; --",
        "1)) FROM items; DROP TABLE victim; SELECT ((1",
        "lang)::text), ((id",
        "'x'))) WHERE (((true",
        "$1",
        "'unclosed",
        "/* unclosed",
    ],
)
@pytest.mark.parametrize("argument", ["project", "dataset", "live"])
def test_only_one_immutable_expression_over_the_row_is_accepted(
    scratch: psycopg.Connection, argument: str, expression: str
) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, lang text, embedding real[])")
    scratch.execute("CREATE TABLE victim (id int)")
    scratch.execute("INSERT INTO items VALUES (1, 'de', '{1}')")
    before = everything(scratch)
    with refused(scratch, f"the {argument} expression"):
        attach(scratch, "items", **{argument: expression})
    assert everything(scratch) == before


def test_an_expression_of_another_type_is_refused(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, lang text, embedding real[])")
    with refused(scratch, "the live expression", "boolean"):
        attach(scratch, "items", live="embedding")
    with refused(scratch, "the live expression", "boolean"):
        attach(scratch, "items", live="1)::text) || ((lang")


def test_an_expression_means_the_same_under_any_search_path(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE SCHEMA app; CREATE SCHEMA evil")
    scratch.execute(
        "CREATE FUNCTION app.label(int) RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT 'app-' || "
        "$1 $$"
    )
    scratch.execute(
        "CREATE FUNCTION evil.label(int) RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT 'evil-' "
        "|| $1 $$"
    )
    scratch.execute("CREATE TYPE app.kind AS ENUM ('a', 'b')")
    scratch.execute(
        "CREATE TABLE app.items (id int PRIMARY KEY, kind app.kind DEFAULT 'a', embedding real[])"
    )
    scratch.execute("SET search_path = app")
    attach(scratch, "items", dataset="label(id)", live="kind = 'a'::kind")
    assert scratch.execute("SHOW search_path").fetchone() == ("app",)
    compiled = scratch.execute(
        "SELECT dataset, live FROM syncd.attachments WHERE source = 'items'::regclass"
    ).fetchone()
    assert compiled is not None
    scratch.execute("SET search_path = evil, public")
    scratch.execute("INSERT INTO app.items VALUES (7)")
    assert scratch.execute(f"SELECT {compiled[0]}, {compiled[1]} FROM app.items").fetchone() == (
        "app-7",
        True,
    )


def test_a_rule_that_fails_on_a_row_fails_attach_and_says_why(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, n int, embedding real[])")
    scratch.execute("INSERT INTO items VALUES (1, 1, '{1}'), (2, 0, '{1}')")
    before = everything(scratch)
    with refused(scratch, "rows of table items cannot be counted: division by zero", "CASE"):
        attach(scratch, "items", live="10 / n > 1")
    with refused(scratch, "cannot be counted: division by zero", "CASE"):
        attach(scratch, "items", dataset="(10 / n)::text")
    assert everything(scratch) == before
    attach(scratch, "items", live="CASE WHEN n <> 0 THEN 10 / n > 1 END")
