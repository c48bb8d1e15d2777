"""``syncd.attach`` in a program's own migrations, by the helper and as plain SQL."""

from __future__ import annotations

import io
from pathlib import Path

import psycopg
import pytest
from alembic import command
from alembic.config import Config

from tests.apps.urls import sqlalchemy_url

ENVIRONMENT = """
from alembic import context
from sqlalchemy import NullPool, create_engine

url = context.config.get_main_option("sqlalchemy.url")
if context.is_offline_mode():
    # as in the template of `alembic init`
    context.configure(url=url, literal_binds=True, dialect_opts={"paramstyle": "named"})
    with context.begin_transaction():
        context.run_migrations()
else:
    with create_engine(url, poolclass=NullPool).connect() as connection:
        context.configure(connection=connection)
        with context.begin_transaction():
            context.run_migrations()
"""
REVISION = """
from alembic import op
from syncd.apps.alembic import attach, detach

revision, down_revision = "0001", None

def upgrade():
    op.execute(
        "CREATE TABLE chunks (id int PRIMARY KEY, lang text, gone bool DEFAULT false, "
        "embedding real[])"
    )
    attach(
        "chunks",
        dataset="lang || '%:x'",
        live="NOT gone",
        metric="l2",
        columns=["lang"],
        key=["id"],
    )
    op.execute("CREATE TABLE notes (id int PRIMARY KEY, embedding real[])")
    op.execute("SELECT syncd.attach('notes', vector => 'embedding')")

def downgrade():
    detach("chunks")
    op.execute("DROP TABLE chunks")
    op.execute("SELECT syncd.detach('notes')")
"""
EXPECTED = [
    ("chunks", ["id"], "embedding", "'default'", "lang || '%:x'", "NOT gone", "l2", ["lang"]),
    ("notes", ["id"], "embedding", "'default'", "'notes'", "true", "cosine", []),
]


@pytest.fixture
def output() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def migrations(database: str, tmp_path: Path, output: io.StringIO) -> Config:
    """A program's Alembic with one revision."""
    (tmp_path / "versions").mkdir()
    (tmp_path / "env.py").write_text(ENVIRONMENT)
    (tmp_path / "versions" / "r0001.py").write_text(REVISION)
    config = Config(output_buffer=output)
    config.set_main_option("script_location", str(tmp_path))
    config.set_main_option("path_separator", "os")
    config.set_main_option("sqlalchemy.url", sqlalchemy_url(database).replace("%", "%%"))
    return config


def attached(db: psycopg.Connection) -> list[tuple[object, ...]]:
    return db.execute(
        "SELECT source::text, key, vector, project, dataset, live, metric, columns FROM "
        "syncd.sources "
        "WHERE source <> 'syncd.embeddings'::regclass ORDER BY 1"
    ).fetchall()


def test_a_revision_attaches_and_its_downgrade_detaches(
    db: psycopg.Connection, migrations: Config
) -> None:
    command.upgrade(migrations, "head")
    assert attached(db) == EXPECTED
    command.downgrade(migrations, "base")
    assert attached(db) == []


def test_a_revision_that_fails_attaches_nothing(db: psycopg.Connection, migrations: Config) -> None:
    revision = Path(str(migrations.get_main_option("script_location"))) / "versions" / "r0001.py"
    revision.write_text(REVISION.replace("vector => 'embedding'", "vector => 'nothing'"))
    with pytest.raises(Exception, match="has no column nothing"):
        command.upgrade(migrations, "head")
    assert attached(db) == []


def test_the_sql_that_alembic_prints_does_the_same(
    db: psycopg.Connection, migrations: Config, output: io.StringIO
) -> None:
    command.upgrade(migrations, "head", sql=True)
    assert attached(db) == []
    db.execute(output.getvalue().encode())
    assert attached(db) == EXPECTED
