"""``syncd.search()`` in statements of PostgreSQL, on each version that has dblink."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from syncd.postgres import schema
from tests.documents import DOCS
from tests.integration.commands import run
from tests.integration.searching import (
    PGVECTOR,
    QUOTED_WORD,
    ROWS,
    WORD,
    Way,
    programs_with_dblink,
    searchable,
)
from tests.servers import PostgresServer, Version, bindir

pytestmark = pytest.mark.server
PROGRAMS = programs_with_dblink()
VERSIONS: list[Version] = sorted(PROGRAMS) or [15]
FIRST, LAST = VERSIONS[0], VERSIONS[-1]
SEED = 20_261_128
BLOCK = re.compile(r"^```(\w+)(?: (\w+))?\n(.*?)^```", re.M | re.S)
LIMITS = ("0", "30s")
"""Values of statement_timeout: from PostgreSQL 17 on dblink itself waits where there is a limit."""
NEAR_5 = "SELECT key FROM syncd.search_key('chunks', '5', 4)"
DJANGO = """
import django
from django.conf import settings
settings.configure(DATABASES={"default": {
    "ENGINE": "django.db.backends.postgresql", "HOST": HOST, "NAME": "searched", "USER": "app"}})
django.setup()
from django.db import models
class Chunk(models.Model):
    id = models.BigIntegerField(primary_key=True)
    class Meta:
        app_label, db_table = "chunks", "chunks"
"""


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Version], Way]]:
    """One server and one service of each version that a test asks for."""
    made: dict[Version, Way] = {}
    with ExitStack() as stack:

        def of(version: Version) -> Way:
            if version not in PROGRAMS:
                pytest.skip(f"PostgreSQL {version} with dblink is not installed")
            if version not in made:
                folder = tmp_path_factory.mktemp("searchable")
                made[version] = stack.enter_context(searchable(version, PROGRAMS[version], folder))
            return made[version]

        yield of


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(each, marks=[] if each in (FIRST, LAST) else pytest.mark.long)
        for each in VERSIONS
    ],
)
def way(request: pytest.FixtureRequest, ways: Callable[[Version], Way]) -> Way:
    """The oldest and the newest version; the others are long."""
    return ways(request.param)


@pytest.fixture(scope="module")
def one_way(ways: Callable[[Version], Way]) -> Way:
    """The oldest version, for what does not depend on it."""
    return ways(FIRST)


def examples(language: str, kind: str = "") -> list[str]:
    """The blocks of code of the page about SQL."""
    text = (DOCS / "sql.md").read_text("utf-8")
    return [
        body for found, label, body in BLOCK.findall(text) if (found, label) == (language, kind)
    ]


def example(framework: str) -> Any:
    """The example of a framework, as users run it: without this file's own settings."""
    (body,) = examples("python", framework)
    return compile(body, "sql.md", "exec", dont_inherit=True)


@contextmanager
def frozen(way: Way) -> Iterator[None]:
    """The service is frozen, and searches give up after a fraction of a second, not after 6 s."""
    assert way.daemon.process is not None
    with way.daemon.client() as client:
        pids = [way.daemon.process.pid, *(each.pid for each in client.status().readers)]
    (definition,) = way.rows("SELECT pg_get_functiondef('syncd.ask'::regproc)")[0]
    with way.connect() as connection:
        connection.execute(
            definition.replace("integer := 5000;", "integer := 200;")
            .replace("integer := 1000;", "integer := 200;")
            .encode()
        )
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
            connection.execute(definition.encode())


def test_every_form_finds_what_the_rpc_finds(way: Way) -> None:
    vector = way.rows("SELECT embedding FROM chunks WHERE id = 5")[0][0]
    expected = ["5", *way.found("5", 3)]
    text = str(vector)
    numbers = ",".join(map(str, vector))
    forms = [f"'{text}'", f"'{text}'::text", f"ARRAY[{numbers}]", f"ARRAY[{numbers}]::real[]"]
    forms += [f"ARRAY[{numbers}]::float8[]", "(SELECT embedding FROM chunks WHERE id = 5)"]
    if way.server.version == PGVECTOR:
        forms += [f"'{text}'::vector", f"'{text}'::halfvec"]
    for form in forms:
        found = way.rows(f"SELECT key FROM syncd.search('chunks', {form}, 4)")
        assert [key for (key,) in found] == expected, form
    for type_of in ("", "::smallint[]", "::bigint[]", "::numeric[]"):
        whole = way.rows(
            f"SELECT key, distance FROM syncd.search('chunks', ARRAY[1, 0, 0]{type_of}, 2)"
        )
        assert whole[0][1] <= whole[1][1]
    assert [key for (key,) in way.rows(NEAR_5)] == way.found("5", 4)
    german = way.rows(
        "SELECT key FROM syncd.search_key('chunks', '5', 4, filter => '{\"lang\": \"de\"}', "
        "recall => 1, max_distance => 9, fresh => true)"
    )
    assert [key for (key,) in german] == way.found("5", 4, filter={"lang": "de"}, recall=1.0)
    assert way.rows("SELECT key FROM syncd.search('chunks', NULL::text)") == []


