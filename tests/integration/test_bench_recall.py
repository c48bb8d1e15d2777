"""Recall in benchmarks, and settings of equal recall."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from syncd.bench.clients import Timing, clients
from syncd.bench.engines import Below, PgvectorEngine, SyncdEngine
from syncd.bench.filtered import asked, with_columns
from syncd.bench.search import Point, comparison
from syncd.bench.vector_set import Recall, generate, read, truth
from syncd.bench.versus import Recalls
from syncd.cli.bench_options import read_or_make
from syncd.errors import NotReady, ServiceUnavailable, SettingsError, SyncdError


def everything(numbers: Any, _: str) -> Any:
    return numbers


def test_recall_counts_rows_as_near_as_the_tenth_and_none_that_is_gone() -> None:
    vectors = np.array(
        [[0.0, n] for n in range(20)] + [[0.0, -n] for n in range(1, 20)], dtype=np.float32
    )
    queries = np.zeros((1, 2), dtype=np.float32)
    exact = truth(vectors, queries, "l2", track=everything)
    nearest = [1, 2, 3, 4, 5, 21, 22, 23, 24]  # key n is row n - 1: nine rows nearer than 5
    assert exact.recall([0], [[*nearest, 6]]).mean == 1.0
    assert exact.recall([0], [[*nearest, 25]]).mean == 1.0
    assert exact.recall([0], [[*nearest, 7]]).mean == 0.9
    assert exact.recall([0], [[*nearest, 24]]).mean == 0.9, "a row that is found twice counts once"
    assert exact.recall([0], [nearest[:5]]).mean == 0.5
    without = truth(vectors, queries, "l2", track=everything, gone=np.array([0, 1]))
    assert without.recall([0], [[3, 4, 5, 6, 21, 22, 23, 24, 25, 26]]).mean == 1.0
    assert without.recall([0], [[*nearest, 6]]).mean == 0.8, "rows one and two are gone"
    many = exact.recall([0] * 20, [[*nearest, 6]] * 18 + [nearest[:5]] * 2)
    assert many == Recall(0.95, 0.5, 20), "a tenth of the queries find half of their rows"


@pytest.mark.parametrize("metric", ["l2", "cosine", "ip"])
def test_exact_answers_are_those_of_plain_arithmetic(metric: str) -> None:
    made = generate(500, 7, queries=5, metric=metric)
    a, b = made.queries.astype(float)[:, None], made.base.astype(float)[None]
    products = (a * b).sum(axis=2)
    norms = np.linalg.norm(a, axis=2) * np.linalg.norm(b, axis=2)
    distances = {"l2": ((a - b) ** 2).sum(axis=2), "cosine": -products / norms, "ip": -products}[
        metric
    ]
    order = np.argsort(distances, axis=1)
    exact = truth(made.base, made.queries, metric, track=everything)
    assert exact.recall(range(5), (order[:, :10] + 1).tolist()).mean == 1.0
    assert exact.recall(range(5), (order[:, 1:11] + 1).tolist()).mean == 0.9


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_correlated_rows_pass_near_to_the_first_queries_and_far_from_the_last(metric: str) -> None:
    made = generate(2000, 7, queries=40, metric=metric)
    vectors, columns = with_columns(made)
    assert sorted(map(tuple, vectors.queries)) == sorted(map(tuple, made.queries))
    distances: dict[str, float] = {}
    for column, kinds in asked(40).items():
        assert sorted(columns[column]) == list(range(2000)), "n rows are below n"
        exact = truth(
            vectors.base,
            vectors.queries,
            metric,
            track=everything,
            gone=np.flatnonzero(columns[column] >= 100),
        )
        distances |= {
            kind: float(np.median(exact.limits[list(queries)])) for kind, queries in kinds.items()
        }
    assert distances["near"] < distances["independent"] < distances["far"]


def test_vectors_are_read_from_each_kind_of_file(tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32)
    np.save(tmp_path / "a.npy", vectors)
    np.savez(
        tmp_path / "a.npz",
        base=vectors[:40],
        queries=vectors[40:],
        neighbors=np.zeros((10, 20), dtype=np.int32),
    )
    with (tmp_path / "a.fvecs").open("wb") as file:
        for vector in vectors:
            file.write(np.int32(4).tobytes() + vector.tobytes())
    plain = read(tmp_path / "a.npy", rows=None, queries=3, metric="l2")
    assert (plain.base.shape, plain.queries.shape) == ((47, 4), (3, 4))
    assert not (plain.base[:, None] == plain.queries[None]).all(axis=2).any(), (
        "a query is not a row"
    )
    words = read(tmp_path / "a.fvecs", rows=None, queries=3, metric="l2")
    np.testing.assert_array_equal(words.base, plain.base)
    given = read(tmp_path / "a.npz", rows=None, queries=5, metric="l2")
    np.testing.assert_array_equal(given.queries, vectors[40:45])
    assert given.neighbors is not None
    assert read(tmp_path / "a.npz", rows=30, queries=5, metric="l2").neighbors is None, (
        "the neighbors are those of all rows"
    )
    assert read(tmp_path / "a.npz", rows=None, queries=5, metric="ip").neighbors is None, (
        "Euclidean"
    )
    np.savez(tmp_path / "b.npz", base=vectors[:40], queries=vectors[40:] + 9)
    foreign = read(tmp_path / "b.npz", rows=None, queries=99, metric="l2")
    np.testing.assert_array_equal(foreign.queries, vectors[40:] + 9)
    assert (len(foreign.base), foreign.neighbors) == (40, None), "no row is taken out"
    few = np.zeros((10, 3), dtype=np.int32)
    np.savez(tmp_path / "b.npz", base=vectors[:40], queries=vectors[40:], neighbors=few)
    with pytest.raises(SettingsError, match="neighbors of shape"):
        read(tmp_path / "b.npz", rows=None, queries=99, metric="l2")
    np.savez(tmp_path / "b.npz", base=vectors[:40], queries=vectors[40:, :3])
    with pytest.raises(SettingsError, match="queries of shape"):
        read(tmp_path / "b.npz", rows=None, queries=99, metric="l2")
    (tmp_path / "b.npy").write_bytes(b"nothing")
    with pytest.raises(SettingsError, match="has 46 vectors for rows, 60 are needed"):
        read_or_make(tmp_path / "a.npy", 40, 128, queries=4, metric="l2", spare=20)
    whole = read_or_make(tmp_path / "a.npy", None, 128, queries=4, metric="l2", share=0.5)
    assert (whole.rows, whole.spare, len(whole.base)) == (30, 15, 45), (
        "a third of the vectors is kept for writes"
    )
    for name in ("b.npy", "c.npy", "a.txt"):
        with pytest.raises(SettingsError):
            read(tmp_path / name, rows=None, queries=3, metric="l2")


@pytest.mark.parametrize(
    ("wanted", "settings"), [(0.1, [10]), (0.9, [87, 90]), (0.99999, [1000, None])]
)
def test_settings_of_equal_recall_bracket_it(
    wanted: float, settings: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def recall(self: Recalls, engine: PgvectorEngine) -> float:  # noqa: ARG001 - of a method
        return 1.0 if engine.ef_search is None else 1 - 9 / (engine.ef_search + 1)

    monkeypatch.setattr(Recalls, "of", recall)
    recalls = Recalls(None, None)  # type: ignore[arg-type]  # they are not used: ``of`` is replaced
    found = recalls.bracket(lambda ef: PgvectorEngine("", "t", "l2", ef, 10), wanted)
    assert [engine.ef_search for engine in found] == settings


def test_the_rate_at_equal_recall_is_between_those_of_the_bracket() -> None:
    def point(engine: str, setting: str, recall: float, qps: float) -> Point:
        return Point(engine, setting, 1, recall, 0.8, 100, qps, 1.0, 2.0, 20.0, 0.1)

    mine = point("syncd", "recall 0.9", 0.92, 4000)
    others = [
        point("pgvector", "ef_search 40", 0.91, 1000),
        point("pgvector", "ef_search 42", 0.93, 800),
    ]
    found = comparison(mine, others)
    assert (found.pgvector_qps, found.ratio) == (900.0, 4.44)
    assert comparison(mine, others[1:]).pgvector_qps == 800
    by_another_plan = point("pgvector", "ef_search 44", 1.0, 3000)
    assert comparison(mine, [*others, by_another_plan]).pgvector_qps == 3000


def test_a_client_that_cannot_search_is_an_error_and_does_not_hang(tmp_path: Path) -> None:
    queries = np.zeros((4, 2), dtype=np.float32)
    with clients(2, queries) as searchers:
        with pytest.raises(SyncdError, match="no syncd answers"):
            searchers.search(SyncdEngine(str(tmp_path / "none"), "x", 0.9, 10), 0.1)
        for process_pipe in searchers.pipes:
            process_pipe.send("no work")  # ends the process by an error
        with pytest.raises(SyncdError):
            searchers.receive()


def test_a_client_asks_for_the_keys_of_a_query_and_reports_the_errors_of_the_service(
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "s")
    asked: list[Any] = []
    answers = [
        (b'{"jsonrpc":"2.0","id":1,"result":{"keys":[7,', b'5],"distances":[1,2]}}\n'),
        (
            b'{"jsonrpc":"2.0","id":1,"error":{"code":-32000,"message":"not now",'
            b'"data":{"kind":"not_ready","hint":"wait"}}}\n',
        ),
        (b'{"jsonrpc"',),
    ]

    def serve(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as lines:
            for parts in answers:
                asked.append(msgspec.json.decode(lines.readline()))
                for part in parts:
                    connection.sendall(part)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        engine = SyncdEngine(path, "x", 0.9, 2, Below("year", 7))
        with engine.open() as connected:
            request = connected.request(np.array([1, 2], dtype=np.float32))
            assert connected.keys(connected.ask(request)) == [7, 5]
            with pytest.raises(NotReady, match="not now"):
                connected.ask(request)
            with pytest.raises(ServiceUnavailable, match="was closed"):
                connected.ask(request)
        thread.join()
    params = asked[0]["params"]
    assert (params["dataset"], params["k"], params["recall"]) == ("x", 2, 0.9)
    assert params["filter"] == {"year": {"lt": 7}}
    assert np.frombuffer(msgspec.convert(params["vector"], bytes), dtype="<f4").tolist() == [1, 2]


def test_the_share_of_the_clients_counts_a_core_for_each_client_that_can_have_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    latencies = np.zeros(1)
    alone = Timing(latencies, 1.0, seconds=3.0, cpu_seconds=0.3, clients=1)
    eight = Timing(latencies, 1.0, seconds=24.0, cpu_seconds=0.6, clients=8)
    assert alone.share == pytest.approx(0.1), "of one core"
    assert eight.share == pytest.approx(0.1), "of two cores during three seconds"
