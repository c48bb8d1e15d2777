"""A shard: the rows of every source whose key hashes into one range of buckets.

Invariant: the shards of one layout share all buckets among them, and no two have the same one. If
the number of shards doubles, each shard's range is divided in two.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

BUCKETS = 1 << 16
"""Number of buckets. PostgreSQL computes a key's bucket: see ``bucket`` in ``passes.sql``."""
MOST_SHARDS = 4096
"""Largest number of shards; each one has at least 16 buckets, so their sizes differ by 1/16."""
_FORM = re.compile(r"(0|[1-9][0-9]{0,4})/([1-9][0-9]{0,4})")


@dataclass(frozen=True, slots=True, order=True)
class Shard:
    """Shard ``number``, from 0, of a layout of ``of`` shards."""

    of: int = 1
    number: int = 0

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard that ``i/n`` names; raises ``ValueError``."""
        found = _FORM.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is not i/n, for example 0/4")
        shard = cls(int(found[2]), int(found[1]))
        if shard.of > MOST_SHARDS:
            raise ValueError(f"{text!r} has more than {MOST_SHARDS} shards")
        if shard.number >= shard.of:
            raise ValueError(
                f"{text!r} is not a shard of {shard.of}: the first is 0/{shard.of}, "
                f"the last {shard.of - 1}/{shard.of}"
            )
        return shard

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        """Its name in settings and answers: ``i/n``."""
        return f"{self.number}/{self.of}"

    @property
    def is_whole(self) -> bool:
        """Whether it has every bucket: a syncd that is not sharded."""
        return self.of == 1

    @property
    def first_bucket(self) -> int:
        """Its first bucket."""
        return -(-self.number * BUCKETS // self.of)

    @property
    def last_bucket(self) -> int:
        """Its last bucket."""
        return -(-(self.number + 1) * BUCKETS // self.of) - 1

    @property
    def share(self) -> float:
        """Share of the buckets that it has, from 0 to 1."""
        return (self.last_bucket - self.first_bucket + 1) / BUCKETS


WHOLE = Shard()
"""The shard of a syncd that is not sharded: ``0/1``."""