def test_only_the_named_roles_search_and_none_of_them_reads_the_password(one_way: Way) -> None:
    assert len(one_way.rows(NEAR_5, "web")) == 4
    one_way.server.execute("GRANT USAGE ON SCHEMA syncd TO other", "searched")
    for query in (NEAR_5, "SELECT syncd.connect_search('host=x password=y')"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            one_way.rows(query, "other")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        one_way.rows("SELECT syncd.connect_search('host=x password=y')", "web")
    one_way.server.execute('GRANT USAGE ON SCHEMA "my extensions" TO web', "searched")
    with pytest.raises((psycopg.errors.InsufficientPrivilege, psycopg.errors.UndefinedObject)):
        one_way.rows(
            "SELECT * FROM \"my extensions\".dblink('syncd_search', 'x') AS t (a text)", "web"
        )
    for role in ("web", "other"):
        mappings = one_way.rows("SELECT umoptions FROM pg_user_mappings", role)
        assert mappings == [(None,)]
        text = str(one_way.rows("SELECT srvoptions FROM pg_foreign_server", role))
        assert "port=" in text
        assert WORD not in text


def condition(rng: random.Random, depth: int = 2) -> str:
    """A condition over a row of chunks."""
    if depth and rng.random() < 0.5:
        first, second = condition(rng, depth - 1), condition(rng, depth - 1)
        return f"({first} {rng.choice(('AND', 'OR'))} {rng.choice(('', 'NOT '))}{second})"
    return rng.choice(
        [
            f"(id % {rng.randint(2, 9)} < {rng.randint(0, 8)})",
            f"(lang = '{rng.choice(('en', 'de'))}')",
            f"(owner = {rng.choice(('current_user', quote('app'), quote('other')))})",
            f"(author IN (SELECT id FROM authors WHERE active AND id < {rng.randint(1, 9)}))",
            f"(body LIKE '%{rng.randint(0, 9)}')",
        ]
    )


def quote(text: str) -> str:
    return f"'{text}'"


@pytest.mark.parametrize("policies", [20, pytest.param(1000, marks=pytest.mark.long)])
def test_a_role_finds_exactly_the_near_rows_that_its_policies_allow(
    one_way: Way, policies: int
) -> None:
    rng = random.Random(SEED)
    hidden = 0
    with one_way.connect() as owner, one_way.connect("web") as web:
        owner.execute("ALTER TABLE chunks ENABLE ROW LEVEL SECURITY")
        try:
            for _ in range(policies):
                for name, kind in (("allowed", "PERMISSIVE"), ("narrowed", "RESTRICTIVE")):
                    owner.execute(f"DROP POLICY IF EXISTS {name} ON chunks".encode())
                    always = name == "narrowed" and rng.random() < 0.7
                    using = "(true)" if always else condition(rng)
                    owner.execute(
                        f"CREATE POLICY {name} ON chunks AS {kind} TO web USING {using}".encode()
                    )
                visible = {key for (key,) in web.execute("SELECT id FROM chunks").fetchall()}
                asked = [str(rng.randint(1, ROWS)), rng.choice([5, 40, ROWS])]
                near = owner.execute(
                    "SELECT key::bigint FROM syncd.search_key('chunks', %s, %s)", asked
                ).fetchall()
                found = web.execute(
                    "SELECT c.id FROM syncd.search_key('chunks', %s, %s) AS s "
                    "JOIN chunks AS c ON c.id = s.key::bigint ORDER BY s.distance, c.id",
                    asked,
                ).fetchall()
                assert {key for (key,) in found} == {key for (key,) in near} & visible
                hidden += len(near) - len(found)
            assert hidden > 0
        finally:
            owner.execute("DROP POLICY allowed ON chunks")
            owner.execute("DROP POLICY narrowed ON chunks")
            owner.execute("ALTER TABLE chunks DISABLE ROW LEVEL SECURITY")


@pytest.mark.parametrize("limit", LIMITS)
def test_errors_have_the_kind_and_the_hint_of_the_rpc(way: Way, limit: str) -> None:
    with way.connect() as connection:
        connection.execute(f"SET statement_timeout = '{limit}'".encode())
        for query, error, kind in [
            (
                "SELECT * FROM syncd.search('nope', '[1,2,3]')",
                psycopg.errors.UndefinedTable,
                "unknown_dataset",
            ),
            (
                "SELECT * FROM syncd.search('chunks', '[1]')",
                psycopg.errors.DataException,
                "dimension_mismatch",
            ),
            (
                "SELECT * FROM syncd.search_key('chunks', '-1')",
                psycopg.errors.NoDataFound,
                "unknown_key",
            ),
            (
                "SELECT * FROM syncd.search('chunks', '[1,2,3]', 0)",
                psycopg.errors.InvalidParameterValue,
                "invalid_params",
            ),
            (
                "SELECT * FROM syncd.search('chunks', '[1,2,3]', filter => '{\"x\": 1}')",
                psycopg.errors.InvalidParameterValue,
                "invalid_filter",
            ),
            (
                "SELECT * FROM syncd.search('chunks', ARRAY[1, NULL, 3])",
                psycopg.errors.InvalidTextRepresentation,
                "invalid_params",
            ),
            (
                "SELECT * FROM syncd.search('chunks', 'x')",
                psycopg.errors.InvalidTextRepresentation,
                "invalid_params",
            ),
        ]:
            with pytest.raises(error) as raised:
                connection.execute(query.encode())
            assert raised.value.diag.message_detail == kind
            assert raised.value.diag.message_hint
            assert len(connection.execute(NEAR_5).fetchall()) == 4


def test_a_composite_key_is_the_text_of_an_array_in_both_directions(one_way: Way) -> None:
    with one_way.connect() as connection:
        connection.execute(
            "CREATE TABLE pairs (a text, b bigint, embedding real[], PRIMARY KEY (a, b)); "
            "INSERT INTO pairs VALUES "
            "('x''\"', 1, '{1,0}'), ('[y]', 2, '{1,1}'), ('', 3, '{0,1}'); "
            "SELECT syncd.attach('pairs', metric => 'l2')"
        )
        found = connection.execute(
            "SELECT p.b, s.key FROM syncd.search('pairs', '[1,0]', 3, fresh => true) AS s "
            "JOIN pairs AS p ON (p.a, p.b) = (s.key::jsonb->>0, (s.key::jsonb->>1)::bigint) "
            "ORDER BY s.distance"
        ).fetchall()
        assert [b for b, _ in found] == [1, 2, 3]
        for key in (found[1][1], '[ "[y]" , 2 ]'):
            alike = connection.execute("SELECT key FROM syncd.search_key('pairs', %s, 1)", [key])
            assert alike.fetchall() in ([(found[0][1],)], [(found[2][1],)])
        with pytest.raises(psycopg.errors.InvalidParameterValue, match="composite"):
            connection.execute("SELECT key FROM syncd.search_key('pairs', '[y]')")
        connection.execute("SELECT syncd.detach('pairs'); DROP TABLE pairs")


def test_a_session_has_one_connection_also_after_searches_were_connected_again(
    one_way: Way,
) -> None:
    with one_way.connect() as connection:
        connection.execute(NEAR_5)
        target = f"host=127.0.0.1 port={one_way.port} password='{QUOTED_WORD}'"
        one_way.rows("SELECT syncd.connect_search(%s, '{app,web}')", "app", target)
        assert len(connection.execute(NEAR_5).fetchall()) == 4
        names = connection.execute('SELECT "my extensions".dblink_get_connections()').fetchone()
        assert names is not None
        assert len(names[0]) == 1


def test_the_planner_looks_the_keys_up_by_their_index(way: Way) -> None:
    with way.connect() as connection:
        connection.execute("CREATE TEMPORARY TABLE many (id bigint PRIMARY KEY)")
        connection.execute("INSERT INTO many SELECT generate_series(1, 20000)")
        connection.execute("ANALYZE many")
        plan = connection.execute(
            "EXPLAIN SELECT m.* FROM syncd.search('chunks', '[1,0,0]', 10) AS s "
            "JOIN many AS m ON m.id = s.key::bigint"
        ).fetchall()
    text = "\n".join(row[0] for row in plan)
    assert "Function Scan on ask" in text
    assert re.search(r"Index Only Scan using many_pkey|Index Scan using many_pkey", text), text


def test_searches_work_prepared_after_rollback_and_where_parallel_plans_are_forced(
    way: Way,
) -> None:
    expected = way.found("5", 4)
    with way.connect() as connection:
        connection.execute("PREPARE near AS SELECT key FROM syncd.search_key('chunks', $1, $2)")
        for _ in range(7):
            found = connection.execute("EXECUTE near('5', 4)").fetchall()
            assert [key for (key,) in found] == expected
        connection.execute("BEGIN")
        connection.execute(NEAR_5)
        with pytest.raises(psycopg.errors.UndefinedTable):
            connection.execute("SELECT * FROM syncd.search('nope', '[1]')")
        connection.execute("ROLLBACK")
        name = "debug_parallel_query" if way.server.version > 15 else "force_parallel_mode"
        connection.execute(f"SET {name} = on".encode())
        connection.execute("SET parallel_setup_cost = 0")
        connection.execute("SET parallel_tuple_cost = 0")
        found = connection.execute(NEAR_5).fetchall()
        assert [key for (key,) in found] == expected
        counted = connection.execute(
            "SELECT count(*) FROM chunks AS c JOIN syncd.search_key('chunks', '5', 4) AS s "
            "ON c.id = s.key::bigint"
        ).fetchone()
        assert counted == (4,)


def test_fresh_finds_every_row_that_was_committed_before(one_way: Way) -> None:
    with one_way.connect() as connection:
        for number in range(60):
            key = 100_000 + number
            connection.execute(
                "INSERT INTO chunks (id, embedding) VALUES (%s, ARRAY[50, %s, 0])", [key, number]
            )
            found = connection.execute(
                "SELECT c.id FROM syncd.search('chunks', ARRAY[50, %s, 0]::real[], 1, "
                "fresh => true) AS s JOIN chunks AS c ON c.id = s.key::bigint",
                [number],
            ).fetchall()
            assert found == [(key,)]
        connection.execute("DELETE FROM chunks WHERE id >= 100000")
        near = connection.execute(
            "SELECT key::bigint FROM syncd.search('chunks', '[50,0,0]', 50, fresh => true)"
        ).fetchall()
        assert all(key < 100_000 for (key,) in near)


def test_a_frozen_service_ends_the_search_and_a_cancel_ends_it_sooner(way: Way) -> None:
    with way.connect() as connection:
        connection.execute(NEAR_5)
        with frozen(way):
            with pytest.raises(psycopg.errors.LockNotAvailable, match="not answered") as raised:
                connection.execute(NEAR_5)
            assert raised.value.diag.message_detail == "timeout"
            # The session keeps its connection: to open another one has no time limit.
            with pytest.raises(psycopg.errors.LockNotAvailable, match="not answered"):
                connection.execute("SELECT * FROM syncd.search_key('chunks', '6', 3)")
        assert [key for (key,) in connection.execute(NEAR_5).fetchall()] == way.found("5", 4)
        with frozen(way):
            connection.execute("SET statement_timeout = 50")
            with pytest.raises(psycopg.errors.QueryCanceled):
                connection.execute(NEAR_5)
            connection.execute("SET statement_timeout = 0")
        assert len(connection.execute(NEAR_5).fetchall()) == 4


def test_a_lost_connection_is_opened_again_and_a_missing_service_is_an_error(
    ways: Callable[[Version], Way],
) -> None:
    way = ways(LAST)
    with ExitStack() as stack:
        connections = [stack.enter_context(way.connect()) for _ in LIMITS]
        for connection, limit in zip(connections, LIMITS, strict=True):
            connection.execute(f"SET statement_timeout = '{limit}'".encode())
            connection.execute(NEAR_5)
            connection.execute("BEGIN")
        way.daemon.stop()
        for connection in connections:
            connection.execute("SAVEPOINT before")
            with pytest.raises(psycopg.OperationalError, match="cannot be reached") as raised:
                connection.execute(NEAR_5)
            assert raised.value.sqlstate == "08001"
            assert raised.value.diag.message_detail == "service_unavailable"
            connection.execute("ROLLBACK TO before")
        way.daemon.start()
        for connection in connections:
            assert len(connection.execute(NEAR_5).fetchall()) == 4


def test_the_examples_of_the_documentation_run(way: Way) -> None:
    with way.connect() as connection:
        found: list[list[tuple[Any, ...]]] = []
        for example in examples("sql"):
            for statement in filter(str.strip, example.split(";\n")):
                cursor = connection.execute(statement.encode())
                if cursor.description is not None:
                    found.append(cursor.fetchall())
        assert len(found) == 7
        assert all(len(rows) >= 5 for rows in found)
        nearest, alike, conditions, visible, hybrid, lateral, _ = found
        first = way.rows(
            "SELECT id FROM chunks "
            "ORDER BY (embedding[1] - 1)^2 + embedding[2]^2 + embedding[3]^2 LIMIT 1"
        )
        assert nearest[0][0] == first[0][0]
        assert [str(row[0]) for row in alike] == way.found("7", 5)
        assert all(row[0] % 2 == 0 for row in conditions)
        assert [row[0] for row in visible] == [row[0] for row in nearest]
        assert len({row[0] for row in hybrid}) == 5
        assert [row[0] for row in lateral] == [1, 1, 1, 2, 2, 2]  # a NULL vector finds nothing
        assert way.rows("SELECT count(*) FROM recommended") == [(3 * ROWS,)]
        if way.server.version == PGVECTOR:
            (example,) = examples("sql", "pgvector")
            by_pgvector = connection.execute(example.encode()).fetchall()
            assert [row[0] for row in by_pgvector] == [row[0] for row in nearest]


def test_the_frameworks_of_the_documentation_search(one_way: Way) -> None:
    sqlalchemy = pytest.importorskip("sqlalchemy")
    expected = [str(key) for key, _, _ in one_way.rows(examples("sql")[0])]
    engine = sqlalchemy.create_engine("postgresql+psycopg://", creator=lambda: one_way.connect())
    with engine.connect() as session:
        names: dict[str, Any] = {"session": session, "text": sqlalchemy.text}
        exec(example("sqlalchemy"), names)  # noqa: S102 - the example
        assert [str(row.id) for row in names["found"]] == expected
    engine.dispose()

    retrievers = pytest.importorskip("langchain_core.retrievers")
    documents = pytest.importorskip("langchain_core.documents")
    embeddings = pytest.importorskip("langchain_core.embeddings")

    class One(embeddings.Embeddings):  # type: ignore[name-defined,misc]
        def embed_query(self, text: str) -> list[float]:
            return [float(len(text)), 0.0, 0.0]

        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            return [self.embed_query(text) for text in texts]

    names = {
        "Any": Any,
        "BaseRetriever": retrievers.BaseRetriever,
        "Document": documents.Document,
        "Embeddings": embeddings.Embeddings,
        "__name__": "example",
    }
    exec(example("langchain"), names)  # noqa: S102 - the example
    with one_way.connect() as connection:
        chunks = names["Chunks"](connection=connection, embedding=One())
        assert [document.id for document in chunks.invoke("x")] == expected

    program = DJANGO.replace("HOST,", f"{str(one_way.server.folder / 'cluster')!r},")
    program += examples("python", "django")[0] + "print(*(each.id for each in found))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == expected


def test_check_tests_the_way_to_the_service(one_way: Way) -> None:
    def check() -> str:
        dsn, socket = one_way.daemon.conninfo, str(one_way.daemon.socket)
        return run("check", SYNCD_DSN=dsn, SYNCD_SOCKET=socket).stdout

    assert re.search(r"^ok +search from SQL +the database reaches", check(), re.M)
    with one_way.connect() as connection:
        connection.execute(
            "ALTER USER MAPPING FOR app SERVER syncd_search OPTIONS (SET password 'another')"
        )
        try:
            found = check()
            assert re.search(r"^fail +search from SQL ", found, re.M)
            assert "password authentication failed" in found
        finally:
            connection.execute(
                sql.SQL(
                    "ALTER USER MAPPING FOR app SERVER syncd_search OPTIONS (SET password {})"
                ).format(WORD)
            )


def test_without_its_mapping_or_server_a_search_says_what_to_type(one_way: Way) -> None:
    for damage in ("USER MAPPING FOR app SERVER syncd_search", "SERVER syncd_search CASCADE"):
        with one_way.connect() as connection:
            connection.execute("BEGIN")
            connection.execute(f"DROP {damage}".encode())
            with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState) as raised:
                connection.execute(NEAR_5)
            assert "syncd.connect_search(" in (raised.value.diag.message_hint or "")
            connection.execute("ROLLBACK")
            assert len(connection.execute(NEAR_5).fetchall()) == 4


