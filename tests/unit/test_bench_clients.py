"""Clients of a benchmark: together they keep few connections of an engine open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from syncd.bench import clients as module
from syncd.bench.engines import Connected


@dataclass(frozen=True, slots=True)
class Recorded:
    """An engine that writes into a file when it is opened and when it is closed."""

    journal: Path
    name: str
    setting: str

    @contextmanager
    def open(self) -> Iterator[Connected[Any]]:
        self.note("+")
        yield Connected(lambda _: b"", lambda _: None, lambda _: [1])
        self.note("-")

    def note(self, event: str) -> None:
        """Append one character, which no other process can divide."""
        with self.journal.open("a") as journal:
            journal.write(event)


def test_many_clients_with_many_settings_keep_few_connections_open(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    engines = [Recorded(journal, "recorded", str(setting)) for setting in range(4)]
    queries = np.zeros((4, 2), dtype=np.float32)
    with module.clients(2, queries, together=module.MOST_OPEN // 2) as searchers:
        for _ in range(2):
            for engine in engines:
                assert searchers.answers(engine) == ([0, 2, 1, 3], [[1]] * 4)
    is_open = np.cumsum([1 if event == "+" else -1 for event in journal.read_text()])
    assert is_open.max() == 2 * 2
    assert is_open[-1] == 2 * 2
