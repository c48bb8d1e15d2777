"""How many rows a scan is to read, as far as the indexes and the server's statistics tell."""

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
    """The source with the fewest rows left to read, as far as the server's statistics tell: it answers before a large one.

    First those that answer nothing yet.
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
    """About how many rows a scan is to read, for those who watch it: those that were there before, else what the statistics tell."""
    known = sum(
        one.index.count
        for name, one in each.datasets.items()
        if scan.only is None or name in scan.only
    )
    if known:
        return known
    query = filled("passes", "estimate_rows", oids=sql.Literal([each.source.oid]))
    row = connection.execute(query, prepare=False).fetchone()
    return 0 if row is None else int(row[1])
