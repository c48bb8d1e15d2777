"""Columns that attach chooses by itself, and the effects of attaching again and of detaching."""

from __future__ import annotations

import psycopg
import pytest

from tests.conftest import has_pgvector
from tests.integration.sources import attach, everything, refused
from tests.servers import PostgresServer

KEY_TYPES = ["smallint", "int", "bigint", "uuid", "text", "varchar", "varchar(40)"]
BUILTIN_VECTOR_TYPES = ["real[]", "double precision[]", "bytea"]


# Columns that attach chooses by itself


def test_without_arguments_the_primary_key_and_the_column_embedding_are_taken(
    scratch: psycopg.Connection,
) -> None:
    scratch.execute(
        "CREATE TABLE items (other real[], id int PRIMARY KEY, embedding real[], third real[])"
    )
    scratch.execute("INSERT INTO items VALUES ('{1}', 1, '{1,2}'), ('{1}', 2, NULL)")
    assert attach(scratch, "items") == (2, 1, 1)
    row = scratch.execute(
        "SELECT source::text, key, vector, project, dataset, live, metric, columns "
        "FROM syncd.sources WHERE vector = 'embedding' AND source = 'items'::regclass"
    ).fetchone()
    assert row == ("items", ["id"], "embedding", "'default'", "'items'", "true", "cosine", [])


def test_the_only_column_of_a_vector_type_is_taken(scratch: psycopg.Connection) -> None:
    scratch.execute(
        "CREATE TABLE items (id int PRIMARY KEY, photo bytea, words text[], v double precision[])"
    )
    attach(scratch, "items")
    assert scratch.execute(
        "SELECT vector FROM syncd.sources WHERE source = 'items'::regclass"
    ).fetchone() == ("v",)


def test_several_vector_columns_are_an_error_that_lists_them(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, a real[], b double precision[])")
    with refused(scratch, "several columns", "a, b"):
        attach(scratch, "items")
    scratch.execute("CREATE TABLE nothing (id int PRIMARY KEY, words text[])")
    with refused(scratch, "no column", "real[]"):
        attach(scratch, "nothing")
    with refused(scratch, "no column nosuch", "a, b"):
        attach(scratch, "items", vector="nosuch")
    with refused(scratch, "holds no vector", "halfvec"):
        attach(scratch, "nothing", vector="words")


@pytest.mark.parametrize(
    "vector_type", [*BUILTIN_VECTOR_TYPES, "vector", "vector(3)", "halfvec", "halfvec(3)"]
)
def test_a_vector_may_be_of_any_of_these_types(
    scratch: psycopg.Connection, any_server: PostgresServer, vector_type: str
) -> None:
    if vector_type not in BUILTIN_VECTOR_TYPES and not has_pgvector(any_server.version):
        pytest.skip(f"PostgreSQL {any_server.version} has no pgvector here")
    scratch.execute(f"CREATE TABLE items (id int PRIMARY KEY, embedding {vector_type})")
    value = (
        "\\x0000803f0000004000004040"
        if vector_type == "bytea"
        else "{1,2,3}"
        if "[]" in vector_type
        else "[1,2,3]"
    )
    scratch.execute("INSERT INTO items VALUES (1, %s)", [value])
    assert attach(scratch, "items") == (1, 1, 1)
    assert scratch.execute(
        "SELECT vector_type, dimension FROM syncd.attachments WHERE source = 'items'::regclass"
    ).fetchone() == (
        vector_type.partition("(")[0],
        3 if "(" in vector_type else None,
    )


@pytest.mark.parametrize("key_type", KEY_TYPES)
def test_a_key_may_be_of_any_of_these_types(scratch: psycopg.Connection, key_type: str) -> None:
    scratch.execute(f"CREATE TABLE items (id {key_type} PRIMARY KEY, embedding real[])")
    assert attach(scratch, "items") == (0, 0, 0)


