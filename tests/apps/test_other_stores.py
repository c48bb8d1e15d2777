"""Tables as langchain-postgres and LlamaIndex's PGVectorStore declare them."""

from __future__ import annotations

import uuid

import psycopg
import pytest

from syncd.testing import Throwaway

LANGCHAIN_POSTGRES = """
CREATE EXTENSION IF NOT EXISTS vector;
CREATE TABLE langchain_pg_collection (
    uuid uuid PRIMARY KEY, name varchar NOT NULL UNIQUE, cmetadata json
);
CREATE TABLE langchain_pg_embedding (
    id varchar PRIMARY KEY,
    collection_id uuid REFERENCES langchain_pg_collection (uuid) ON DELETE CASCADE,
    embedding vector, document varchar, cmetadata jsonb
);
CREATE INDEX ix_cmetadata_gin ON langchain_pg_embedding USING gin (cmetadata jsonb_path_ops);
"""
PGVECTORSTORE = """
CREATE EXTENSION IF NOT EXISTS vector;
CREATE TABLE public.data_{json} (
    id bigserial PRIMARY KEY, text varchar NOT NULL, metadata_ {json}, node_id varchar,
    embedding vector(2)
);
CREATE INDEX {json}_idx_1 ON public.data_{json} USING btree ((metadata_ ->> 'ref_doc_id'));
"""


def test_each_collection_of_langchain_postgres_is_a_dataset(running: Throwaway) -> None:
    first, second = uuid.uuid4(), uuid.uuid4()
    with psycopg.connect(running.dsn, autocommit=True) as connection, running.client() as client:
        connection.execute(LANGCHAIN_POSTGRES)
        for collection, name in ((first, "first"), (second, "second")):
            connection.execute(
                "INSERT INTO langchain_pg_collection VALUES (%s, %s)", [collection, name]
            )
        connection.execute(
            "INSERT INTO langchain_pg_embedding VALUES "
            """('a', %(first)s, '[1,0]', 'A', '{"lang": "en"}'), """
            """('b', %(first)s, '[1,1]', 'B', '{"lang": "de"}'), """
            """('c', %(second)s, '[1,0,0]', 'C', '{}')""",
            {"first": first, "second": second},
        )
        attached = connection.execute(
            "SELECT * FROM syncd.attach('langchain_pg_embedding', dataset => "
            "'collection_id::text', columns => ARRAY['cmetadata'])"
        ).fetchone()
        assert attached == (3, 3, 2)
        running.catch_up()
        assert [hit.key for hit in client.search(str(first), [1, 0])] == ["a", "b"]
        assert [
            hit.key for hit in client.search(str(first), [1, 0], filter={"cmetadata.lang": "de"})
        ] == ["b"]
        assert [hit.key for hit in client.search(str(second), [1, 0, 0])] == ["c"]
        connection.execute("DELETE FROM langchain_pg_collection WHERE name = 'first'")
        running.catch_up()
        assert client.search(str(first), [1, 0]) == []


@pytest.mark.parametrize(
    ("json", "columns"), [("jsonb", ["metadata_", "node_id"]), ("json", ["node_id"])]
)
def test_a_table_of_pgvectorstore(running: Throwaway, json: str, columns: list[str]) -> None:
    with psycopg.connect(running.dsn, autocommit=True) as connection, running.client() as client:
        connection.execute(PGVECTORSTORE.format(json=json).encode())
        connection.execute(
            "SELECT syncd.attach(%s, columns => %s)", [f"public.data_{json}", columns]
        )
        connection.execute(
            f"INSERT INTO data_{json} (text, metadata_, node_id, embedding) VALUES "
            """('A', '{"ref_doc_id": "x"}', 'a', '[1,0]'), """
            """('B', '{"ref_doc_id": "y"}', 'b', '[1,1]')"""
        )
        running.catch_up()
        hits = client.search(f"data_{json}", [1, 0], include=["node_id"])
        assert [(hit.columns or {})["node_id"] for hit in hits] == ["a", "b"]
        if json == "jsonb":
            (only,) = client.search(
                f"data_{json}", [1, 0], filter={"metadata_.ref_doc_id": "y"}, include=["node_id"]
            )
            assert (only.columns or {})["node_id"] == "b"
        connection.execute(f"DELETE FROM data_{json} WHERE metadata_ ->> 'ref_doc_id' = 'x'")
        running.catch_up()
        (left,) = client.search(f"data_{json}", [1, 0], include=["node_id"])
        assert (left.columns or {})["node_id"] == "b"
