"""What is done to a table without a trigger telling of it ends right: the index equals the table again, soon, and the service goes on.

Where an index is still believed to be right, no reader is turned away meanwhile; where a table cannot be read any more, the reason and
the way out are said.
"""

from __future__ import annotations

import itertools
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from syncd.errors import NotReady, RequestError, TimedOut, UnknownDataset
from syncd.rpc.client import Client
from tests.daemon import Daemon

NOTICED_WITHIN_SECONDS = 30.0
"""Half of the minute that is promised; it takes a second."""

COMPARE_SECONDS = "syncd.sync.watch.COMPARE_SECONDS"
LIVE = "deleted_at IS NULL"
ROWS = 300
SHORT_PAGES = ("syncd.sync.scan.PAGE_ROWS", (10, 10, 10))
"""A comparison of the small table takes so many passes that readers meet it."""

roles = itertools.count(1)

Vectors = dict[int, list[float]]


def read_table(db: psycopg.Connection, query: str) -> Vectors:
    """Key and vector of the rows that a query gives."""
    return {int(key): [float(value) for value in vector] for key, vector in db.execute(query.encode()).fetchall()}


def read_index(client: Client, dataset: str) -> Vectors:
    """Key and vector of the rows that a dataset has."""
    keys = list(client.keys(dataset))
    found: Vectors = {}
    for start in range(0, len(keys), 500):
        for row in client.get(dataset, keys[start : start + 500], vectors=True):
            assert row.vector is not None
            found[int(str(row.key))] = [float(value) for value in row.vector]
    return found


def eventually(check: Callable[[], None], seconds: float = NOTICED_WITHIN_SECONDS) -> None:
    """Ask until the check passes."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return check()
        except (AssertionError, RequestError):
            if time.monotonic() > deadline:
                raise
        time.sleep(0.02)


@dataclass
class Followed:
    """Table ``items``, with live and other rows, followed by a service that runs."""

    db: psycopg.Connection
    daemon: Daemon
    client: Client
    query: str = f"SELECT id, v::real[] FROM items WHERE {LIVE} AND v IS NOT NULL"

    def in_step(self, query: str = "", dataset: str = "items") -> None:
        """The index comes to equal the table, and the dataset to be ready."""

        def check() -> None:
            expected = read_table(self.db, query or self.query)
            found = read_index(self.client, dataset)
            different = {key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)}
            assert not different, f"{len(different)} of {len(expected)} rows differ, such as {sorted(different)[:5]}"
            assert self.state(dataset) == "ready"

        try:
            eventually(check)
        except Exception as error:
            raise AssertionError(f"{error}\n{self.log[-3000:]}") from error

    def state(self, dataset: str = "items") -> str:
        """The dataset's state."""
        states: dict[str, str] = {status.dataset: status.state for status in self.client.datasets()}
        return states[f"default/{dataset}"]

    def failed(self, reason: str, dataset: str = "items") -> str:
        """The dataset comes to say that it failed, for this reason; returns all of what it says."""
        said = ""

        def check() -> None:
            nonlocal said
            assert self.state(dataset) == "failed"
            with pytest.raises(NotReady, match=re.escape(reason)) as caught:
                self.client.search(dataset, [1, 0, 0])
            said = str(caught.value)

        eventually(check)
        return said

    @property
    def log(self) -> str:
        """What the service has said."""
        return self.daemon.log.read_text()

    def logged(self, what: str) -> None:
        """The service comes to say something."""

        def check() -> None:
            assert what in self.log, self.log[-3000:]

        eventually(check)


def make_items(db: psycopg.Connection, vector: str = "vector(3)", attach: str = "") -> None:
    """The table, attached."""
    db.execute(
        f"CREATE TABLE items (id int PRIMARY KEY, v {vector}, note text, part text DEFAULT 'a', deleted_at date)".encode()
    )
    db.execute(
        f"INSERT INTO items SELECT i, ARRAY[i, i % 7, 1]::real[]::{vector}, 'n', 'a', "
        f"CASE WHEN i % 10 = 0 THEN now() END FROM generate_series(1, {ROWS}) AS i".encode()
    )
    db.execute(f"SELECT syncd.attach('items', live => '{LIVE}', metric => 'l2'{attach})".encode())


@contextmanager
def serving(db: psycopg.Connection, daemon: Daemon) -> Iterator[Followed]:
    """A service that has caught up."""
    daemon.start()
    with daemon.client() as client:
        it = Followed(db, daemon, client)
        yield it


