"""A reader asks the main process which datasets are shared."""

from __future__ import annotations

import pytest

from syncd.index.storage.arena import Arena, ArenaView
from syncd.readers.shelf import MOST_QUESTIONS, NotHere, Shelf
from syncd.types import DatasetName


def nothing(*_: object) -> None:
    """No codes are loaded, and no queries noted."""


def test_names_that_clients_invent_are_not_all_asked_about() -> None:
    asked: list[DatasetName] = []
    shelf = Shelf(
        ArenaView(Arena(list).descriptor), ask=asked.append, load=nothing, note_queries=nothing
    )
    for number in range(3 * MOST_QUESTIONS):
        with pytest.raises(NotHere):
            shelf.find(f"invented {number}")
    assert len(asked) == MOST_QUESTIONS
    for name in asked[:2]:
        shelf.answered(name, None)
    for number in range(3 * MOST_QUESTIONS):
        with pytest.raises(NotHere):
            shelf.find(f"another {number}")
    assert len(asked) == MOST_QUESTIONS + 2
