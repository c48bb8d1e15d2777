"""Codes on huge pages."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
import pytest

from syncd.index.codes.huge_pages import filled_pages, use_huge_pages

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def made(rows: int) -> faiss.IndexIVFPQFastScan:
    vectors = np.random.default_rng(1).standard_normal((rows, 64), dtype=np.float32)
    index = faiss.IndexIVFPQFastScan(faiss.IndexFlatL2(64), 64, 2, 32, 4, faiss.METRIC_L2, 64)
    index.by_residual = False
    index.train(vectors[:1000])
    index.add(np.tile(vectors, (20, 1)))
    return index


def test_pages_are_those_that_codes_fill() -> None:
    index = made(50_000)  # 16 MB of codes
    pages = filled_pages(index)
    assert 6 <= len(pages) <= 9
    assert (np.diff(pages) > 0).all()
    assert filled_pages(made(1000)).size == 0


def test_codes_move_to_huge_pages_and_stay_the_same() -> None:
    if not ENABLED.exists() or "[never]" in ENABLED.read_text():
        pytest.skip("the system gives no huge pages")
    index = made(50_000)
    queries = np.random.default_rng(2).standard_normal((5, 64), dtype=np.float32)
    before = index.search(queries, 10)
    assert use_huge_pages(index) == len(filled_pages(index))
    after = index.search(queries, 10)
    np.testing.assert_array_equal(before[0], after[0])
    pages = filled_pages(index)
    assert huge_kilobytes(int(pages[0]) << 21) > 0


def huge_kilobytes(address: int) -> int:
    """Kilobytes on huge pages of the mapping that has an address (proc(5), smaps)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            inside = low <= address < high
        elif inside and first == "AnonHugePages:":
            return int(rest[0])
    return 0
