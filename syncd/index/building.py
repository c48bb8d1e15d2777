"""Builds for one index: codes for its rows, codes before they are all there, and compactions.

A build runs in any one thread, alongside the writer, readers and saves. Invariant: it reads one
view, and its result takes the place of the present codes or rows only if those are still the ones
that it was built from.
"""

from __future__ import annotations

from collections.abc import Sequence

from syncd.index.asked import AskedQueries, Sample
from syncd.index.build.ahead import Ahead
from syncd.index.build.plan import Plan, build, plan_ahead, plan_build, wants_codes
from syncd.index.build.reached import Measured, measure_reached
from syncd.index.codes.codes import Codes
from syncd.index.generation.compaction import Move
from syncd.index.generation.saving import State
from syncd.index.search.exact import use_one_thread
from syncd.index.search.plan import point_for
from syncd.index.shared.present import PresentIndex
from syncd.index.storage.bitmap import Bitmap
from syncd.index.storage.stopping import Stop
from syncd.index.view import View
from syncd.types import IndexKind, RecallOf


class BuiltIndex(PresentIndex):
    """The part of ``DatasetIndex`` that builds, and says what its codes reach."""

    def __init__(self, state: State, name: str, chunk_bytes: int) -> None:
        super().__init__(state, name, chunk_bytes)
        self._seen: Bitmap | None = None
        """Rows that a sweep has seen, one bit a slot; a compaction moves them as well."""
        self._ahead: Ahead | None = None
        self.asked = AskedQueries()
        """A sample of the queries that were asked since there are codes."""

    def plan_build(self, recall: float = 0.95, *, for_queries: bool = True) -> Plan | None:
        """See ``syncd.index.build.plan.plan_build``.

        Without ``for_queries`` other queries are no reason to measure recall.
        """
        return plan_build(self.view, recall, self.asked if for_queries else None)

    def plan_ahead(self, expected: int) -> Plan | None:
        """The rows to encode now, while the index gets about ``expected`` rows; None if few."""
        return plan_ahead(self.view, self._ahead, expected)

    def build(self, plan: Plan, stop: Stop = lambda: False) -> bool:
        """Build ``plan`` from the present view, and use it; returns whether it could still be used.

        It may take minutes. Raises ``Cancelled`` soon after ``stop()`` is true;
        ``DataDirectoryError`` and ``DamagedFile`` if rows cannot be moved.
        """
        if plan.kind == "compact":
            return self._compact(stop)
        state, exporter = self._state, self._exporter
        ahead, self._ahead = self._ahead, None
        if not state.view.live.count and plan.kind in ("train", "measure", "ahead"):
            return False  # the dataset was emptied after the plan was made
        if plan.kind == "ahead":
            self._ahead = self._encoded_ahead(state, ahead, plan, stop)
            return True
        if ahead is not None and not ahead.is_usable(state.view, state.generation.number):
            ahead = None
        sample = self.sampled(state.view) if plan.kind in ("train", "measure") else None
        codes = build(
            state.view, plan, state.generation.number, self._next_code_number, stop, sample, ahead
        )
        self._write_codes(exporter, codes, state.generation)
        used = self.swap_codes(state.codes, codes)
        self._share_codes(exporter)
        self._remove_old_codes(state.generation)
        if used and sample is not None:
            self.asked.measured(sample)
        return used

    def _encoded_ahead(self, state: State, ahead: Ahead | None, plan: Plan, stop: Stop) -> Ahead:
        """``ahead`` with the rows of ``plan``; begun again if it is of rows that are gone."""
        use_one_thread()
        generation, view = state.generation.number, state.view
        if ahead is None or ahead.generation != generation or ahead.encoder.stop > view.count:
            return Ahead.begun(view, generation, self._next_code_number(), plan.rows, stop)
        ahead.encoder.encode(view, view.count & ~7, stop)
        return ahead

    def sampled(self, view: View) -> Sample | None:
        """Queries that were asked, if they are enough and of the view's dimension."""
        sample = self.asked.sample(view.count)
        return None if sample is None or sample.queries.shape[1] != view.dim else sample

    def _compact(self, stop: Stop) -> bool:
        source, exporter = self._state, self._exporter
        # Without this check, unnoticed damage would be copied into files with new checksums.
        source.generation.scrub(stop)
        target = self._new_generation(source.view.dim).generation
        move, moved = Move(source.view, target), False
        try:
            move.follow(source.view, stop)
            before = source.codes
            codes = None
            if before is not None:
                codes = move.encoded(before, self._next_code_number(), stop)
                self._write_codes(exporter, codes, target)
            move.catch_up(source.generation, lambda: self._state, stop)
            moved = self._move_in(source, move, codes)
        finally:
            if not moved:
                target.discard()
        self._share_codes(exporter)
        return moved

    def _move_in(self, source: State, move: Move, codes: Codes | None) -> bool:
        """The last round: put the new generation in the place of the old one.

        Returns False if the dataset was emptied meanwhile.
        """
        with self._write_lock:
            state = self._state
            if state.generation is not source.generation:
                return False
            move.follow(state.view, lambda: False)
            if self._seen is not None:
                self._seen = move.seen(self._seen)
            with self._publish_lock:
                self._show(State(move.target, move.view()).with_codes(codes))
        return True

    # What searches reach.

    def kind(self, recall: float = 0.95) -> IndexKind | None:
        """How searches with this recall are answered; None before the first row.

        ``building`` answers exactly until the codes are built.
        """
        view = self.view
        if view.dim is None:
            return None
        if view.codes is None:
            return "building" if wants_codes(view) else "exact"
        return "exact" if point_for(view, 10, recall) is None else "codes"

    def recall(self, target: float = 0.95) -> float:
        """The measured recall@10 of searches that want ``target``."""
        point = point_for(self.view, 10, target)
        return 1.0 if point is None else point.recall

    def recall_p5(self, target: float = 0.95) -> float | None:
        """The 5th percentile of that recall; None if an earlier version measured it."""
        point = point_for(self.view, 10, target)
        return 1.0 if point is None else point.p5

    @property
    def recall_of(self) -> RecallOf | None:
        """Queries on which the codes were measured; None without codes: searches are exact."""
        codes = self.view.codes
        return None if codes is None else codes.codes.calibration.of

    def measure_reached(
        self, k: int, targets: Sequence[float], stop: Stop = lambda: False
    ) -> Measured:
        """Recall@k that searches reach now: over the queries that were asked, if they are enough,
        else over rows. It may take seconds, in any thread. Raises ``Cancelled``.
        """
        view = self.view
        return measure_reached(view, self._name, self.sampled(view), k, targets, stop)

    @property
    def queries_changed(self) -> bool:
        """Whether recall is to be measured because other queries are asked than before."""
        view = self.view
        return view.codes is not None and self.asked.is_due(
            view.dim or 0, view.codes.codes.calibration.of
        )
