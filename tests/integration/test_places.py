"""Tables that change places: ``check`` and ``why`` describe the source and name the fix."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import psycopg
import pytest

from syncd.ops.findings import Finding
from tests.daemon import Daemon
from tests.faults.altered import serving
from tests.faults.following import until
from tests.integration.checking import about, assert_only, examine
from tests.integration.commands import run
from tests.integration.test_why import explain


@pytest.fixture
def chunks(db: psycopg.Connection) -> psycopg.Connection:
    """Attached table ``chunks`` with some rows."""
    db.execute("CREATE TABLE chunks (id int PRIMARY KEY, v vector(3), lang text)")
    db.execute(
        "INSERT INTO chunks SELECT i, ARRAY[i, 1, 1]::real[]::vector, 'en' FROM generate_series(1, "
        "50) AS i"
    )
    db.execute("SELECT syncd.attach('chunks', metric => 'l2', live => $$lang <> 'it''s'$$)")
    return db


def obey(db: psycopg.Connection, finding: Finding) -> None:
    """Run the commands of a finding."""
    for command in finding.fix.split(" && "):
        words = shlex.split(command)
        assert words[0] == "syncd", finding.fix
        done = run(*words[1:], SYNCD_DSN=db.info.dsn)
        assert done.returncode == 0, done.stderr


def moved(db: psycopg.Connection, tmp_path: Path) -> list[Finding]:
    """Findings of ``check`` about tables themselves."""
    return [finding for finding in examine(db, tmp_path) if finding.what.startswith("table")]


def causes(daemon: Daemon, dataset: str = "chunks") -> Sequence[Finding]:
    return explain(daemon, dataset).causes


def test_a_table_that_became_a_partition_is_reported_and_its_parent_attached(
    chunks: psycopg.Connection, daemon: Daemon, tmp_path: Path
) -> None:
    with serving(chunks, daemon) as followed:
        chunks.execute(
            "BEGIN; ALTER TABLE chunks RENAME TO chunks_old; ALTER INDEX chunks_pkey RENAME TO "
            "chunks_old_pkey;"
            "CREATE TABLE chunks (id int PRIMARY KEY, v vector(3), lang text) PARTITION BY RANGE "
            "(id);"
            "ALTER TABLE chunks ATTACH PARTITION chunks_old FOR VALUES FROM (0) TO (1000);"
            "CREATE TABLE chunks_new PARTITION OF chunks FOR VALUES FROM (1000) TO (2000); COMMIT"
        )
        chunks.execute("INSERT INTO chunks VALUES (60, '[1,1,1]', 'en'), (1060, '[1,1,1]', 'en')")
        found = about(examine(chunks, tmp_path), "table public.chunks_old")
        assert found.level == "warn"
        assert "partition of public.chunks now" in found.detail
        followed.in_step("SELECT id, v::real[] FROM chunks_old", "chunks")
        assert found in causes(daemon)
        obey(chunks, found)
        followed.in_step("SELECT id, v::real[] FROM chunks", "chunks")
        assert not moved(chunks, tmp_path)


def swapped(db: psycopg.Connection) -> None:
    db.execute(
        "BEGIN; ALTER TABLE chunks RENAME TO chunks_tmp; ALTER TABLE chunks_blue RENAME TO chunks; "
        "ALTER TABLE chunks_tmp RENAME TO chunks_blue; COMMIT"
    )


@pytest.mark.parametrize("both", [False, True])
def test_tables_that_swapped_names_are_reported_and_each_dataset_is_its_tables_again(
    chunks: psycopg.Connection, daemon: Daemon, tmp_path: Path, both: bool
) -> None:
    chunks.execute("CREATE TABLE chunks_blue (LIKE chunks INCLUDING ALL)")
    chunks.execute("INSERT INTO chunks_blue SELECT id + 100, v, lang FROM chunks")
    if both:
        chunks.execute("SELECT syncd.attach('chunks_blue', metric => 'l2')")
    with serving(chunks, daemon) as followed:
        swapped(chunks)
        found = moved(chunks, tmp_path)
        assert len(found) == 1 + both
        assert "dataset 'chunks' is read from public.chunks_blue" in found[0].detail
        followed.in_step("SELECT id, v::real[] FROM chunks_blue", "chunks")
        assert found[0] in causes(daemon)
        for each in found:
            obey(chunks, each)
        followed.in_step("SELECT id, v::real[] FROM chunks", "chunks")
        if both:
            followed.in_step("SELECT id, v::real[] FROM chunks_blue", "chunks_blue")
        assert not moved(chunks, tmp_path)


def test_a_renamed_table_and_one_of_another_kind_under_its_old_name_are_no_warning(
    chunks: psycopg.Connection, tmp_path: Path
) -> None:
    chunks.execute(
        "ALTER TABLE chunks RENAME TO things; CREATE VIEW chunks AS SELECT * FROM things"
    )
    assert_only(examine(chunks, tmp_path))
    chunks.execute(
        "CREATE TABLE other (id int PRIMARY KEY, v vector(3)); CREATE TABLE items (LIKE other)"
    )
    chunks.execute("SELECT syncd.attach('other', dataset => $$'items'$$)")  # as the user wants it
    assert_only(examine(chunks, tmp_path))


def test_triggers_that_came_with_a_dump_are_reported_and_dropped(
    chunks: psycopg.Connection, tmp_path: Path
) -> None:
    chunks.execute("CREATE TABLE copy (LIKE chunks INCLUDING ALL)")
    (number,) = chunks.execute("SELECT max(id) FROM syncd.attachments").fetchone() or [None]
    for event in ("delete", "truncate"):
        chunks.execute(
            f'CREATE TRIGGER "syncd_{number}_{event}" AFTER {event} ON copy '
            f"{'REFERENCING OLD TABLE AS syncd_old' if event == 'delete' else ''} EXECUTE FUNCTION "
            f"syncd.capture_{number}_{event}()".encode()
        )
    found = about(examine(chunks, tmp_path), "stray triggers of public.chunks")
    assert found.level == "warn"
    assert "public.copy has triggers of public.chunks" in found.detail
    chunks.execute(found.fix.encode())
    assert_only(examine(chunks, tmp_path))


@pytest.mark.parametrize("running", [True, False])
def test_a_table_dropped_and_made_again_is_put_back_by_the_command_that_is_named(
    chunks: psycopg.Connection, daemon: Daemon, tmp_path: Path, running: bool
) -> None:
    with serving(chunks, daemon) as followed:
        followed.in_step("SELECT id, v::real[] FROM chunks", "chunks")
        if not running:
            daemon.stop()
        chunks.execute("DROP TABLE chunks")
        chunks.execute("CREATE TABLE chunks (id int PRIMARY KEY, v vector(3), lang text)")
        chunks.execute("INSERT INTO chunks VALUES (7, '[7,7,7]', 'en'), (8, '[7,7,7]', 'it''s')")
        if not running:
            daemon.start()
        said = followed.failed("the table was dropped", "chunks") if running else ""
        if running:
            assert "syncd attach public.chunks --like-before" in said
        found = about(examine(chunks, tmp_path), "table")
        assert found.fix == "syncd attach public.chunks --like-before"
        if running:
            assert found in causes(daemon)
        obey(chunks, found)
        followed.in_step("SELECT id, v::real[] FROM chunks WHERE id = 7", "chunks")
        assert not moved(chunks, tmp_path)


@pytest.mark.parametrize("running", [True, False])
def test_a_table_that_took_the_name_of_one_dropped_since_is_put_in_its_place(
    chunks: psycopg.Connection, daemon: Daemon, tmp_path: Path, running: bool
) -> None:
    with serving(chunks, daemon) as followed:
        chunks.execute("CREATE TABLE chunks_new (LIKE chunks INCLUDING ALL)")
        chunks.execute("INSERT INTO chunks_new SELECT id + 100, v, lang FROM chunks")
        chunks.execute(
            "ALTER TABLE chunks RENAME TO chunks_old; ALTER TABLE chunks_new RENAME TO chunks"
        )
        renamed = "SELECT count(*) FROM syncd.attachments WHERE table_name = 'chunks_old'"
        until(lambda: chunks.execute(renamed).fetchone() == (1,), "the new name is stored")
        if not running:
            daemon.stop()
        chunks.execute("DROP TABLE chunks_old")
        if not running:
            daemon.start()
        assert "syncd attach public.chunks --like-before" in followed.failed(
            "the table was dropped", "chunks"
        )
        found = about(examine(chunks, tmp_path), "table")
        assert found.fix == "syncd attach public.chunks --like-before"
        assert found in causes(daemon)
        obey(chunks, found)
        followed.in_step("SELECT id, v::real[] FROM chunks WHERE id > 100", "chunks")
        assert not moved(chunks, tmp_path)


EXCHANGES = {
    "two schemas are exchanged": "ALTER SCHEMA live RENAME TO old; ALTER SCHEMA staging RENAME TO "
    "live",
    "the table goes to another schema": "ALTER TABLE live.m SET SCHEMA public; ALTER TABLE "
    "staging.m SET SCHEMA live",
}


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
def test_tables_exchanged_by_their_schemas_are_reported_and_the_named_table_is_followed_again(
    db: psycopg.Connection, daemon: Daemon, tmp_path: Path, exchange: str, both: bool, dropped: bool
) -> None:
    for schema, first in (("live", 1), ("staging", 101)):
        db.execute(
            f"CREATE SCHEMA {schema};"
            f"CREATE TABLE {schema}.m (id int PRIMARY KEY, v vector(3))".encode()
        )
        db.execute(
            f"INSERT INTO {schema}.m SELECT i, ARRAY[i, 1, 1]::real[] FROM "
            f"generate_series({first}, {first + 9}) i".encode()
        )
    db.execute("SELECT syncd.attach('live.m', metric => 'l2')")
    if both:
        db.execute("SELECT syncd.attach('staging.m', metric => 'l2', dataset => $$'next'$$)")
    with serving(db, daemon) as followed:
        db.execute(EXCHANGES[exchange].encode())
        moved_to = "old.m" if "schemas" in exchange else "public.m"
        renamed = (
            "SELECT schema_name || '.' || table_name FROM syncd.attachments WHERE attached_schema "
            "= 'live'"
        )
        until(lambda: db.execute(renamed).fetchone() == (moved_to,), "the new name is stored")
        if dropped:
            db.execute(f"DROP TABLE {moved_to}".encode())
            followed.failed("the table was dropped", "m")
        (found,) = moved(db, tmp_path)
        assert found in causes(daemon, "m")
        if not dropped:
            assert (
                f"dataset 'm' is read from {moved_to}, and live.m is another table now"
                in found.detail
            )
            followed.in_step(f"SELECT id, v::real[] FROM {moved_to}", "m")
        obey(db, found)
        if not (dropped and both):  # then live.m keeps the dataset that it was attached for
            followed.in_step("SELECT id, v::real[] FROM live.m", "m")
        assert not moved(db, tmp_path)


def test_like_before_takes_no_other_arguments(chunks: psycopg.Connection) -> None:
    done = run("attach", "chunks", "--like-before", "--live", "true", SYNCD_DSN=chunks.info.dsn)
    assert done.returncode == 2
    assert "no other" in done.stderr


@pytest.mark.parametrize("part", ["chunks", "chunks_1"])
def test_an_unlogged_source_or_partition_is_reported(
    db: psycopg.Connection, tmp_path: Path, part: str
) -> None:
    split = " PARTITION BY RANGE (id)" if part != "chunks" else ""
    db.execute(f"CREATE TABLE chunks (id int PRIMARY KEY, v vector(3)){split}".encode())
    if split:
        db.execute("CREATE TABLE chunks_1 PARTITION OF chunks FOR VALUES FROM (0) TO (100)")
    db.execute("SELECT syncd.attach('chunks')")
    db.execute(f"ALTER TABLE {part} SET UNLOGGED".encode())
    found = about(examine(db, tmp_path), "table public.chunks")
    assert found.level == "warn"
    assert found.fix == f"ALTER TABLE public.{part} SET LOGGED;"
    db.execute(found.fix.encode())
    assert_only(examine(db, tmp_path))
