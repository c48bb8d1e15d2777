"""Facts of the catalogue: what a text of them holds, and which rules need a look in each pass."""

from __future__ import annotations

import json

import pytest

from syncd.postgres.catalogue import parse_catalogue

TABLE = {
    "kind": "r",
    "file": 16384,
    "persistence": "p",
    "row_security": [False, False],
    "columns": {"id": [1, 20, -1, 700, ""]},
    "triggers": None,
}


def facts(*rules: str, **more: object) -> str:
    """A text of facts with these rules."""
    named = {"per_row": False, "rules": list(rules), "functions": None, "labels": None, **more}
    return f"{json.dumps(TABLE)}\n\n{json.dumps(named)}"


@pytest.mark.parametrize(
    "rule",
    [
        "('default'::text)",
        "('it''s a.b'::text)",
        '("a.b")',
        '((("Who ""is"" x.y")::text)',
        "((deleted_at IS NULL))",
        "((score > 1.5))",
        "(((kind)::text = ANY ((ARRAY['a'::character varying])::text[])))",
    ],
)
def test_a_rule_that_names_only_columns_is_plain(rule: str) -> None:
    assert parse_catalogue(facts(rule, "(kind)", "(true)")).is_plain


@pytest.mark.parametrize(
    "rule",
    [
        "((mood)::public.feeling)",
        "(public.topic_of(kind))",
        '("My Schema".topic_of(kind))',
        '(public."topic of"(kind))',
        "((kind OPERATOR(public.=) 'a'::text))",
        "((to_tsvector('public.cfg'::regconfig, body) @@ 'x'::tsquery))",
        "((body = ('public.docs'::regclass)::text))",
    ],
)
def test_a_rule_that_names_something_else_is_looked_at_in_each_pass(rule: str) -> None:
    assert not parse_catalogue(facts(rule, "(kind)", "(true)")).is_plain


def test_functions_and_enum_values_are_looked_at_in_each_pass() -> None:
    assert not parse_catalogue(
        facts("(kind)", "(kind)", "(true)", functions={"16390": 700})
    ).is_plain
    assert not parse_catalogue(
        facts("(kind)", "(kind)", "(true)", labels={"16391": "calm"})
    ).is_plain


def test_facts_of_version_0_1_0_have_no_rules_and_are_looked_at_as_a_whole() -> None:
    old = parse_catalogue(json.dumps({**TABLE, "per_row": True}))
    assert (old.per_row, old.rules, old.is_plain) == (True, None, False)
