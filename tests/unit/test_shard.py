"""Shards: which buckets each has, and how they are named."""

from __future__ import annotations

import itertools

import pytest

from syncd.shard import BUCKETS, MOST_SHARDS, Shard


@pytest.mark.parametrize("of", [1, 2, 3, 5, 7, 64, 100, MOST_SHARDS])
def test_the_shards_of_a_layout_share_all_buckets_and_none_is_much_larger(of: int) -> None:
    shards = [Shard(of, number) for number in range(of)]
    assert shards[0].first_bucket == 0
    assert shards[-1].last_bucket == BUCKETS - 1
    assert all(
        one.last_bucket + 1 == other.first_bucket for one, other in itertools.pairwise(shards)
    )
    sizes = [each.share * BUCKETS for each in shards]
    assert sum(sizes) == BUCKETS
    assert max(sizes) - min(sizes) <= 1


def test_twice_as_many_shards_divide_each_range_in_two() -> None:
    for number in range(7):
        one, halves = Shard(7, number), (Shard(14, 2 * number), Shard(14, 2 * number + 1))
        assert one.first_bucket == halves[0].first_bucket
        assert one.last_bucket == halves[1].last_bucket


def test_a_shard_is_read_as_it_is_written() -> None:
    assert Shard.parse("3/4") == Shard(4, 3)
    assert str(Shard(4, 3)) == "3/4"


@pytest.mark.parametrize(
    "text",
    ["", "4", "4/4", "-1/4", "0/0", "0/", "/4", "1/2/3", "0 / 4", "01/4", "0/4097", "a/b", "٣/4"],
)
def test_a_text_that_names_no_shard_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"shard|i/n"):
        Shard.parse(text)
