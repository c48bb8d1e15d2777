"""What attach and detach take, what they refuse and how, and what they leave behind."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from syncd.postgres import schema
from tests.conftest import has_pgvector
from tests.daemon import Daemon
from tests.integration.sources import attach, connected_as, everything, refused, role
from tests.servers import PostgresServer, bindir

KEY_TYPES = ["smallint", "int", "bigint", "uuid", "text", "varchar", "varchar(40)"]
BUILTIN_VECTOR_TYPES = ["real[]", "double precision[]", "bytea"]


def definitions(db: psycopg.Connection) -> list[tuple[Any, ...]]:
    """What schema syncd is made of, without what differs from one installation to the next."""
    return db.execute(
        "SELECT 'column', c.relname, a.attname, format_type(a.atttypid, a.atttypmod), pg_get_expr(d.adbin, d.adrelid)"
        " FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum"
        " WHERE c.relnamespace = 'syncd'::regnamespace AND a.attnum > 0 UNION ALL"
        " SELECT 'function', proname, pg_get_functiondef(oid), NULL, NULL FROM pg_proc WHERE pronamespace = 'syncd'::regnamespace UNION ALL"
        " SELECT 'index', indexname, indexdef, NULL, NULL FROM pg_indexes WHERE schemaname = 'syncd' UNION ALL"
        " SELECT 'trigger', tgname, pg_get_triggerdef(oid), tgenabled::text, NULL FROM pg_trigger WHERE NOT tgisinternal UNION ALL"
        " SELECT 'version', version_num, NULL, NULL, NULL FROM syncd.alembic_version UNION ALL"
        " SELECT 'source', source::text, arguments::text, NULL, NULL FROM syncd.attachments ORDER BY 1, 2, 3"
    ).fetchall()


# Installing


def test_installing_twice_changes_nothing(any_db: psycopg.Connection, any_database: str) -> None:
    before = everything(any_db)
    assert schema.install(any_database) == (schema.newest_revision(), schema.newest_revision())
    assert everything(any_db) == before


def test_the_printed_sql_installs_the_same(any_server: PostgresServer, any_db: psycopg.Connection) -> None:
    name = "from_script"
    conninfo = any_server.create_database(name)
    try:
        psql = [str(bindir(any_server.version) / "psql"), "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", conninfo]
        done = subprocess.run(psql, input=schema.install_script(), text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        with psycopg.connect(conninfo, autocommit=True) as scripted:
            assert definitions(scripted) == definitions(any_db)
        assert schema.install(conninfo) == (schema.newest_revision(), schema.newest_revision())
    finally:
        any_server.drop_database(name)


def test_a_role_that_may_create_in_the_database_installs_and_attaches_without_being_superuser(
    any_server: PostgresServer,
) -> None:
    with role(any_server, "plain_owner"):
        conninfo = any_server.create_database("plain")
        any_server.execute("ALTER DATABASE plain OWNER TO plain_owner")
        try:
            schema.install(make_conninfo(conninfo, user="plain_owner"))
            with connected_as(conninfo, "plain_owner") as db:
                db.execute("CREATE SCHEMA mine CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
                db.execute("INSERT INTO mine.items VALUES (1, '{1,2}')")
                assert attach(db, "mine.items") == (1, 1, 1)
                db.execute("INSERT INTO mine.items VALUES (2, '{1,2}')")
                assert db.execute("SELECT syncd.detach('mine.items')").fetchone() == (True,)
            assert schema.uninstall(make_conninfo(conninfo, user="plain_owner"))
        finally:
            any_server.drop_database("plain")


# What attach finds out by itself


def test_without_arguments_the_primary_key_and_the_column_embedding_are_taken(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE TABLE items (other real[], id int PRIMARY KEY, embedding real[], third real[])")
    scratch.execute("INSERT INTO items VALUES ('{1}', 1, '{1,2}'), ('{1}', 2, NULL)")
    assert attach(scratch, "items") == (2, 1, 1)
    row = scratch.execute("SELECT source::text, key, vector, project, dataset, live, metric, columns FROM syncd.sources WHERE vector = 'embedding'"
                         " AND source = 'items'::regclass").fetchone()  # fmt: skip
    assert row == ("items", ["id"], "embedding", "'default'", "'items'", "true", "cosine", [])


def test_the_only_column_of_a_vector_type_is_taken(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, photo bytea, words text[], v double precision[])")
    attach(scratch, "items")
    assert scratch.execute("SELECT vector FROM syncd.sources WHERE source = 'items'::regclass").fetchone() == ("v",)


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


@pytest.mark.parametrize("vector_type", [*BUILTIN_VECTOR_TYPES, "vector", "vector(3)", "halfvec", "halfvec(3)"])
def test_a_vector_may_be_of_any_of_these_types(
    scratch: psycopg.Connection, any_server: PostgresServer, vector_type: str
) -> None:
    if vector_type not in BUILTIN_VECTOR_TYPES and not has_pgvector(any_server.version):
        pytest.skip(f"PostgreSQL {any_server.version} has no pgvector here")
    scratch.execute(f"CREATE TABLE items (id int PRIMARY KEY, embedding {vector_type})")
    value = "\\x0000803f0000004000004040" if vector_type == "bytea" else "{1,2,3}" if "[]" in vector_type else "[1,2,3]"
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
    assert scratch.execute("SELECT key FROM syncd.outbox WHERE op = 'k'").fetchone() == ('[1, "x"]',)


@pytest.mark.parametrize(
    "key_type", ["numeric", "timestamptz", "char(3)", "boolean", "bytea", "date", "double precision", "amount"]
)
def test_a_key_of_another_type_is_refused(scratch: psycopg.Connection, key_type: str) -> None:
    scratch.execute("CREATE DOMAIN amount AS int")
    scratch.execute(f"CREATE TABLE items (id {key_type} PRIMARY KEY, embedding real[])")
    with refused(scratch, "key column id of type", "smallint, integer, bigint, uuid, text or varchar"):
        attach(scratch, "items")


def test_a_key_must_be_unique_and_never_null(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE TABLE items (id int, part int NOT NULL, name text NOT NULL UNIQUE, embedding real[])")
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


def test_a_key_may_be_one_that_is_checked_at_commit(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED, embedding real[])")
    scratch.execute("INSERT INTO items VALUES (1, '{1}'), (2, '{2}')")
    assert attach(scratch, "items") == (2, 2, 1)


def test_the_result_counts_rows_live_rows_and_their_datasets(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, lang text, gone boolean NOT NULL, embedding real[])")
    scratch.execute("INSERT INTO items SELECT i, CASE WHEN i % 2 = 0 THEN 'en' ELSE 'de' END, i > 8, CASE WHEN i > 1 THEN '{1,2}'::real[] END"
                   " FROM generate_series(1, 10) i")  # fmt: skip
    assert attach(scratch, "items", project="'p' || id % 3", dataset="lang", live="NOT gone") == (10, 7, 6)


def test_a_rule_that_matches_no_row_raises_a_warning_that_says_so(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
    warnings: list[tuple[str | None, ...]] = []
    scratch.add_notice_handler(
        lambda notice: warnings.append((notice.severity, notice.message_primary, notice.message_hint))
    )
    attach(scratch, "items", live="false")
    assert warnings == []  # an empty table proves nothing
    scratch.execute("INSERT INTO items VALUES (1, '{1}')")
    assert attach(scratch, "items", live="id > 1") == (1, 0, 0)
    ((severity, message, hint),) = warnings
    assert severity == "WARNING"
    assert message == "none of the 1 rows of items is live: the rule is id > 1 and embedding IS NOT NULL"
    assert hint


# Expressions


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
)  # fmt: skip
@pytest.mark.parametrize("argument", ["project", "dataset", "live"])
def test_what_is_not_one_immutable_expression_over_the_row_is_refused(
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
    scratch.execute("CREATE FUNCTION app.label(int) RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT 'app-' || $1 $$")
    scratch.execute("CREATE FUNCTION evil.label(int) RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT 'evil-' || $1 $$")
    scratch.execute("CREATE TYPE app.kind AS ENUM ('a', 'b')")
    scratch.execute("CREATE TABLE app.items (id int PRIMARY KEY, kind app.kind DEFAULT 'a', embedding real[])")
    scratch.execute("SET search_path = app")
    attach(scratch, "items", dataset="label(id)", live="kind = 'a'::kind")
    assert scratch.execute("SHOW search_path").fetchone() == ("app",)
    compiled = scratch.execute(
        "SELECT dataset, live FROM syncd.attachments WHERE source = 'items'::regclass"
    ).fetchone()
    assert compiled is not None
    scratch.execute("SET search_path = evil, public")
    scratch.execute("INSERT INTO app.items VALUES (7)")
    assert scratch.execute(f"SELECT {compiled[0]}, {compiled[1]} FROM app.items").fetchone() == ("app-7", True)


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


def test_a_rule_that_fails_on_a_later_row_fails_no_write(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, n int, embedding real[])")
    attach(scratch, "items", live="10 / n > 1", project="(10 / n)::text", dataset="chr(n)")
    scratch.execute("INSERT INTO items VALUES (1, 0, '{1}')")
    scratch.execute("UPDATE items SET n = -1")
    scratch.execute("DELETE FROM items")
    assert outbox(scratch) == [("k", "1")] * 3


# Attaching again, detaching


def test_attaching_again_with_the_same_arguments_changes_nothing(scratch: psycopg.Connection) -> None:
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


def test_attaching_with_other_arguments_attaches_anew(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, lang text, embedding real[])")
    attach(scratch, "items")
    first = scratch.execute("SELECT id FROM syncd.sources WHERE source = 'items'::regclass").fetchone()
    attach(scratch, "items", metric="l2")
    rows = scratch.execute("SELECT id, metric FROM syncd.sources WHERE source = 'items'::regclass").fetchall()
    assert first is not None
    assert [row[1] for row in rows] == ["l2"]
    assert rows[0][0] != first[0]
    markers = scratch.execute(
        "SELECT op::text, source FROM syncd.outbox WHERE source >= %s ORDER BY id", [first[0]]
    ).fetchall()
    assert markers == [("a", first[0]), ("d", first[0]), ("a", rows[0][0])]
    assert len(scratch.execute("SELECT FROM pg_trigger WHERE tgrelid = 'items'::regclass").fetchall()) == 4


def test_attaching_again_mends_triggers_that_were_dropped_or_switched_off(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
    for harm in (
        "DROP TRIGGER {0} ON items",
        "ALTER TABLE items DISABLE TRIGGER {0}",
        "ALTER TABLE items ENABLE TRIGGER {0}",
    ):
        attach(scratch, "items")
        row = scratch.execute(
            "SELECT tgname FROM pg_trigger WHERE tgrelid = 'items'::regclass AND tgname LIKE '%insert'"
        ).fetchone()
        assert row is not None
        scratch.execute(harm.format(row[0]))
        attach(scratch, "items")
        enabled = scratch.execute("SELECT tgenabled::text FROM pg_trigger WHERE tgrelid = 'items'::regclass").fetchall()
        assert enabled == [("A",)] * 4


def test_detach_removes_triggers_and_functions_and_says_whether_there_was_something(
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


def test_what_attach_does_is_undone_by_a_rollback(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
    before = everything(scratch)
    with scratch.transaction(force_rollback=True):
        attach(scratch, "items")
    assert everything(scratch) == before


# Which tables


def test_what_is_no_permanent_table_of_ones_own_is_refused(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
    scratch.execute(
        "CREATE VIEW seen AS SELECT * FROM items; CREATE MATERIALIZED VIEW kept AS SELECT * FROM items; CREATE SEQUENCE counted"
    )
    scratch.execute("CREATE TEMPORARY TABLE passing (id int PRIMARY KEY, embedding real[])")
    scratch.execute("CREATE UNLOGGED TABLE fleeting (id int PRIMARY KEY, embedding real[])")
    scratch.execute("CREATE TABLE parted (id int PRIMARY KEY, embedding real[]) PARTITION BY RANGE (id)")
    scratch.execute("CREATE TABLE part PARTITION OF parted FOR VALUES FROM (0) TO (10)")
    scratch.execute(
        "CREATE TABLE parent (id int PRIMARY KEY, embedding real[]); CREATE TABLE child (PRIMARY KEY (id)) INHERITS (parent)"
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


def test_wrong_arguments_are_refused_with_what_to_give(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
    with refused(scratch, "no metric 'hamming'", "cosine, l2 or ip"):
        attach(scratch, "items", metric="hamming")
    with refused(scratch, "no column nosuch", "columns =>"):
        attach(scratch, "items", columns=["nosuch"])
    with refused(scratch, "no column"):
        scratch.execute("SELECT syncd.attach('items', columns => ARRAY[NULL])")


UNCOMPARABLE = ["json", "interval", "bytea", "point", "time", "oid", "inet", "int4range", "xml", "timestamptz[]", "float8[]", "char(3)[]",
                "pair", "blurred"]  # fmt: skip


def test_columns_of_types_that_a_search_cannot_compare_are_refused(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE TYPE pair AS (a int, b int); CREATE DOMAIN blurred AS interval")
    columns = ", ".join(f"bad{number} {kind}" for number, kind in enumerate(UNCOMPARABLE))
    scratch.execute(f"CREATE TABLE items (id int PRIMARY KEY, embedding real[], fine text, {columns})".encode())
    for number in range(len(UNCOMPARABLE)):
        with refused(scratch, f"column bad{number} of type ", "A column to filter on is a number, text"):
            attach(scratch, "items", columns=["fine", f"bad{number}"])
    attach(scratch, "items", columns=["fine"])


def test_a_column_whose_collation_finds_unequal_strings_equal_is_refused(scratch: psycopg.Connection) -> None:
    try:
        scratch.execute("CREATE COLLATION loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false)")
    except psycopg.errors.FeatureNotSupported as error:
        pytest.skip(str(error))
    scratch.execute("CREATE DOMAIN vague AS text COLLATE loose")
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[], a text COLLATE loose, b vague)")
    for column in ("a", "b"):
        with refused(scratch, f"column {column} of type", "deterministic collation"):
            attach(scratch, "items", columns=[column])


@pytest.mark.parametrize(("columns", "said"), [
    (["lang", "lang"], "named twice"), (["not"], "means something else"), (["or"], "means something else"), (["ctid"], "no column"),
])  # fmt: skip
def test_columns_that_a_filter_could_not_name_are_refused(
    scratch: psycopg.Connection, columns: list[str], said: str
) -> None:
    scratch.execute('CREATE TABLE items (id int PRIMARY KEY, embedding real[], lang text, "not" int, "or" int)')
    with refused(scratch, said):
        attach(scratch, "items", columns=columns)


def test_null_arguments_are_the_defaults(scratch: psycopg.Connection) -> None:
    scratch.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
    scratch.execute("SELECT syncd.attach('items', NULL, NULL, NULL, NULL, NULL, 'cosine', NULL)")
    before = everything(scratch)
    attach(scratch, "items")
    assert everything(scratch) == before


@pytest.mark.parametrize("column", ["n", "o", "old", "new", "key", "k", "source", "op", "slot", "syncd_n", "syncd_k",
                                    "syncd_key", "syncd_key_before", "syncd_slot",
                                    "event", "TG_OP", "id", "user", "select", "ctid2",
                                    "percent%s", "br{ace}s", "quo\"te", "it's", "Großbuchstaben"])  # fmt: skip
@pytest.mark.parametrize("composite", [False, True])
@pytest.mark.parametrize("partitioned", [False, True])
def test_columns_may_have_any_name(
    scratch: psycopg.Connection, column: str, composite: bool, partitioned: bool
) -> None:
    name = sql.Identifier(column)
    key = sql.SQL("{}, b").format(name) if composite else name
    scratch.execute(
        sql.SQL("CREATE TABLE items ({} int, b int DEFAULT 1, embedding real[], PRIMARY KEY ({})) {}").format(
            name, key, sql.SQL("PARTITION BY HASH ({})").format(name) if partitioned else sql.SQL("")
        )
    )
    if partitioned:
        scratch.execute("CREATE TABLE all_items PARTITION OF items FOR VALUES WITH (MODULUS 1, REMAINDER 0)")
    attach(scratch, "items", columns=[column])
    scratch.execute("INSERT INTO items VALUES (1, 1, '{1}'), (2, 1, '{1}')")
    scratch.execute(sql.SQL("UPDATE items SET {0} = {0} + 10").format(name))
    scratch.execute(sql.SQL("DELETE FROM items WHERE {} = 11").format(name))
    found = [row[0] for row in scratch.execute("SELECT key FROM syncd.outbox WHERE op = 'k' ORDER BY id").fetchall()]
    keys = [1, 2, 1, 2, 11, 12, 11]
    assert sorted(found) == sorted([f"[{key}, 1]" for key in keys] if composite else map(str, keys))
    assert scratch.execute("SELECT count(*) FROM syncd.outbox WHERE op = 'r'").fetchone() == (0,)


STRANGE_NAMES = [
    ('My "Schema"', 'Table 100% {x} %s %(y)s'),
    ("it's; --", "UPPER case.with.dots"),
    ("pg-temp", "a" * 63),
]  # fmt: skip


def test_rows_are_found_whatever_the_schema_the_table_and_the_columns_are_called(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    datasets: list[tuple[str, sql.Identifier]] = []
    for schema_name, table in STRANGE_NAMES:
        names = {"schema": sql.Identifier(schema_name), "table": sql.Identifier(schema_name, table)}
        db.execute(sql.SQL("CREATE SCHEMA {schema}").format(**names))
        db.execute(
            sql.SQL(
                'CREATE TABLE {table} ("I %d{{0}}" int, "k%" text, "V {{}} %s" real[], "a%" jsonb, PRIMARY KEY ("I %d{{0}}", "k%"))'
            ).format(**names)
        )
        db.execute(
            sql.SQL(
                """INSERT INTO {table} SELECT i, 'k%s', ARRAY[i, 1], '{{"a": {{"b%": 1}}}}' FROM generate_series(1, 4) i"""
            ).format(**names)
        )
        source = sql.Identifier(schema_name, table).as_string(db)
        live = """"a%" @> '{"a": {"b%": 1}}' AND "I %d{0}" % 2 = 0 AND 'x' LIKE '%x%'"""
        assert attach(
            db, source, dataset="""'d%s{0}' || "I %d{0}" % 2""", project=f"'{len(datasets)}'", live=live, metric="l2"
        ) == (4, 2, 1)
        assert db.execute("SELECT count(*) FROM syncd.sources WHERE source = %s::regclass", [source]).fetchone() == (1,)
        datasets.append((f"{len(datasets)}/d%s{{0}}0", names["table"]))
    daemon.start()
    with daemon.client() as client:
        for dataset, name in datasets:
            assert sorted(client.keys(dataset)) == [(2, "k%s"), (4, "k%s")]
            db.execute(sql.SQL("""UPDATE {} SET "k%" = 'K' WHERE "I %d{{0}}" = 2""").format(name))
            db.execute(sql.SQL("""INSERT INTO {} VALUES (6, '', '{{9,9}}', '{{"a": {{"b%": 1}}}}')""").format(name))
            assert [hit.key for hit in client.search(dataset, [2, 1], consistency="strong")] == [
                (2, "K"),
                (4, "k%s"),
                (6, ""),
            ]
    daemon.stop()
    daemon.start()
    with daemon.client() as client:
        for dataset, _ in datasets:
            assert sorted(client.keys(dataset)) == [(2, "K"), (4, "k%s"), (6, "")]


# Who may


def test_only_the_owner_attaches_and_detaches(
    any_server: PostgresServer, any_db: psycopg.Connection, any_database: str
) -> None:
    any_db.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
    with role(any_server, "stranger"):
        any_db.execute("GRANT USAGE ON SCHEMA syncd TO stranger; GRANT ALL ON items TO stranger")
        with connected_as(any_database, "stranger") as stranger:
            with refused(stranger, "must be owner", "owner of the table"):
                attach(stranger, "items")
            attach(any_db, "items")
            with refused(stranger, "must be owner", "owner of the table"):
                stranger.execute("SELECT syncd.detach('items')")
        any_db.execute("DROP OWNED BY stranger")


def test_a_table_owner_attaches_with_only_usage_on_the_schema(
    any_server: PostgresServer, any_db: psycopg.Connection, any_database: str
) -> None:
    with role(any_server, "table_owner"):
        any_db.execute("CREATE SCHEMA theirs AUTHORIZATION table_owner; GRANT USAGE ON SCHEMA syncd TO table_owner")
        with connected_as(any_database, "table_owner") as owner:
            owner.execute("CREATE TABLE theirs.items (id int PRIMARY KEY, embedding real[])")
            assert attach(owner, "theirs.items") == (0, 0, 0)
            before = everything(any_db)
            attach(owner, "theirs.items")
            assert everything(any_db) == before
            attach(owner, "theirs.items", metric="ip")
            owner.execute("INSERT INTO theirs.items VALUES (1, '{1}')")
            assert any_db.execute("SELECT key FROM syncd.outbox WHERE op = 'k'").fetchall() == [("1",)]
            for forbidden in (
                "SELECT * FROM syncd.outbox",
                "SELECT * FROM syncd.attachments",
                "DELETE FROM syncd.consumers",
            ):
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    owner.execute(forbidden)
            assert owner.execute("SELECT syncd.detach('theirs.items')").fetchone() == (True,)
        any_db.execute("DROP OWNED BY table_owner")


WRITES = [
    "INSERT INTO items VALUES (1, '{1}'), (2, '{2}')",
    "UPDATE items SET embedding = '{3}' WHERE id = 1",
    "DELETE FROM items WHERE id = 2",
    "COPY items FROM STDIN",
    "TRUNCATE items",
]


@pytest.mark.parametrize("set_role", [False, True])
def test_who_may_write_the_table_goes_on_writing_it_without_any_grant_on_the_schema(
    any_server: PostgresServer, any_db: psycopg.Connection, any_database: str, set_role: bool
) -> None:
    any_db.execute("CREATE TABLE items (id int PRIMARY KEY, embedding real[])")
    attach(any_db, "items")
    with role(any_server, "writer"), role(any_server, "session_user_of_writer", "LOGIN IN ROLE writer"):
        any_db.execute("GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON items TO writer")
        with connected_as(any_database, "session_user_of_writer" if set_role else "writer") as db:
            if set_role:
                db.execute("SET ROLE writer")
            for write in WRITES:
                if write.startswith("COPY"):
                    with db.cursor().copy(write) as copy:
                        copy.write_row((5, "{5}"))
                else:
                    db.execute(write)
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                db.execute("SELECT syncd.token()")
        any_db.execute("DROP OWNED BY writer")
    assert outbox(any_db) == [("k", "1"), ("k", "2"), ("k", "1"), ("k", "2"), ("k", "5"), ("t", None)]


def outbox(db: psycopg.Connection) -> Sequence[tuple[str, str | None]]:
    return db.execute("SELECT op::text, key FROM syncd.outbox WHERE op IN ('k', 't', 'r') ORDER BY id").fetchall()
