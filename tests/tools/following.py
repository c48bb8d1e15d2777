"""What each test of a tool ends with, and the writers that work beside the tool."""

from __future__ import annotations

from tests.faults.altered import Followed

WRITES = (
    "INSERT INTO items (id, v) VALUES (1000 + {n} % 200, ARRAY[{n}, 1, 1]) ON CONFLICT (id) DO UPDATE SET v = excluded.v;"
    "UPDATE items SET v = ARRAY[{n}, 2, 2], deleted_at = NULL WHERE id = 1 + {n} % 150;"
    "DELETE FROM items WHERE id = 1000 + ({n} + 100) % 200;"
    "UPDATE items SET id = 2000 + {n} WHERE id = 151 + {n} % 150"
)
"""For ``tests.faults.altered.writers``: rows come, change, get other keys and go."""


def assert_in_sync(followed: Followed, query: str = "", dataset: str = "items") -> None:
    """The index comes to equal the table, the triggers are as they should be, and verify finds every dataset in sync."""
    followed.in_step(query, dataset)
    assert problems(followed) == []
    for each in followed.client.verify().datasets:
        assert each.in_sync, each


def problems(followed: Followed) -> list[tuple[str, str, str]]:
    """Table, trigger and problem of each trigger that is not as it should be."""
    return followed.db.execute(
        "SELECT m.relation::text, m.trigger, m.problem FROM syncd.sources AS s, syncd.missing_triggers(s.id) AS m"
    ).fetchall()
