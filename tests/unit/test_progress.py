"""A background task that cannot reach the database: an error of the task, or a lost database."""

from __future__ import annotations

from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from syncd.errors import DatabaseError, DatabaseUnreachable
from syncd.sync.consumer.outcome import Handover
from syncd.sync.consumer.progress import Progress
from syncd.sync.registry.datasets import Registry

GONE = DatabaseUnreachable("the database cannot be reached")

pytestmark = pytest.mark.anyio


async def test_a_task_fails_if_the_next_pass_reaches_the_database_that_it_could_not(
    tmp_path: Path,
) -> None:
    progress = Progress(Registry(tmp_path))
    progress.connected, progress.passes_begun = True, 7
    progress.task_failed("rotator", GONE, 5.0)
    assert progress.wake.is_set
    progress.note_suspicions(7)  # this pass was under way and may have met the database earlier
    assert progress.registry.tasks.listed() == []
    progress.note_suspicions(8)
    assert [each.task for each in progress.registry.tasks.listed()] == ["rotator"]
    progress.note_suspicions(9)
    assert progress.registry.tasks.failures["rotator"] == 1


async def test_a_task_does_not_fail_if_the_consumer_loses_the_database_as_well(
    tmp_path: Path,
) -> None:
    progress = Progress(Registry(tmp_path))
    progress.connected = True
    progress.task_failed("rotator", GONE, 5.0)
    progress.lose(GONE, 0.1)
    progress.connected = False
    progress.task_failed("reporter", GONE, 5.0)
    progress.connected = True
    progress.note_suspicions(8)
    assert progress.registry.tasks.listed() == []


async def test_one_handover_waits_for_another(tmp_path: Path) -> None:
    progress = Progress(Registry(tmp_path))
    progress.connected = True
    first, second = (Handover(frozenset({n}), lambda *_: None) for n in (1, 2))
    done: list[int] = []

    async def hand_over(handover: Handover) -> None:
        await progress.hand_over(handover)
        done.extend(handover.wanted)

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(hand_over, first)
            while progress.handover is None:
                await anyio.lowlevel.checkpoint()
            tasks.start_soon(hand_over, second)
            for each in (first, second):
                while progress.handover is not each:
                    await anyio.lowlevel.checkpoint()
                progress.handed_over.set()  # as a pass does
                progress.finish_pass()
                while not set(each.wanted) <= set(done):
                    await anyio.lowlevel.checkpoint()
    assert done == [1, 2]


async def test_an_answer_of_the_database_is_an_error_of_the_task_at_once(tmp_path: Path) -> None:
    progress = Progress(Registry(tmp_path))
    progress.connected = True
    progress.task_failed("rotator", DatabaseError("permission denied"), 5.0)
    assert [each.task for each in progress.registry.tasks.listed()] == ["rotator"]
