"""A reader's datasets: the main process is asked about few names; codes are loaded in a thread."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from anyio import to_thread

from syncd.index.storage.arena import Arena, ArenaView
from syncd.readers.process import Loader
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


@pytest.mark.anyio
@pytest.mark.parametrize("in_thread", [True, False])
async def test_codes_are_loaded_whichever_thread_asks_for_them(in_thread: bool) -> None:
    class Index:
        loaded = False

        def load(self) -> None:
            self.loaded = True

    index: Any = Index()
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            loader = Loader(tasks)
            if in_thread:
                await to_thread.run_sync(loader.load_soon, index)
            else:
                loader.load_soon(index)
            while not index.loaded:
                await anyio.lowlevel.checkpoint()
