"""Tables, arguments and columns that attach refuses: the hint names the right ones."""

from __future__ import annotations

import psycopg
import pytest

from tests.integration.sources import attach, everything, refused

# Tables


def test_only_a_permanent_table_of_a_user_can_be_attached(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
    scratch.execute(
        "CREATE VIEW seen AS SELECT * FROM items; CREATE MATERIALIZED VIEW kept AS SELECT * FROM "
        "items; CREATE SEQUENCE counted"
    )
    scratch.execute("CREATE TEMPORARY TABLE passing (id int PRIMARY KEY, embedding real[])")
    scratch.execute("CREATE UNLOGGED TABLE fleeting (id int PRIMARY KEY, embedding real[])")
    scratch.execute(
        "CREATE TABLE parted (id int PRIMARY KEY, embedding real[]) PARTITION BY RANGE (id)"
    )
    scratch.execute("CREATE TABLE part PARTITION OF parted FOR VALUES FROM (0) TO (10)")
    scratch.execute(
        "CREATE TABLE parent (id int PRIMARY KEY, embedding real[]); CREATE TABLE child (PRIMARY "
        "KEY (id)) INHERITS (parent)"
    )
    for name in ("seen", "kept", "counted", "items_pkey"):
        with refused(scratch, "is not a table", "table that holds the rows"):
            attach(scratch, name)
    with refused(scratch, "temporary", "permanent"):
        attach(scratch, "passing")
    with refused(scratch, "unlogged", "SET LOGGED"):
        attach(scratch, "fleeting")
    with refused(scratch, "part is a partition of public.parted", "syncd.attach('public.parted')"):
        attach(scratch, "part")
    with refused(scratch, "inheritance", "each child"):
        attach(scratch, "parent")
    attach(scratch, "child")
    for name in ("pg_class", "syncd.consumers", "syncd.attachments"):
        with refused(scratch, "belongs to the system", "table of your own"):
            attach(scratch, name)
    with pytest.raises(psycopg.errors.UndefinedTable, match="nosuch"):
        attach(scratch, "nosuch")
    with pytest.raises(psycopg.Error):
        attach(scratch, "items; DROP TABLE items")


# Arguments


def test_wrong_arguments_are_refused_with_the_right_ones(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
    with refused(scratch, "no metric 'hamming'", "cosine, l2 or ip"):
        attach(scratch, "items", metric="hamming")
    with refused(scratch, "no column nosuch", "columns =>"):
        attach(scratch, "items", columns=["nosuch"])
    with refused(scratch, "no column"):
        scratch.execute("SELECT syncd.attach('items', columns => ARRAY[NULL])")


def test_null_arguments_are_the_defaults(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
    scratch.execute("SELECT syncd.attach('items', NULL, NULL, NULL, NULL, NULL, 'cosine', NULL)")
    before = everything(scratch)
    attach(scratch, "items")
    assert everything(scratch) == before


# Columns to filter on


UNCOMPARABLE = [
    *("json", "interval", "bytea", "point", "time", "oid", "inet", "int4range", "xml"),
    *("timestamptz[]", "float8[]", "char(3)[]", "pair", "blurred"),
]


def test_columns_of_types_that_a_search_cannot_compare_are_refused(
    scratch: psycopg.Connection,
) -> None:
    scratch.execute("CREATE TYPE pair AS (a int, b int); CREATE DOMAIN blurred AS interval")
    columns = ", ".join(f"bad{number} {kind}" for number, kind in enumerate(UNCOMPARABLE))
    scratch.execute(
        f"CREATE TABLE items (id int PRIMARY KEY, embedding real[], fine text, {columns})".encode()
    )
    for number in range(len(UNCOMPARABLE)):
        with refused(
            scratch, f"column bad{number} of type ", "A column to filter on is a number, text"
        ):
            attach(scratch, "items", columns=["fine", f"bad{number}"])
    attach(scratch, "items", columns=["fine"])


def test_a_column_whose_collation_finds_unequal_strings_equal_is_refused(
    scratch: psycopg.Connection,
) -> None:
    try:
        scratch.execute(
            "CREATE COLLATION loose (provider = icu, locale = 'und-u-ks-level2', deterministic = "
            "false)"
        )
    except psycopg.errors.FeatureNotSupported as error:
        pytest.skip(str(error))
    scratch.execute("CREATE DOMAIN vague AS text COLLATE loose")
    scratch.execute(
        "CREATE TABLE items (id int PRIMARY KEY, embedding real[], a text COLLATE loose, b vague)"
    )
    for column in ("a", "b"):
        with refused(scratch, f"column {column} of type", "deterministic collation"):
            attach(scratch, "items", columns=[column])


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (["lang", "lang"], "named twice"),
        (["not"], "means something else"),
        (["or"], "means something else"),
        (["ctid"], "no column"),
    ],
)
def test_columns_that_a_filter_could_not_name_are_refused(
    scratch: psycopg.Connection, columns: list[str], said: str
) -> None:
    scratch.execute(
        'CREATE TABLE items (id int PRIMARY KEY, embedding real[], lang text, "not" int, "or" int)'
    )
    with refused(scratch, said):
        attach(scratch, "items", columns=columns)
