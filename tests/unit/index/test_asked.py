"""The sample of the queries that were asked: uniform, bounded, and old queries fade."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np

from syncd.index import asked as sampling
from syncd.index.asked import ENOUGH, REMEMBERED, SAMPLED, AskedQueries
from syncd.index.dataset import DatasetIndex
from syncd.index.filter.language import parse_filter
from syncd.index.rows.vectors import Vectors
from syncd.types import AttachedColumn


def numbered(start: int, stop: int, dim: int = 4) -> Vectors:
    """Queries that carry their number."""
    return np.repeat(np.arange(start, stop, dtype=np.float32)[:, None], dim, axis=1)


def sampled(asked: AskedQueries) -> list[int]:
    sample = asked.sample()
    assert sample is not None
    return sorted(sample.queries[:, 0].astype(int).tolist())


def test_every_query_has_the_same_chance_to_be_sampled() -> None:
    counts = np.zeros(8)
    for _ in range(40):
        asked = AskedQueries()
        for start in range(0, 4096, 64):
            asked.note(numbered(start, start + 64), None, None)
        counts += np.bincount(np.array(sampled(asked)) // 512, minlength=8)
    share = counts / counts.sum()
    assert abs(share - 1 / 8).max() < 0.012, share.tolist()  # five standard deviations


def test_the_sample_is_bounded_and_old_queries_fade() -> None:
    asked = AskedQueries()
    asked.note(numbered(0, REMEMBERED), None, None)
    assert len(asked) == SAMPLED
    asked.note(numbered(REMEMBERED, 4 * REMEMBERED), None, None)
    assert len(asked) == SAMPLED
    old = sum(number < REMEMBERED for number in sampled(asked))
    assert old < 0.12 * SAMPLED, f"{old} are left; a share of 1/e³ is expected"


def test_all_samples_together_are_bounded() -> None:
    with patch.object(sampling, "TOTAL_BYTES", sampling._memory.used + SAMPLED * 4 * 4):
        first, second = AskedQueries(), AskedQueries()
        for asked in (first, second):
            asked.note(numbered(0, 600), None, None)
        assert (len(first), len(second)) == (SAMPLED, 0)
        del first, asked
        second.note(numbered(0, 600), None, None)
        assert len(second) == SAMPLED


def test_a_sample_of_large_vectors_has_fewer_queries_or_none() -> None:
    asked = AskedQueries()
    asked.note(numbered(0, 600, dim=4096), None, None)
    assert len(asked) == 256
    asked.note(numbered(0, 600, dim=8192), None, None)
    assert len(asked) == 0
    asked.note(numbered(0, 600), None, None)
    assert len(asked) == SAMPLED, "another dimension begins again"


def test_the_same_query_again_and_again_is_not_enough() -> None:
    asked = AskedQueries()
    for _ in range(100):
        asked.note(numbered(0, ENOUGH - 1), None, None)
    assert asked.sample() is None
    assert not asked.is_due(4, "rows")
    for _ in range(1000):
        asked.note(numbered(0, ENOUGH + 100), None, None)
    assert asked.sample() is not None
    assert asked.is_due(4, "rows")
    assert not asked.is_due(5, "rows"), "these are not queries of five dimensions"


def test_recall_is_due_again_when_half_of_the_sample_is_new() -> None:
    asked = AskedQueries()
    asked.note(numbered(0, ENOUGH), None, None)
    assert asked.is_due(4, "rows")
    sample = asked.sample()
    assert sample is not None
    asked.measured(sample)
    assert not asked.is_due(4, "queries")
    asked.note(numbered(200, 200 + SAMPLED // 2 - 1), None, None)
    assert not asked.is_due(4, "queries")
    asked.note(numbered(500, 501), None, None)
    assert asked.is_due(4, "queries")


def test_a_query_keeps_its_filter_and_its_own_key() -> None:
    asked, columns = AskedQueries(), (AttachedColumn("lang", "text"),)
    for number in range(300):
        wanted = parse_filter({"lang": str(number)}, columns, "d")
        asked.note(numbered(number, number + 1), wanted, number if number % 2 else None)
    large = parse_filter({"lang": {"in": ["x" * 50] * 100}}, columns, "d")
    asked.note(numbered(300, 301), large, None)
    sample = asked.sample(3)
    assert sample is not None
    assert len(sample) == 300, "a query with a large filter is not kept"
    assert "array" not in repr(sample), "a log could show it"
    for query, wanted, own in zip(sample.queries, sample.filters, sample.own, strict=True):
        number = int(query[0])
        assert wanted is not None
        assert str(number).encode() in wanted.text
        assert own == (number if number % 2 else None)


def test_saved_files_hold_no_query(tmp_path: Path) -> None:
    index = DatasetIndex.create(tmp_path / "p" / "d", metric="l2", key_kind="integer", dim=4)
    index.apply(range(10), numbered(0, 10), [])
    index.asked.note(np.full((300, 4), 123.456, dtype=np.float32), None, None)
    index.save()
    secret = np.float32(123.456).tobytes()
    assert not [
        path for path in tmp_path.rglob("*") if path.is_file() and secret in path.read_bytes()
    ]