def test_without_dblink_or_with_dblink_elsewhere_a_search_says_what_to_type(one_way: Way) -> None:
    with psycopg.connect(one_way.conninfo) as connection:
        for damage in ("ALTER EXTENSION dblink SET SCHEMA public", "DROP EXTENSION dblink CASCADE"):
            connection.execute(damage.encode())
            connection.execute("SET ROLE web")
            with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState) as raised:
                connection.execute(NEAR_5)
            assert "syncd.connect_search(" in (raised.value.diag.message_hint or "")
            connection.rollback()
        assert len(connection.execute(NEAR_5).fetchall()) == 4


def test_psql_asks_the_service_itself(one_way: Way) -> None:
    psql = str(bindir(18) / "psql")
    target = f"host=127.0.0.1 port={one_way.port} user=any dbname=any"
    script = f"{NEAR_5};\nSHOW server_version;\nSELECT state FROM datasets() LIMIT 1;\nSELECT 1;"
    done = subprocess.run(
        [psql, "-XAtd", target],
        input=script,
        env={"PGPASSWORD": WORD},
        capture_output=True,
        text=True,
        check=True,
    )
    *keys, version, state = done.stdout.split("\n")[:-1]
    assert keys == one_way.found("5", 4)
    assert (version, state) == ("16.0 (syncd)", "ready")
    assert "HINT:  This works: SELECT key, distance" in done.stderr


