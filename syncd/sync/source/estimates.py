"""Estimates of the number of rows that a scan has to read, from indexes and server statistics."""

from __future__ import annotations

from collections.abc import Sequence

import psycopg
from psycopg import sql

from syncd.statements import filled
from syncd.sync.source.followed import FollowedSource
from syncd.sync.source.scan import Scan


def nearest_to_its_end(
    connection: psycopg.Connection, scanned: Sequence[FollowedSource]
) -> FollowedSource:
    """The source with the fewest rows left to read: a small source answers before a large one.

    Sources that do not answer yet come first. The numbers are those of the server's statistics.
    """
    if len(scanned) == 1:
        return scanned[0]
    query = filled(
        "passes", "estimate_rows", oids=sql.Literal([each.source.oid for each in scanned])
    )
    rows: dict[int, float] = dict(connection.execute(query, prepare=False).fetchall())

    def left(each: FollowedSource) -> tuple[bool, float]:
        assert each.scan is not None
        return not each.reading, max(rows.get(each.source.oid, 0.0) - each.scan.rows, 0.0)

    return min(scanned, key=left)


def expected_rows(connection: psycopg.Connection, each: FollowedSource, scan: Scan) -> int:
    """Approximate number of rows that a scan has to read, to show its progress.

    It is the number of indexed rows; if there are none, the server's statistics.
    """
    known = sum(
        one.index.count
        for name, one in each.datasets.items()
        if scan.only is None or name in scan.only
    )
    if known:
        return known
    query = filled("passes", "estimate_rows", oids=sql.Literal([each.source.oid]))
    row = connection.execute(query, prepare=False).fetchone()
    return 0 if row is None else int(row[1] * each.source.shard.share)
