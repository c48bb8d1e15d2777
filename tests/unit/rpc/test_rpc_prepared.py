"""A search is prepared on the event loop, and planned in any thread."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from syncd.index.dataset import DatasetIndex
from syncd.index.search.plan import SearchPlan, plan_search
from syncd.protocol.messages import SearchParams
from syncd.rpc import prepared_search
from syncd.rpc.prepared_search import PreparedSearch
from tests.unit.index.rows import random_vectors

SECONDS = 10


def prepared(index: DatasetIndex, name: str) -> PreparedSearch:
    dataset: Any = SimpleNamespace(
        name=name,
        key_kind="integer",
        key_kinds=("integer",),
        look=lambda: (None, index.view),
    )
    params = SearchParams(dataset=name, vector=[0.0] * 4, k=3)
    return PreparedSearch(params, dataset, lag_seconds=0.0, recall=0.95)


def test_an_answer_of_one_syncd_covers_all_shards(tmp_path: Path) -> None:
    index = DatasetIndex.create(tmp_path / "p" / "d", metric="l2", key_kind="integer")
    index.apply(range(20), random_vectors(20, 4), [])
    found = prepared(index, "d").run()
    assert (found.positions, found.coverage, found.missing) == ({"0/1": found.position}, 1.0, [])


def test_a_search_that_a_worker_plans_for_long_keeps_no_other_one_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = DatasetIndex.create(tmp_path / "p" / "d", metric="l2", key_kind="integer")
    index.apply(range(20), random_vectors(20, 4), [])
    planning, go_on = threading.Event(), threading.Event()

    def plan(view: Any, dataset: str, *given: Any, **others: Any) -> SearchPlan:
        if dataset == "slow":
            planning.set()
            assert go_on.wait(SECONDS)
        return plan_search(view, dataset, *given, **others)

    monkeypatch.setattr(prepared_search, "plan_search", plan)
    slow, quick = prepared(index, "slow"), prepared(index, "quick")
    worker = threading.Thread(target=lambda: slow.cost)
    loop = threading.Thread(target=lambda: quick.cost)
    worker.start()
    try:
        assert planning.wait(SECONDS)
        loop.start()
        loop.join(SECONDS)
        assert not loop.is_alive()
    finally:
        go_on.set()
        worker.join()
        loop.join()
    assert slow.cost == quick.cost > 0