def test_postgres_fdw_reads_the_datasets(one_way: Way) -> None:
    one_way.server.execute(
        sql.SQL(
            "CREATE EXTENSION IF NOT EXISTS postgres_fdw; "
            "CREATE SERVER direct FOREIGN DATA WRAPPER postgres_fdw "
            "OPTIONS (host '127.0.0.1', port {}, dbname 'x'); "
            "CREATE USER MAPPING FOR postgres SERVER direct OPTIONS (user 'x', password {}); "
            "CREATE FOREIGN TABLE datasets (dataset text, state text, count bigint, dim bigint) "
            "SERVER direct OPTIONS (schema_name 'syncd')"
        ).format(str(one_way.port), WORD),
        "searched",
    )
    rows = one_way.server.execute("SELECT dataset, state, count, dim FROM datasets", "searched")
    assert ("default/chunks", "ready", ROWS, 3) in rows


def test_uninstall_leaves_nothing_and_without_dblink_the_call_says_what_to_type(
    server: PostgresServer, database: str
) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState) as raised:
            connection.execute("SELECT * FROM syncd.search('chunks', '[1]')")
        assert "CREATE EXTENSION dblink;" in (raised.value.diag.message_hint or "")
        assert "syncd.connect_search(" in (raised.value.diag.message_hint or "")
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState):
            connection.execute("SELECT syncd.connect_search('host=x password=y')")
    assert "CREATE FUNCTION syncd.search(" in schema.install_script()
    assert server.version == 18


def test_keys_have_the_encoding_of_the_database_and_uninstall_leaves_nothing(
    tmp_path: Path,
) -> None:
    if not PROGRAMS:
        pytest.skip("no PostgreSQL with dblink is installed")
    with searchable(FIRST, PROGRAMS[FIRST], tmp_path, encoding="LATIN1") as way:
        with way.connect() as connection:
            connection.execute("CREATE TABLE words (word text PRIMARY KEY, embedding real[])")
            connection.execute("INSERT INTO words VALUES ('\u00e4', '{1,0}'), ('\u00fc', '{0,1}')")
            connection.execute("SELECT syncd.attach('words', dataset => $$'w\u00f6rter'$$)")
            found = connection.execute(
                "SELECT w.word FROM syncd.search_key('w\u00f6rter', '\u00e4', fresh => true) AS s "
                "JOIN words AS w ON w.word = s.key"
            ).fetchall()
            assert found == [("\u00fc",)]
        way.daemon.stop()
        assert schema.uninstall(way.daemon.conninfo)
        assert way.rows("SELECT srvname FROM pg_foreign_server", "postgres") == []
        assert way.rows("SELECT umid FROM pg_user_mappings", "postgres") == []