@pytest.fixture
def followed(db: psycopg.Connection, daemon: Daemon) -> Iterator[Followed]:
    make_items(db)
    daemon.constants.update([SHORT_PAGES])
    with serving(db, daemon) as it:
        it.in_step()
        yield it
        daemon.stop()


@dataclass
class Readers:
    """Ask all the time whether the dataset answers, with and without a position, and in which state it is."""

    daemon: Daemon
    dataset: str = "items"
    states: set[str] = field(default_factory=set)
    errors: list[str] = field(default_factory=list)
    answers: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)

    def ask(self, consistency: Literal["eventual", "strong"]) -> None:
        with self.daemon.client() as client:
            while not self.stopped.is_set():
                try:
                    assert client.search(self.dataset, [1, 0, 0], k=1, consistency=consistency, timeout_ms=20_000), (
                        "no row"
                    )
                    if consistency == "eventual":  # a strong read would wait until a comparison is over
                        self.states |= {s.state for s in client.datasets() if s.dataset == f"default/{self.dataset}"}
                    self.answers += 1
                except (RequestError, AssertionError) as error:
                    self.errors.append(repr(error))

    def __enter__(self) -> Readers:
        self.threads = [threading.Thread(target=self.ask, args=[how]) for how in ("eventual", "strong")]
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join(30)


