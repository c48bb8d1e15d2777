"""Turns of the shards that verify: at most two at a time.

Each shard reads the whole table to compare its part of it. All shards at once would be a heavy load
of the server.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg

from syncd.errors import DatabaseError
from syncd.shard import Shard
from syncd.statements import statement

FIRST_PAUSE_SECONDS = 1.0
"""Shortest pause before the next try. Each try takes a connection and a pass."""
LONGEST_PAUSE_SECONDS = 30.0
"""Longest pause before the next try: with 64 shards, one of them tries twice a second."""
PAUSE_SHARE = 0.25
"""The pause as a share of the time that a verify has waited."""


class OthersVerify(DatabaseError):
    """Two other shards verify at present."""


def take_turn(connection: psycopg.Connection[Any], shard: Shard) -> None:
    """Take one of the two turns until the transaction ends; raises ``OthersVerify``.

    A syncd that has all rows needs none.
    """
    if shard.is_whole:
        return
    if connection.execute(statement("verify", "take_turn")).fetchone() != (True,):
        raise OthersVerify("two other shards verify at present", hint="verify again later")


def pauses() -> Iterator[float]:
    """Seconds to wait before each next try."""
    waited = 0.0
    while True:
        pause = min(max(waited * PAUSE_SHARE, FIRST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)
        waited += pause
        yield pause