def test_a_composite_key_keeps_the_order_of_its_index(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE TABLE items (b text, a int, embedding real[], PRIMARY KEY (a, b))")
    attach(scratch, "items")
    assert scratch.execute(
        "SELECT key, key_types FROM syncd.attachments WHERE source = 'items'::regclass"
    ).fetchone() == (
        ["a", "b"],
        ["integer", "text"],
    )
    scratch.execute("INSERT INTO items VALUES ('x', 1, '{1}')")
    assert scratch.execute("SELECT key FROM syncd.outbox WHERE op = 'k'").fetchone() == (
        '[1, "x"]',
    )


@pytest.mark.parametrize(
    "key_type", ["numeric", "time", "char(3)", "boolean", "bytea", "double precision", "amount"]
)
def test_a_key_of_another_type_is_refused(scratch: psycopg.Connection, key_type: str) -> None:
    scratch.execute("CREATE DOMAIN amount AS numeric")
    scratch.execute(f"CREATE TABLE items (id {key_type} PRIMARY KEY, embedding real[])")
    with refused(
        scratch, "key column id of type", "smallint, integer, bigint, uuid, text, varchar, date"
    ):
        attach(scratch, "items")


def test_a_key_must_be_unique_and_never_null(scratch: psycopg.Connection) -> None:
    scratch.execute(
        "CREATE TABLE items (id int, part int NOT NULL, name text NOT NULL UNIQUE, embedding "
        "real[])"
    )
    scratch.execute("CREATE UNIQUE INDEX ON items (part) WHERE part > 0")
    with refused(scratch, "no primary key", "key =>"):
        attach(scratch, "items")
    with refused(scratch, "may be NULL", "SET NOT NULL"):
        attach(scratch, "items", key=["id"])
    with refused(scratch, "no unique index", "CREATE UNIQUE INDEX ON public.items (part);"):
        attach(scratch, "items", key=["part"])
    with refused(scratch, "no unique index"):
        attach(scratch, "items", key=["name", "part"])
    with refused(scratch, "no column nosuch", "key =>"):
        attach(scratch, "items", key=["nosuch"])
    with refused(scratch, "no column"):
        attach(scratch, "items", key=[])
    attach(scratch, "items", key=["name"])  # a unique key in place of a primary key
    scratch.execute("INSERT INTO items VALUES (1, 1, 'a', '{1}')")
    assert scratch.execute("SELECT key FROM syncd.outbox WHERE op = 'k'").fetchone() == ("a",)


def test_a_key_may_be_checked_at_commit(scratch: psycopg.Connection) -> None:
    scratch.execute(
        "CREATE TABLE items (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED, embedding real[])"
    )
    scratch.execute("INSERT INTO items VALUES (1, '{1}'), (2, '{2}')")
    assert attach(scratch, "items") == (2, 2, 1)


# Attaching again, detaching


def test_attaching_again_with_the_same_arguments_changes_nothing(
    scratch: psycopg.Connection,
) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, lang text, embedding real[])")
    attach(scratch, "items", dataset="lang", columns=["lang"])
    before = everything(scratch)
    outbox = scratch.execute("SELECT count(*) FROM syncd.outbox").fetchone()
    attach(scratch, "public.items", dataset="lang", columns=["lang"])
    attach(
        scratch,
        "items",
        key=["id"],
        vector="embedding",
        project="'default'",
        dataset="lang",
        live="true",
        metric="cosine",
        columns=["lang"],
    )
    assert everything(scratch) == before
    assert scratch.execute("SELECT count(*) FROM syncd.outbox").fetchone() == outbox


def test_attaching_with_other_arguments_makes_a_new_attachment(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, lang text, embedding real[])")
    attach(scratch, "items")
    first = scratch.execute(
        "SELECT id FROM syncd.sources WHERE source = 'items'::regclass"
    ).fetchone()
    attach(scratch, "items", metric="l2")
    rows = scratch.execute(
        "SELECT id, metric FROM syncd.sources WHERE source = 'items'::regclass"
    ).fetchall()
    assert first is not None
    assert [row[1] for row in rows] == ["l2"]
    assert rows[0][0] != first[0]
    markers = scratch.execute(
        "SELECT op::text, source FROM syncd.outbox WHERE source >= %s ORDER BY id", [first[0]]
    ).fetchall()
    assert markers == [("a", first[0]), ("d", first[0]), ("a", rows[0][0])]
    assert (
        len(scratch.execute("SELECT FROM pg_trigger WHERE tgrelid = 'items'::regclass").fetchall())
        == 4
    )


def test_attaching_again_repairs_triggers_that_were_dropped_or_switched_off(
    scratch: psycopg.Connection,
) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
    for harm in (
        "DROP TRIGGER {0} ON items",
        "ALTER TABLE items DISABLE TRIGGER {0}",
        "ALTER TABLE items ENABLE TRIGGER {0}",
    ):
        attach(scratch, "items")
        row = scratch.execute(
            "SELECT tgname FROM pg_trigger WHERE tgrelid = 'items'::regclass AND tgname LIKE "
            "'%insert'"
        ).fetchone()
        assert row is not None
        scratch.execute(harm.format(row[0]))
        attach(scratch, "items")
        enabled = scratch.execute(
            "SELECT tgenabled::text FROM pg_trigger WHERE tgrelid = 'items'::regclass"
        ).fetchall()
        assert enabled == [("A",)] * 4


def test_detach_removes_triggers_and_functions_and_says_whether_the_table_was_attached(
    scratch: psycopg.Connection,
) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
    before = [row[:3] for row in everything(scratch)]
    attach(scratch, "items")
    assert scratch.execute("SELECT syncd.detach('items')").fetchone() == (True,)
    assert [row[:3] for row in everything(scratch)] == before
    assert scratch.execute("SELECT syncd.detach('items')").fetchone() == (False,)
    with refused(scratch, "does not exist", "syncd.sources"):
        scratch.execute("SELECT syncd.detach('nosuch')")


def test_a_dropped_source_is_detached_by_its_number(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
    attach(scratch, "items")
    scratch.execute("DROP TABLE items")
    row = scratch.execute(
        "SELECT source::text FROM syncd.sources WHERE source <> 'syncd.embeddings'::regclass"
    ).fetchone()
    assert row is not None
    assert row[0].isdigit()
    assert scratch.execute("SELECT syncd.detach(%s)", row).fetchone() == (True,)


def test_a_rollback_undoes_an_attach(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
    before = everything(scratch)
    with scratch.transaction(force_rollback=True):
        attach(scratch, "items")
    assert everything(scratch) == before