@contextmanager
def writers(conninfo: str, statement: str) -> Iterator[None]:
    """Two that go on writing; ``{n}`` in the statement is another number each time."""
    stopped = threading.Event()
    errors: list[str] = []

    def write(first: int) -> None:
        with psycopg.connect(conninfo, autocommit=True) as connection:
            for number in itertools.count(first, 2):
                if stopped.is_set():
                    return
                try:
                    connection.execute(statement.replace("{n}", str(number)).encode())
                except psycopg.Error as error:
                    errors.append(str(error))

    threads = [threading.Thread(target=write, args=[first]) for first in (0, 1)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopped.set()
        for thread in threads:
            thread.join(30)
    assert not errors, errors[0]


UPSERT = (
    "INSERT INTO items (id, v) VALUES (1000 + {n} % 200, ARRAY[{n}, 1, 1]::real[]::vector) "
    "ON CONFLICT (id) DO UPDATE SET v = excluded.v"
)


# Rewrites that change no value


def test_rewriting_alter_tables_under_load_lose_no_row_and_turn_no_reader_away(
    database: str, followed: Followed
) -> None:
    with Readers(followed.daemon) as readers, writers(database, UPSERT):
        for number in range(3):
            followed.db.execute("ALTER TABLE items ALTER COLUMN note TYPE varchar(20) USING note || 'x'")
            followed.db.execute(f"ALTER TABLE items ADD COLUMN extra{number} float DEFAULT random()".encode())
            followed.db.execute("ALTER TABLE items ALTER COLUMN note TYPE text USING note || 'y'")
    followed.in_step()
    followed.logged("the table was rewritten")
    assert readers.answers
    assert readers.states == {"ready"}
    assert not readers.errors, readers.errors[:3]


@pytest.mark.parametrize("rewrite", ["VACUUM FULL items", "CLUSTER items USING items_pkey", "REINDEX TABLE items"])
def test_a_table_that_is_packed_stays_ready_and_answers(followed: Followed, rewrite: str) -> None:
    with Readers(followed.daemon) as readers:
        for number in range(3):
            followed.db.execute(rewrite.encode())
            followed.db.execute("UPDATE items SET v = ARRAY[%s, 1, 1]::vector WHERE id = 1", [number])
            followed.in_step()
    assert readers.answers
    assert readers.states == {"ready"}
    assert not readers.errors, readers.errors[:3]


def test_columns_that_nothing_depends_on_come_and_go_unnoticed(followed: Followed) -> None:
    followed.db.execute("ALTER TABLE items ADD COLUMN more text DEFAULT 'm', ADD COLUMN other int")
    followed.db.execute("ALTER TABLE items DROP COLUMN note")
    followed.db.execute("UPDATE items SET v = '[5,5,5]', other = 1 WHERE id = 7")
    followed.db.execute("ALTER TABLE items RENAME COLUMN other TO another")
    followed.in_step()
    assert "source_doubted" not in followed.log


def test_a_truncated_table_is_empty_and_is_not_read_a_second_time(followed: Followed) -> None:
    followed.db.execute("TRUNCATE items")
    assert followed.client.search("items", [1, 0, 0], consistency="strong") == []
    followed.db.execute("BEGIN; TRUNCATE items; INSERT INTO items VALUES (5, '[1,2,3]'); COMMIT")
    followed.in_step()
    assert read_index(followed.client, "items") == {5: [1, 2, 3]}
    assert "source_doubted" not in followed.log


# Changed values and types


def test_vectors_that_an_alter_column_computes_anew_are_found(database: str, followed: Followed) -> None:
    with writers(database, UPSERT):
        followed.db.execute("ALTER TABLE items ALTER COLUMN v TYPE vector(3) USING ARRAY[id, 9, 9]::vector(3)")
    followed.in_step()
    assert followed.client.search("items", [3, 9, 9], k=1)[0].key == 3
    followed.logged("column v was altered")


def test_other_values_in_the_column_that_decides_what_is_live_are_noticed(followed: Followed) -> None:
    followed.db.execute(
        "ALTER TABLE items ALTER COLUMN deleted_at TYPE date USING CASE WHEN id % 10 = 1 THEN date '2000-01-01' END"
    )
    followed.in_step()
    assert 10 in read_index(followed.client, "items")


def test_a_column_dropped_and_added_again_under_its_name_is_noticed(followed: Followed) -> None:
    followed.db.execute("ALTER TABLE items DROP COLUMN deleted_at, ADD COLUMN deleted_at date")
    followed.in_step()
    assert len(read_index(followed.client, "items")) == ROWS


def test_a_changed_vector_dimension_makes_a_new_index_and_the_old_one_answers_meanwhile(followed: Followed) -> None:
    with Readers(followed.daemon) as readers:
        followed.db.execute("ALTER TABLE items ALTER COLUMN v TYPE vector(4) USING ARRAY[id, 1, 2, 3]::vector(4)")
        followed.in_step()
    assert not [error for error in readers.errors if "Dimension" not in error], readers.errors[:3]
    assert followed.client.search("items", [3, 1, 2, 3], k=1)[0].key == 3
    followed.db.execute("UPDATE items SET v = '[0,0,0,1]' WHERE id = 3")
    followed.in_step()
    followed.db.execute("ALTER TABLE items ALTER COLUMN v TYPE vector")
    followed.in_step()


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE items ALTER COLUMN v TYPE real[] USING v || ARRAY[4]::real[]",
        "UPDATE items SET v = v || ARRAY[4]::real[]",
    ],
)
def test_arrays_of_another_length_are_indexed(db: psycopg.Connection, daemon: Daemon, change: str) -> None:
    make_items(db, "real[]")
    db.execute("INSERT INTO items SELECT i, ARRAY[i, 1, 2]::real[] FROM generate_series(1001, 4000) AS i")
    with serving(db, daemon) as followed:
        followed.in_step()
        db.execute(change.encode())
        followed.in_step()
        assert followed.client.search("items", [3, 3, 1, 4], k=1)[0].key == 3


@pytest.mark.parametrize("vector", ["halfvec(3)", "real[]"])
def test_vectors_of_another_type_are_indexed(followed: Followed, vector: str) -> None:
    followed.db.execute(f"ALTER TABLE items ALTER COLUMN v TYPE {vector} USING v::{vector}".encode())
    followed.db.execute("UPDATE items SET v = v WHERE id = 1")
    followed.in_step()


def test_a_key_that_becomes_longer_is_followed_without_a_new_index(database: str, followed: Followed) -> None:
    with Readers(followed.daemon) as readers, writers(database, UPSERT):
        followed.db.execute("ALTER TABLE items ALTER COLUMN id TYPE bigint")
    followed.db.execute("INSERT INTO items VALUES (5000000000, '[1,2,3]')")
    followed.in_step()
    assert not readers.errors, readers.errors[:3]
    assert "source_altered" not in followed.log


def test_a_key_of_another_kind_makes_a_new_index(followed: Followed) -> None:
    followed.db.execute("ALTER TABLE items ALTER COLUMN id TYPE text")
    followed.db.execute("INSERT INTO items VALUES ('4444', '[1,2,3]')")
    followed.in_step()
    assert followed.client.search("items", [1, 2, 3], k=1)[0].key == "4444"


