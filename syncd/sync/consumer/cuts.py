"""Cuts: the indexes at one snapshot, kept for a while, so that all shards can answer at the same.

A leader has every shard hold: the shard takes no snapshot of its own. Then the leader takes one and
exports it, and each shard imports it for a pass. So no shard has passed the leader's snapshot. A
syncd alone keeps the views of a pass of its own.

Invariant: a kept view equals its table at the cut's snapshot. Nothing is kept, and no pass is put
off, while no client asks for cuts.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import anyio
import psycopg
from psycopg import sql

from syncd.errors import NotReady, TimedOut, UnknownDataset, shortened
from syncd.index.filter.language import Filter
from syncd.index.rows.vectors import Vectors
from syncd.index.view import View
from syncd.postgres.connection import first_line
from syncd.postgres.source import Source
from syncd.protocol.messages import SearchParams, WirePosition
from syncd.statements import filled
from syncd.sync.consumer.wake import Wake
from syncd.sync.registry.datasets import Dataset, Registry
from syncd.sync.source.followed import FollowedSource
from syncd.types import DatasetName, Key, KeyKind, Position, Snapshot, full_dataset_name

MOST_CUTS = 4
"""Number of cuts that are kept: a router asks for its newest one, and there may be several."""
KEPT_SECONDS = 10.0
"""Age at which a cut is given up.

Until then a view keeps alive what later passes replace: live bits, codes, and after a compaction or
a rebuild the whole previous index.
"""
HOLD_SECONDS = 2.0
"""Longest time without a pass for a leader that does not come back."""
AGAIN_HINT = "search again: another snapshot is taken"
FOREIGN = "is its SYNCD_DSN the same database as the router's? see: syncd cluster status"


class CutFailed(NotReady):
    """The indexes cannot be brought to the leader's snapshot."""

    next_step = AGAIN_HINT


@dataclass(frozen=True, slots=True)
class Imported:
    """A snapshot that a leader has exported.

    ``tables`` are oids of the tables that the leader locked before it took the snapshot. Sources in
    ``blocked``, by oid, could not be locked; they stay at their position.
    """

    name: str
    position: WirePosition
    tables: frozenset[int]
    blocked: Mapping[int, str] = field(default_factory=dict)

    def reachable(
        self, sources: Iterable[FollowedSource], position: Position
    ) -> list[FollowedSource]:
        """The sources that one pass can bring from ``position`` to the snapshot."""
        return [
            each
            for each in sources
            if each.source.oid not in self.blocked and not why_not(each, position)
        ]

    def take(self, connection: psycopg.Connection) -> None:
        """Import the snapshot into a transaction that has its locks; raises ``CutFailed``.

        The leader's transaction is open then, so its locks and these overlap.
        """
        try:
            connection.execute(filled("passes", "import_snapshot", snapshot=sql.Literal(self.name)))
        except psycopg.Error as error:
            if connection.closed:
                raise
            raise CutFailed(
                f"the leader's snapshot cannot be imported: {first_line(error)}", hint=FOREIGN
            ) from None

    def check(self, snapshot: Snapshot, before: Position) -> None:
        """Raise ``CutFailed`` if a pass from ``before`` may not use the imported ``snapshot``."""
        if str(snapshot) != self.position.snapshot:
            raise CutFailed(f"the snapshot {self.name} is not the leader's", hint=FOREIGN)
        if not snapshot.covers(before.snapshot):
            raise CutFailed("the shard has passed the leader's snapshot")


def why_not(each: FollowedSource, position: Position) -> str:
    """Why a source's indexes may differ from its table at ``position``; empty if they do not.

    A doubt counts, also of a source that is believed to be right and answers.
    """
    if each.failure is not None:
        return str(each.failure)
    if each.scanning or each.lags:
        return "it is being read"
    if each.is_believed or each.catalogue.doubt is not None:
        return "it is being compared with its table"
    return "" if each.cursor.position == position else "it is behind"


@dataclass(frozen=True, slots=True, eq=False)
class KeptDataset:
    """A dataset at a cut; it is searched like the dataset itself."""

    dataset: Dataset
    source: Source
    view: View
    position: WirePosition
    kept_at: float

    @property
    def name(self) -> DatasetName:
        """Its full name."""
        return self.dataset.name

    @property
    def key_kind(self) -> KeyKind:
        """Kind of its keys."""
        return self.source.key_kind

    @property
    def key_kinds(self) -> Sequence[KeyKind]:
        """Kinds of the columns of a composite key."""
        return self.source.key_kinds

    @property
    def age_seconds(self) -> float:
        """Seconds since the cut."""
        return time.monotonic() - self.kept_at

    def look(self) -> tuple[WirePosition, View]:
        """The cut's position, and the view at exactly this position."""
        return self.position, self.view

    def note_queries(
        self, params: SearchParams, queries: Vectors, wanted: Filter | None, own: Key | None
    ) -> None:
        """See ``Dataset.note_queries``."""
        self.dataset.note_queries(params, queries, wanted, own)


@dataclass(frozen=True, slots=True)
class Kept:
    """One cut. ``left_out`` are the sources that were not at its snapshot, with the reasons."""

    position: WirePosition
    at: float
    datasets: Mapping[DatasetName, tuple[Dataset, Source, View]]
    emptied: Mapping[DatasetName, FollowedSource]
    left_out: Mapping[int, str]


