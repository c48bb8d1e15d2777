"""Merging: the answers of the shards are what one index of all rows would answer."""

from __future__ import annotations

import random
import zlib
from typing import Any

import pytest
from msgspec import UNSET
from msgspec.structs import replace

from syncd.cluster import merge
from syncd.protocol.messages import GetResult, SearchResult, WirePosition, WireRow
from syncd.protocol.status_messages import DatasetStatus

POSITIONS = ("20:20:", "10:12:10", "10:12:")


def answers(
    rows: list[tuple[float, Any]], k: int, *, columns: bool
) -> tuple[list[SearchResult], list[tuple[float, Any]]]:
    """The nearest ``k`` rows of three shards, and of all rows."""
    shards: list[list[tuple[float, Any]]] = [[], [], []]
    for row in rows:
        shards[zlib.crc32(str(row[1]).encode()) % 3].append(row)
    found = []
    for position, each in zip(POSITIONS, shards, strict=True):
        nearest = sorted(each, key=lambda row: row[0])[:k]
        found.append(
            SearchResult(
                [key for _, key in nearest],
                [distance for distance, _ in nearest],
                WirePosition(position, 1),
                len(nearest) / 10,
                {"name": [f"n{key}" for _, key in nearest]} if columns else UNSET,
            )
        )
    return found, sorted(rows, key=lambda row: row[0])[:k]


@pytest.mark.parametrize("keys", ["integer", "text", "composite"])
def test_the_nearest_rows_of_all_shards_are_the_nearest_of_all_rows(keys: str) -> None:
    generator = random.Random(keys)
    for rows in (0, 1, 5, 40):
        for k in (1, 7, 100):
            distances = generator.sample(range(1000), rows)
            named: list[tuple[float, Any]] = [
                (one / 7, {"integer": one, "text": str(one), "composite": [one, "a"]}[keys])
                for one in distances
            ]
            for columns in (False, True):
                found, expected = answers(named, k, columns=columns)
                one = merge.search(found, k, many=False)
                assert list(zip(one.distances, one.keys, strict=True)) == expected
                assert one.position == WirePosition("10:12:10", 1)
                assert one.lag_seconds == max(each.lag_seconds for each in found)
                assert one.columns == (
                    {"name": [f"n{key}" for _, key in expected]} if columns else UNSET
                )
                both = [
                    replace(
                        each,
                        keys=[each.keys, each.keys],
                        distances=[each.distances, each.distances],
                        columns={"name": [each.columns["name"]] * 2}
                        if isinstance(each.columns, dict)
                        else UNSET,
                    )
                    for each in found
                ]
                many = merge.search(both, k, many=True)
                assert (many.keys, many.distances) == ([one.keys] * 2, [one.distances] * 2)
                if expected:
                    more, all_nearest = answers(named, k + 1, columns=columns)
                    own = expected[0][1]
                    others = merge.search(more, k, many=False, without=own).keys
                    assert others == [key for _, key in all_nearest[1:]]


def test_rows_come_in_the_order_in_which_they_were_asked_for() -> None:
    parts = [GetResult([WireRow(3), WireRow(1)]), GetResult([WireRow(2)]), GetResult([])]
    assert [row.key for row in merge.get(parts, [1, 2, 9, 3])] == [1, 2, 3]
    uuid = "00000000-0000-0000-0000-000000000001"
    assert [row.key for row in merge.get([GetResult([WireRow(uuid)])], [uuid.upper()])] == [uuid]


def test_a_dataset_is_in_the_worst_state_of_its_parts_and_numbers_are_sums() -> None:
    part = DatasetStatus(
        dataset="default/d", source="public.d", state="ready", count=30, tombstones=1, dim=3,
        metric="l2", index="codes", recall=0.9, recall_p5=0.8, recall_of="rows", verified=True,
        bytes=10, bytes_memory=5, lag_seconds=0.0, in_sync=True,
    )  # fmt: skip
    empty = replace(part, count=0, dim=None, index=None, recall=None, recall_p5=None, in_sync=None)
    worse = replace(
        part, state="catching_up", count=10, recall=0.5, recall_p5=0.7, lag_seconds=4.0,
        index="building", in_sync=False,
    )  # fmt: skip
    other = replace(part, dataset="default/c")
    merged = merge.datasets([[part], [empty], [worse, other]])
    assert [each.dataset for each in merged] == ["default/c", "default/d"]
    found = merged[1]
    assert (found.state, found.count, found.tombstones, found.dim) == ("catching_up", 40, 3, 3)
    assert (found.index, found.recall_p5) == ("building", 0.7)
    assert found.recall == pytest.approx(0.8)
    assert (found.bytes, found.lag_seconds, found.in_sync) == (30, 4.0, False)
    assert merge.dataset([part, empty]).in_sync is None