def test_a_column_of_a_type_that_cannot_be_read_fails_with_the_reason_until_it_is_mended(followed: Followed) -> None:
    followed.db.execute("ALTER TABLE items ALTER COLUMN v TYPE text USING v::text")
    followed.failed("column v is of type text, which holds no vector")
    followed.db.execute("ALTER TABLE items ALTER COLUMN v TYPE vector(3) USING v::vector(3)")
    followed.in_step()
    followed.db.execute("ALTER TABLE items ALTER COLUMN id TYPE numeric")
    followed.failed("column id is of type numeric, which cannot be a key")
    followed.db.execute("ALTER TABLE items ALTER COLUMN id TYPE int")
    followed.in_step()


# Columns to filter on


@pytest.fixture
def filtered(db: psycopg.Connection, daemon: Daemon) -> Iterator[Followed]:
    make_items(db, attach=", columns => ARRAY['note', 'part']")
    with serving(db, daemon) as it:
        yield it
        daemon.stop()


def found_by(followed: Followed, wanted: dict[str, object]) -> set[object]:
    return {hit.key for hit in followed.client.search("items", [1, 0, 0], k=ROWS, filter=wanted)}


def test_other_values_in_a_column_to_filter_on_are_found_by_them(filtered: Followed) -> None:
    filtered.db.execute("ALTER TABLE items ALTER COLUMN note TYPE text USING 'm' || id % 3")

    def check() -> None:
        assert found_by(filtered, {"note": "m0"}) == {key for key in range(1, ROWS) if key % 3 == 0 and key % 10}

    eventually(check)
    filtered.logged("column note was altered")


def test_a_column_to_filter_on_that_is_given_another_type_makes_a_new_index(filtered: Followed) -> None:
    assert found_by(filtered, {"note": "n"})
    filtered.db.execute("ALTER TABLE items ALTER COLUMN note TYPE int USING id % 4")

    def check() -> None:
        assert found_by(filtered, {"note": {"gt": 2}}) == {key for key in range(1, ROWS) if key % 4 == 3 and key % 10}

    eventually(check)
    filtered.daemon.stop()
    filtered.daemon.start()
    check()
    filtered.db.execute("ALTER TABLE items ALTER COLUMN note TYPE bigint")
    filtered.in_step()
    check()
    assert filtered.log.count("source_altered") == 1  # a longer integer fits the same index


def test_a_dropped_column_to_filter_on_fails_with_the_command_that_goes_on_without(filtered: Followed) -> None:
    filtered.db.execute("ALTER TABLE items DROP COLUMN note")
    said = filtered.failed("there is no column note")
    assert "--column part" in said
    assert "--column note" not in said
    filtered.db.execute(
        f"SELECT syncd.attach('items', live => '{LIVE}', metric => 'l2', columns => ARRAY['part'])".encode()
    )
    filtered.in_step()
    assert len(found_by(filtered, {"part": "a"})) == ROWS * 9 // 10


def test_a_dropped_column_to_filter_on_that_is_added_again_goes_on_with_its_values(filtered: Followed) -> None:
    filtered.db.execute("ALTER TABLE items DROP COLUMN note")
    filtered.failed("there is no column note")
    filtered.db.execute("ALTER TABLE items ADD COLUMN note int DEFAULT 7")
    filtered.in_step()
    assert len(found_by(filtered, {"note": {"gte": 7}})) == ROWS * 9 // 10


def test_a_renamed_column_to_filter_on_fails_with_the_command_that_names_it(filtered: Followed) -> None:
    filtered.db.execute("ALTER TABLE items RENAME COLUMN note TO remark")
    assert "--column remark --column part" in filtered.failed("there is no column note")


def test_a_column_to_filter_on_that_becomes_one_that_cannot_be_fails_with_the_reason(filtered: Followed) -> None:
    filtered.db.execute("ALTER TABLE items ALTER COLUMN note TYPE interval USING NULL")
    filtered.failed("column note was given a type or a collation that cannot be filtered on")
    filtered.db.execute("ALTER TABLE items ALTER COLUMN note TYPE text USING 'back'")
    filtered.in_step()
    assert len(found_by(filtered, {"note": "back"})) == ROWS * 9 // 10


# Renamed columns


def other_source(db: psycopg.Connection) -> None:
    """Another table, which goes on whatever happens to the first."""
    db.execute("CREATE TABLE others (id int PRIMARY KEY, v vector(3), deleted_at date)")
    db.execute("INSERT INTO others VALUES (1, '[1,2,3]')")
    db.execute("SELECT syncd.attach('others', metric => 'l2')")


