"""Cuts that one syncd keeps: how many, how long, and what a leader that is late gets."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from syncd.errors import NotReady, TimedOut
from syncd.protocol.messages import WirePosition
from syncd.sync.consumer import cuts as module
from syncd.sync.consumer.cuts import MOST_CUTS, CutFailed, Cuts, Imported
from syncd.sync.consumer.wake import Wake
from syncd.sync.registry.datasets import Registry
from syncd.types import Position, Snapshot

pytestmark = pytest.mark.anyio
SECONDS = 60.0


def imported(number: int) -> Imported:
    return Imported(f"name-{number}", WirePosition(f"{number}:{number}:", number), frozenset())


@pytest.fixture
def cuts(tmp_path: Path) -> Cuts:
    return Cuts(Registry(tmp_path), Wake())


def keep(cuts: Cuts, number: int) -> WirePosition:
    cuts.keep(Position(Snapshot(number, number, frozenset()), number), [])
    return WirePosition(f"{number}:{number}:", number)


async def test_the_last_few_are_kept_for_a_while(
    cuts: Cuts, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cuts.newest(0) is None
    positions = [keep(cuts, number) for number in range(1, MOST_CUTS + 3)]
    assert [each.position for each in cuts.kept] == positions[:1:-1]
    assert cuts.at(positions[-1]).position == positions[-1]
    with pytest.raises(NotReady, match="are not kept any more"):
        cuts.at(positions[0])
    cuts.expire()
    assert len(cuts.kept) == MOST_CUTS
    monkeypatch.setattr(module, "KEPT_SECONDS", -1.0)
    cuts.expire()
    assert cuts.kept == ()


async def test_a_leader_holds_the_consumer_until_it_names_a_snapshot(
    cuts: Cuts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HOLD_SECONDS", SECONDS)
    found: list[Imported | None] = []

    async def consume() -> None:
        while len(found) < 2:
            while not cuts.wanted:
                await cuts.wake.event.wait()
                cuts.wake.clear()
            found.append(await cuts.next_import())
            cuts.end_import(CutFailed("no") if len(found) == 2 else None)

    with anyio.fail_after(SECONDS):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(consume)
            for _ in range(2):
                await cuts.hold(SECONDS)
                assert not cuts.wanted
                if not found:
                    await cuts.take(imported(1))
                else:
                    with pytest.raises(CutFailed, match="no"):
                        await cuts.take(imported(2))
    assert found == [imported(1), imported(2)]


async def test_a_leader_that_is_late_or_gone_holds_nothing(
    cuts: Cuts, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CutFailed, match="took too long"):
        await cuts.take(imported(1))
    await cuts.take(None)
    with pytest.raises(TimedOut, match="did not end"):
        await cuts.hold(0.0)
    assert not cuts.wanted
    monkeypatch.setattr(module, "HOLD_SECONDS", 0.0)
    assert await cuts.next_import() is None
    with pytest.raises(CutFailed, match="took too long"):
        await cuts.take(imported(1))