class Cuts:
    """The cuts of one consumer, and what its task must know of leaders and clients.

    Only ``keep`` is called in the pass's thread.
    """

    def __init__(self, registry: Registry, wake: Wake) -> None:
        self.registry = registry
        self.wake = wake
        self.kept: tuple[Kept, ...] = ()
        """The cuts, the newest one first; replaced as a whole."""
        self.own_wanted = 0
        """Number of requests that wait for a cut of this syncd alone."""
        self._waiting = 0
        """Number of leaders that wait until this shard holds."""
        self._held = False
        self._imported: Imported | None = None
        self._failure: BaseException | None = None
        self._changed = anyio.Event()
        """Set at each change of what leaders and the consumer's task wait for; then replaced."""
        self._done = anyio.Event()

    # The leader's requests

    @property
    def wanted(self) -> bool:
        """Whether a leader waits until no snapshot is taken here."""
        return self._waiting > 0

    async def hold(self, seconds: float) -> None:
        """Return when no snapshot is taken here any more; raises ``TimedOut``."""
        self._waiting += 1
        self.wake("request")
        try:
            with anyio.fail_after(seconds):
                while not self._held:
                    await self._changed.wait()
        except TimeoutError:
            raise TimedOut(
                f"the pass under way did not end within {seconds:g} s", hint=AGAIN_HINT
            ) from None
        finally:
            self._waiting -= 1

    async def take(self, imported: Imported | None) -> None:
        """Return when the indexes were brought to a snapshot; None ends the hold.

        Raises ``CutFailed``.
        """
        if not self._held:
            if imported is not None:
                raise CutFailed("the leader took too long: passes go on")
            return
        self._held, self._imported, done = False, imported, self._done
        self._change()
        if imported is not None:
            await done.wait()
            if self._failure is not None:
                raise self._failure

    # The consumer's task

    async def next_import(self) -> Imported | None:
        """Hold until a leader names a snapshot; None if it does not, or ends the hold."""
        self._held, self._imported, self._failure = True, None, None
        self._done = anyio.Event()
        self._change()
        with anyio.move_on_after(HOLD_SECONDS):
            while self._held:
                await self._changed.wait()
        self._held = False
        return self._imported

    def end_import(self, failure: BaseException | None = None) -> None:
        """Answer the leader: the pass has ended."""
        if failure is not None and not isinstance(failure, CutFailed):
            failure = CutFailed(f"the pass at the snapshot failed: {failure}")
        self._failure, self._imported = failure, None
        self._done.set()

    def keep(
        self,
        position: Position,
        sources: Iterable[FollowedSource],
        imported: Imported | None = None,
    ) -> None:
        """Keep the views of the sources that a pass has brought to ``position``."""
        shown = WirePosition.of(position) if imported is None else imported.position
        now = time.monotonic()
        datasets = dict[DatasetName, tuple[Dataset, Source, View]]()
        emptied, left_out = dict[DatasetName, FollowedSource](), dict[int, str]()
        for each in sources:
            why = why_not(each, position)
            if why:
                blocked = {} if imported is None else imported.blocked
                left_out[each.source.id] = blocked.get(each.source.oid, why)
                continue
            for name, dataset in each.datasets.items():
                if dataset.standing.answers:
                    datasets[name] = dataset, dataset.source, dataset.index.view
            emptied.update(dict.fromkeys(each.datasets.emptied.names, each))
        self.kept = (Kept(shown, now, datasets, emptied, left_out), *self.kept[: MOST_CUTS - 1])

    def expire(self) -> None:
        """Give up old cuts."""
        if self.kept:
            until = time.monotonic() - KEPT_SECONDS
            self.kept = tuple(each for each in self.kept if each.at >= until)

    # Searches

    def at(self, position: WirePosition) -> Kept:
        """The cut at a position; raises ``NotReady``."""
        for each in self.kept:
            if each.position.snapshot == position.snapshot:
                return each
        raise NotReady(
            f"the rows at the snapshot {shortened(position.snapshot)} are not kept any more: "
            f"the last {MOST_CUTS} cuts are, for {KEPT_SECONDS:.0f} s",
            hint='take another one: "at": "cut"',
        )

    def find(self, kept: Kept, name: str) -> KeptDataset:
        """A dataset at a cut; raises ``UnknownDataset`` or ``NotReady``."""
        full = full_dataset_name(name)
        found = kept.datasets.get(full)
        if found is not None:
            return KeptDataset(*found, kept.position, kept.at)
        follower = kept.emptied.get(full)
        if follower is not None:
            empty = follower.empty(full)
            return KeptDataset(empty, empty.source, empty.index.view, kept.position, kept.at)
        dataset = self.registry.known(name)
        reason = kept.left_out.get(dataset.source.id)
        if reason is None and dataset.standing.answers:
            raise UnknownDataset(full)  # it was formed later
        raise NotReady(
            f"dataset {full!r} was not in step with its table at the snapshot: "
            f"{reason or dataset.reason or dataset.state}",
            hint=AGAIN_HINT,
        )

    def newest(self, since: float) -> Kept | None:
        """The newest cut, if it was kept after ``since``."""
        return self.kept[0] if self.kept and self.kept[0].at >= since else None

    def _change(self) -> None:
        changed, self._changed = self._changed, anyio.Event()
        changed.set()