RENAMED = {
    "the key": ("id", "key => ARRAY['renamed']", "SELECT renamed, v::real[] FROM items WHERE deleted_at IS NULL"),
    "the vector": ("v", "vector => 'renamed'", "SELECT id, renamed::real[] FROM items WHERE deleted_at IS NULL"),
    "a column of live": (
        "deleted_at",
        "live => 'renamed IS NULL'",
        "SELECT id, v::real[] FROM items WHERE renamed IS NULL",
    ),
    "a column of dataset": (
        "part",
        "dataset => $$'items' || left(renamed, 0)$$",
        "SELECT id, v::real[] FROM items WHERE deleted_at IS NULL",
    ),
}


@pytest.mark.parametrize("what", RENAMED)
@pytest.mark.parametrize("way_out", ["attached again", "renamed back"])
def test_a_renamed_column_fails_its_dataset_alone_until_it_is(
    db: psycopg.Connection, daemon: Daemon, what: str, way_out: str
) -> None:
    column, argument, query = RENAMED[what]
    make_items(db, attach=", dataset => $$'items' || left(part, 0)$$")
    other_source(db)
    with serving(db, daemon) as followed:
        followed.in_step()
        db.execute(f"ALTER TABLE items RENAME COLUMN {column} TO renamed".encode())
        said = followed.failed(f"column {column} was renamed to renamed")
        assert "attach it again: syncd attach public.items" in said
        assert "renamed" in said.partition("syncd attach")[2]
        db.execute(f"UPDATE items SET note = 'm' WHERE {'renamed' if column == 'id' else 'id'} = 1".encode())
        db.execute("UPDATE others SET v = '[3,2,1]'")
        followed.in_step("SELECT id, v::real[] FROM others", "others")
        if way_out == "renamed back":
            db.execute(f"ALTER TABLE items RENAME COLUMN renamed TO {column}".encode())
            db.execute("UPDATE items SET v = '[7,7,7]' WHERE id = 2")
            followed.in_step()
            return
        given = {
            "key": "key => ARRAY['id']",
            "live": f"live => '{LIVE}'",
            "dataset": "dataset => $$'items' || left(part, 0)$$",
        }
        given[argument.partition(" ")[0]] = argument
        db.execute(f"SELECT syncd.attach('items', {', '.join(given.values())}, metric => 'l2')".encode())
        followed.in_step(query)


# The table itself


def test_a_renamed_table_and_a_table_in_another_schema_are_followed(followed: Followed) -> None:
    followed.db.execute("ALTER TABLE items RENAME TO things")
    followed.db.execute("UPDATE things SET v = '[1,1,1]' WHERE id = 1")
    followed.in_step(followed.query.replace("items", "things"))
    followed.db.execute("CREATE SCHEMA elsewhere")
    followed.db.execute("ALTER TABLE things SET SCHEMA elsewhere")
    followed.db.execute("INSERT INTO elsewhere.things VALUES (4000, '[1,1,1]')")
    followed.in_step(followed.query.replace("items", "elsewhere.things"))
    sources = {status.source for status in followed.client.datasets()}
    assert "elsewhere.things" in sources


def test_a_strong_read_beside_a_renaming_holds_what_was_committed_with_it(followed: Followed) -> None:
    old, new = "items", "things"
    for number in range(5000, 5015):
        with followed.db.transaction():
            followed.db.execute(f"ALTER TABLE {old} RENAME TO {new}".encode())
            followed.db.execute(f"INSERT INTO {new} VALUES ({number}, '[7,{number},7]')".encode())
        hits = followed.client.search("items", [7, number, 7], k=1, consistency="strong")
        assert hits[0].key == number
        old, new = new, old


def test_a_dropped_table_says_so_until_it_is_detached(db: psycopg.Connection, daemon: Daemon) -> None:
    make_items(db)
    other_source(db)
    with serving(db, daemon) as followed:
        followed.in_step()
        (oid,) = db.execute("SELECT 'items'::regclass::oid").fetchone() or [None]
        db.execute("DROP TABLE items")
        followed.failed(f"the table was dropped: run: syncd detach {oid}")
        db.execute("UPDATE others SET v = '[3,2,1]'")
        followed.in_step("SELECT id, v::real[] FROM others", "others")
        db.execute("SELECT syncd.detach(%s)", [str(oid)])

        def check() -> None:
            with pytest.raises(UnknownDataset):
                followed.client.search("items", [1, 0, 0])

        eventually(check)


