"""A page that is dealt out to many datasets."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from syncd.index.dataset import DatasetIndex
from syncd.postgres.outbox import Cursor
from syncd.postgres.source import Source
from syncd.sync.registry.datasets import Registry
from syncd.sync.source.applying import apply
from syncd.sync.source.followed import FollowedSource
from syncd.sync.source.rows import Row, Rows
from syncd.types import Position, Snapshot

DATASETS = 30


@pytest.fixture
def followed(tmp_path: Path) -> FollowedSource:
    source = Source(
        id=1,
        oid=1,
        schema="public",
        table="chunks",
        key=["id"],
        key_types=["bigint"],
        vector="embedding",
        vector_type="vector",
        dimension=None,
        project="'default'",
        dataset="name",
        live="true",
        metric="cosine",
        columns=[],
        column_kinds=[],
        arguments_md5="",
        send="vector_send",
    )
    position = Position(Snapshot.parse("10:10:"), 0)
    followed = FollowedSource(source, Registry(tmp_path), Cursor(position))
    followed.begin_scan()
    return followed


def row(key: int, dataset: int | None, *elements: float) -> Row:
    sent = np.array(elements or (key + 1, 1), dtype=">f4").tobytes()
    name = None if dataset is None else f"of_{dataset}"
    return key, "default", name, b"\0\x02\0\0" + sent, 7 * key, None


def rows_of(followed: FollowedSource) -> dict[int, str]:
    """The dataset of each indexed key; each is indexed once."""
    found: dict[int, str] = {}
    for name, dataset in followed.datasets.items():
        keys = dataset.index.view.keys(None, 1000).keys
        assert len(keys) == dataset.index.count, "a key is indexed twice"
        assert found.keys().isdisjoint(keys), "a key is in two datasets"
        found |= dict.fromkeys(map(int, keys), name)
    return found


def page(start: int, stop: int, shift: int = 0) -> Rows:
    return Rows.of([row(key, (key + shift) % DATASETS) for key in range(start, stop)])


def test_a_page_whose_write_failed_in_the_middle_is_applied_again_without_double_keys(
    followed: FollowedSource,
) -> None:
    apply(followed, [], page(0, 100))
    write, calls = DatasetIndex.apply_stored, iter(range(1000))

    def failing(self: DatasetIndex, *arguments: object, **named: object) -> object:
        if next(calls) == DATASETS // 2:
            raise OSError("the disk is full")
        return write(self, *arguments, **named)  # type: ignore[arg-type]

    with patch.object(DatasetIndex, "apply_stored", failing), pytest.raises(OSError, match="full"):
        apply(followed, [], page(100, 200))
    assert apply(followed, [], page(100, 200)) < 100
    assert rows_of(followed) == {key: f"default/of_{key % DATASETS}" for key in range(200)}


def test_rows_move_and_go_and_bad_ones_are_quarantined_all_in_one_page(
    followed: FollowedSource,
) -> None:
    apply(followed, [], page(0, 100))
    bad = [row(0, 0, np.nan, 1), row(1, 1, 1, 2, 3), row(2, None), row(3, 3, 0, 0)]
    moved = [row(key, (key + 1) % DATASETS) for key in range(4, 50)]
    apply(followed, range(50, 60), Rows.of([*bad, *moved]))
    reasons = {key: each.reason for key, each in followed.quarantine.items()}
    assert reasons == {0: "nan", 1: "dimension_mismatch", 2: "null_dataset", 3: "zero_norm"}
    kept = {key: f"default/of_{(key + (key < 50)) % DATASETS}" for key in range(4, 100)}
    assert rows_of(followed) == {key: kept[key] for key in kept if not 50 <= key < 60}
    for key in (4, 99):
        index = followed.datasets[kept[key]].index  # type: ignore[index]
        vector = index.view.vector_of(key)
        assert vector is not None
        np.testing.assert_allclose(vector, [key + 1, 1], rtol=1e-6)


def test_the_directory_is_made_again_without_losing_the_rows_of_the_page(
    followed: FollowedSource,
) -> None:
    with patch("syncd.sync.source.key_homes.SMALL_MAP_ENTRIES", 50):
        apply(followed, [], page(0, 40))
        for shift in range(1, 5):
            apply(followed, [], page(0, 40, shift))
            assert rows_of(followed) == {
                key: f"default/of_{(key + shift) % DATASETS}" for key in range(40)
            }