@pytest.mark.parametrize("detached", ["before", "after"])
def test_a_table_dropped_and_made_again_under_its_name_is_another_source(followed: Followed, detached: str) -> None:
    db = followed.db
    (oid,) = db.execute("SELECT 'items'::regclass::oid").fetchone() or [None]
    db.execute("BEGIN; DROP TABLE items; CREATE TABLE items (id int PRIMARY KEY, v vector(3), deleted_at date); COMMIT")
    db.execute("INSERT INTO items VALUES (1, '[3,3,3]')")
    if detached == "before":
        db.execute("SELECT syncd.detach(%s)", [str(oid)])
    db.execute("SELECT syncd.attach('items', live => 'deleted_at IS NULL', metric => 'l2')")
    if detached == "after":

        def taken() -> None:
            assert followed.client.status().quarantined == 1

        eventually(taken)
        db.execute("SELECT syncd.detach(%s)", [str(oid)])
    db.execute("INSERT INTO items VALUES (2, '[4,3,3]')")
    followed.in_step()


# Triggers


def trigger(db: psycopg.Connection, event: str) -> str:
    """The name of one of the table's triggers."""
    row = db.execute(
        "SELECT tgname FROM pg_trigger WHERE tgrelid = 'items'::regclass AND tgname LIKE %s", [f"syncd_%_{event}"]
    ).fetchone()
    assert row is not None
    return str(row[0])


def test_rows_written_while_a_trigger_was_disabled_are_found_once_it_is_enabled_again(followed: Followed) -> None:
    name = trigger(followed.db, "insert")
    followed.db.execute(f"ALTER TABLE items DISABLE TRIGGER {name}".encode())
    followed.logged(f"trigger {name} was disabled")
    followed.db.execute("INSERT INTO items VALUES (1000, '[1,1,1]')")
    followed.db.execute(f"ALTER TABLE items ENABLE ALWAYS TRIGGER {name}".encode())
    followed.in_step()
    followed.logged(f"trigger {name} was enabled again")


def test_rows_written_while_a_trigger_was_off_within_one_transaction_are_found(followed: Followed) -> None:
    name = trigger(followed.db, "update")
    followed.db.execute(
        f"BEGIN; ALTER TABLE items DISABLE TRIGGER {name}; UPDATE items SET v = '[2,2,2]' WHERE id < 50; "
        f"ALTER TABLE items ENABLE ALWAYS TRIGGER {name}; COMMIT".encode()
    )
    followed.in_step()
    followed.logged(f"trigger {name} was altered")


def test_rows_truncated_while_the_trigger_was_off_are_gone(followed: Followed) -> None:
    name = trigger(followed.db, "truncate")
    followed.db.execute(
        f"BEGIN; ALTER TABLE items DISABLE TRIGGER {name}; TRUNCATE items; "
        f"ALTER TABLE items ENABLE ALWAYS TRIGGER {name}; COMMIT".encode()
    )
    followed.in_step()


def test_what_was_written_without_triggers_while_syncd_was_down_is_found_at_start(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    make_items(db)
    with serving(db, daemon) as followed:
        followed.in_step()
        daemon.stop()
    name = trigger(db, "update")
    db.execute(f"ALTER TABLE items DISABLE TRIGGER {name}".encode())
    db.execute("UPDATE items SET v = '[2,2,2]' WHERE id < 50")
    db.execute(f"ALTER TABLE items ENABLE ALWAYS TRIGGER {name}".encode())
    with serving(db, daemon) as followed:
        followed.in_step()
        daemon.stop()
    db.execute("ALTER TABLE items ALTER COLUMN v TYPE vector(3) USING ARRAY[id, 9, 9]::vector(3)")
    with serving(db, daemon) as followed:
        followed.in_step()
        followed.logged("column v was altered")


@pytest.fixture
def limited(database: str, db: psycopg.Connection, tmp_path: Path) -> Iterator[Followed]:
    """A service whose role owns nothing and may just read the table."""
    role = f"syncd_limited_{os.getpid()}_{next(roles)}"
    make_items(db)
    other_source(db)
    db.execute(f"CREATE ROLE {role} LOGIN".encode())
    db.execute(f"GRANT USAGE ON SCHEMA syncd TO {role}".encode())
    db.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON ALL TABLES IN SCHEMA syncd TO {role}".encode())
    db.execute(f"GRANT ALL ON ALL SEQUENCES IN SCHEMA syncd TO {role}".encode())
    db.execute(f"GRANT SELECT ON items, others TO {role}".encode())
    daemon = Daemon(make_conninfo(database, user=role), tmp_path / "data")
    daemon.with_constant(COMPARE_SECONDS, 0.5)
    with serving(db, daemon) as it:
        it.in_step()
        it.role = role  # type: ignore[attr-defined]
        yield it
        daemon.stop()
    db.execute(f"DROP OWNED BY {role}".encode())
    db.execute(f"DROP ROLE {role}".encode())


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param("ALTER TABLE items DISABLE TRIGGER ALL", id="disabled"),
        pytest.param("ALTER TABLE items DISABLE TRIGGER ALL; ALTER TABLE items ENABLE TRIGGER ALL", id="not always"),
        pytest.param("DROP TRIGGER {insert} ON items; DROP TRIGGER {update} ON items", id="dropped"),
    ],
)
def test_while_triggers_are_off_the_table_is_compared_again_and_again(limited: Followed, damage: str) -> None:
    db = limited.db
    names = {event: trigger(db, event) for event in ("insert", "update")}
    db.execute(damage.format(**names).encode())

    def weak() -> None:
        assert limited.state() == "rebuilding"
        assert "run as the owner of the table: SELECT syncd.mend('public.items')" in limited.log

    eventually(weak)
    for number in range(2):
        with db.transaction():
            db.execute("SET LOCAL session_replication_role = replica")
            db.execute("INSERT INTO items VALUES (%s, '[1,1,1]')", [1000 + number])
            db.execute("UPDATE items SET v = ARRAY[%s, 8, 8]::vector WHERE id = 1", [number])

        def check() -> None:
            assert read_index(limited.client, "items") == read_table(db, limited.query)

        eventually(check)
    assert limited.state() == "rebuilding"
    with pytest.raises(TimedOut, match="trigger"):
        limited.client.search("items", [1, 0, 0], consistency="strong", timeout_ms=100)
    db.execute(f"SELECT syncd.attach('items', live => '{LIVE}', metric => 'l2')".encode())
    limited.in_step()


def test_writes_as_a_replica_are_changes_like_any_other(followed: Followed) -> None:
    with followed.db.transaction():
        followed.db.execute("SET LOCAL session_replication_role = replica")
        followed.db.execute("INSERT INTO items VALUES (1000, '[1,2,9]')")
        followed.db.execute("DELETE FROM items WHERE id = 2")
    hits = followed.client.search("items", [1, 2, 9], k=1, consistency="strong")
    assert hits[0].key == 1000
    followed.in_step()
    assert "source_doubted" not in followed.log


def test_a_load_between_disable_and_enable_trigger_all_is_found(followed: Followed) -> None:
    followed.db.execute("ALTER TABLE items DISABLE TRIGGER ALL")
    followed.db.execute("INSERT INTO items SELECT i, '[1,1,1]' FROM generate_series(1000, 3000) AS i")
    followed.db.execute("ALTER TABLE items ENABLE TRIGGER ALL")

    def check() -> None:
        assert read_index(followed.client, "items") == read_table(followed.db, followed.query)

    eventually(check)


# Rights


def test_row_level_security_fails_the_dataset_and_hides_no_row(limited: Followed) -> None:
    db = limited.db
    db.execute("CREATE POLICY part ON items USING (id < 50)")
    db.execute("ALTER TABLE items ENABLE ROW LEVEL SECURITY")
    db.execute("ALTER TABLE items FORCE ROW LEVEL SECURITY")
    limited.failed("row-level security would hide rows of public.items")
    db.execute("UPDATE items SET v = '[6,6,6]' WHERE id = 100")
    db.execute("UPDATE others SET v = '[3,2,1]'")
    limited.in_step("SELECT id, v::real[] FROM others", "others")
    assert limited.state() == "failed"
    db.execute("ALTER TABLE items DISABLE ROW LEVEL SECURITY")
    limited.in_step()


def test_revoked_rights_fail_the_dataset_until_they_are_granted_again(limited: Followed) -> None:
    db, role = limited.db, limited.role  # type: ignore[attr-defined]
    db.execute(f"REVOKE SELECT ON items FROM {role}".encode())
    limited.failed('GRANT SELECT ON "public"."items"')
    db.execute("UPDATE items SET v = '[6,6,6]' WHERE id = 100")
    db.execute("UPDATE others SET v = '[3,2,1]'")
    limited.in_step("SELECT id, v::real[] FROM others", "others")
    db.execute(f"GRANT SELECT ON items TO {role}".encode())
    limited.in_step()


def test_a_role_that_does_not_own_the_table_says_what_the_owner_is_to_run(limited: Followed) -> None:
    limited.db.execute(f"ALTER TABLE items DISABLE TRIGGER {trigger(limited.db, 'insert')}".encode())
    limited.logged("triggers_not_mended")
    limited.logged("SELECT syncd.mend('public.items');")
    limited.db.execute(f"SELECT syncd.attach('items', live => '{LIVE}', metric => 'l2')".encode())
    limited.in_step()


def test_triggers_are_mended_where_the_role_may(db: psycopg.Connection, daemon: Daemon) -> None:
    make_items(db)
    with serving(db, daemon) as followed:
        followed.in_step()
        db.execute("BEGIN; ALTER TABLE items DISABLE TRIGGER ALL; INSERT INTO items VALUES (1000, '[1,1,1]'); COMMIT")
        followed.logged("triggers_mended")
        followed.in_step()
        db.execute("INSERT INTO items VALUES (1001, '[1,1,1]')")
        assert len(followed.client.search("items", [1, 1, 1], k=2, max_distance=0.0, consistency="strong")) == 2
        followed.in_step()


# Expressions that fail


def test_rows_on_which_an_expression_fails_are_quarantined_and_the_others_go_on(
    db: psycopg.Connection, daemon: Daemon
) -> None:
    db.execute("CREATE TABLE items (id int PRIMARY KEY, v vector(3), part int DEFAULT 1, deleted_at date)")
    db.execute("INSERT INTO items SELECT i, ARRAY[i, 1, 1]::vector FROM generate_series(1, 3000) AS i")
    db.execute("SELECT syncd.attach('items', live => '10 / part > 0', metric => 'l2')")
    good = "SELECT id, v::real[] FROM items WHERE part <> 0"
    with serving(db, daemon) as followed:
        followed.in_step(good)
        db.execute("INSERT INTO items VALUES (3001, '[1,1,1]', 0), (3002, '[1,1,1]', 1), (3003, '[1,1,1]', 0)")
        db.execute("UPDATE items SET part = 0 WHERE id IN (1, 1500)")
        followed.in_step(good)
        assert followed.client.status().quarantined == 4
        db.execute("UPDATE items SET v = '[5,5,5]' WHERE id % 2 = 0")
        followed.in_step(good)
        daemon.kill()  # there is a checkpoint or not: it is read as a whole, or what has changed since
    db.execute("VACUUM FULL items")
    with serving(db, daemon) as followed:
        followed.in_step(good)
        assert followed.client.status().quarantined == 4

        def listed() -> None:
            found = db.execute("SELECT key, reason FROM syncd.quarantine ORDER BY key").fetchall()
            assert found == [(key, "expression_failed") for key in ("1", "1500", "3001", "3003")]

        eventually(listed)
        db.execute("UPDATE items SET part = 2")
        followed.in_step()
        assert followed.client.status().quarantined == 0


def test_a_table_all_of_whose_rows_fail_is_quarantined_whole_and_mended(followed: Followed) -> None:
    db = followed.db
    db.execute("CREATE FUNCTION picky(int) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN RETURN 'items'; END $$")
    db.execute("SELECT syncd.attach('items', live => 'deleted_at IS NULL', dataset => 'picky(id)', metric => 'l2')")
    followed.in_step()
    db.execute(
        "CREATE OR REPLACE FUNCTION picky(int) RETURNS text IMMUTABLE LANGUAGE plpgsql AS "
        "$$ BEGIN IF $1 > 2 THEN RAISE EXCEPTION 'no'; END IF; RETURN 'items'; END $$"
    )
    db.execute("UPDATE items SET v = '[1,2,3]'")
    followed.in_step("SELECT id, v::real[] FROM items WHERE id <= 2")
    db.execute("CREATE OR REPLACE FUNCTION picky(int) RETURNS text IMMUTABLE LANGUAGE sql AS $$ SELECT 'items' $$")
    db.execute("UPDATE items SET v = '[3,2,1]'")
    followed.in_step()
