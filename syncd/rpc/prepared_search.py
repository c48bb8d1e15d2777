"""One search request: checked on arrival, run in any thread, answered in the protocol's form."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec import UNSET, UnsetType
from numpy.typing import NDArray

from syncd.errors import (
    DimensionMismatch,
    InvalidParams,
    RequestError,
    TimedOut,
    UnknownKey,
    shortened,
)
from syncd.index.filter.language import Path, find_path, listed, parse_filter
from syncd.index.search.plan import SearchPlan, exact_elements, plan_search
from syncd.index.search.plan import SearchResult as Found
from syncd.index.view import View
from syncd.protocol import messages
from syncd.protocol.messages import WirePosition
from syncd.protocol.wire import key_from_wire, keys_to_wire, vector_from_wire
from syncd.rpc.searched import Searched
from syncd.shard import WHOLE, Shard
from syncd.types import Key

ELEMENTS_BEFORE = 1_000_000
"""Cost of a filter, in elements, above which a worker thread evaluates it.

How many rows it selects is not known before.
"""
ELEMENTS_AT_ONCE = 50_000_000
"""Cost, in elements, of the queries of one FAISS call: a few hundredths of a second.

Between two calls the request's time limit is checked.
"""


class PreparedSearch:
    """A search whose parameters have been checked, on one view of one dataset.

    ``recall`` is the default for a request that names no recall.
    """

    def __init__(
        self,
        params: messages.SearchParams,
        dataset: Searched,
        *,
        lag_seconds: float,
        recall: float,
        shard: Shard = WHOLE,
    ) -> None:
        self.params = params
        self.deadline = time.monotonic() + params.timeout_ms / 1000
        self.dataset = dataset
        self.kind = dataset.key_kind
        self.lag_seconds = lag_seconds
        self.shard = shard
        self.recall = 1.0 if params.exact else params.recall or recall
        self.position: WirePosition
        self.view: View
        self.position, self.view = dataset.look()
        self.filter = (
            None
            if params.filter is None
            else parse_filter(params.filter, self.view.columns, self.dataset.name)
        )
        self.included = {name: self.read_path(name) for name in params.include or ()}
        self.exclude: Key | None = None
        self.queries = self.read_queries()
        self._cost: int | None = None
        self._plan: SearchPlan | None = None

    # One thread at a time uses a search, so ``cost`` and ``plan`` need no lock. cached_property has
    # one for all searches in Python 3.11: with it the loop waits for a worker that plans.

    @property
    def cost(self) -> int:
        """Expected cost of filter and search together, in elements: see ``SearchPlan.cost``."""
        if self._cost is None:
            self._cost = self._expected_cost()
        return self._cost

    @property
    def plan(self) -> SearchPlan:
        """The plan to search the rows that the filter selects; made at the first use."""
        if self._plan is None:
            params = self.params
            self._plan = plan_search(
                self.view.where(self.filter),
                self.dataset.name,
                params.k,
                self.recall,
                exclude=self.exclude,
                max_distance=params.max_distance,
            )
        return self._plan

    def _expected_cost(self) -> int:
        view, filter_cost = self.view, 0
        if self.filter is not None and view.attributes is not None:
            filter_cost = view.attributes.cost(view.count, self.filter)
            if filter_cost > ELEMENTS_BEFORE:
                return filter_cost + len(self.queries) * exact_elements(view)
        return filter_cost + len(self.queries) * self.plan.cost

    @property
    def query_count(self) -> int:
        """Number of queries."""
        return len(self.queries)

    @property
    def together_with(self) -> object:
        """Searches with an equal value may run in one call; None: this search runs alone.

        It is None for a filter, and for "more like this row", which leaves out its own row.
        """
        if self.exclude is not None or self.filter is not None:
            return None
        return (
            id(self.dataset),
            self.queries.shape[1],
            self.params.k,
            self.recall,
            self.params.max_distance,
        )

    def look_at(self, position: WirePosition, plan: SearchPlan) -> None:
        """Take the plan of a newer view than at the request's arrival.

        Only for a search without a filter.
        """
        self.position, self.view, self._plan = position, plan.view, plan

    def read_path(self, name: str) -> Path:
        """The path of a column to include; raises ``InvalidParams``."""
        path = find_path(name, self.view.columns)
        if path is None:
            raise InvalidParams(
                f"dataset {self.dataset.name!r} has no column {shortened(name)!r} to include",
                hint=f"columns: {listed(self.view.columns)}; attach the table again with other "
                "columns => for others",
            )
        return path

    def read_queries(self) -> NDArray[np.float32]:
        """The query vectors, (q, dim) float32."""
        params = self.params
        if params.vector is not None:
            return vector_from_wire(params.vector)[None, :]
        if params.vectors is not None:
            queries = [vector_from_wire(vector) for vector in params.vectors]
            for query in queries:
                if len(query) != len(queries[0]):  # one of them has not the dataset's dimension
                    raise DimensionMismatch(
                        self.dataset.name, expected=self.view.dim or len(queries[0]), got=len(query)
                    )
            if not queries:
                return np.empty((0, self.view.dim or 0), dtype=np.float32)
            return np.stack(queries)
        assert params.key is not None
        self.exclude = key_from_wire(self.kind, params.key, self.dataset.key_kinds)
        vector = self.view.vector_of(self.exclude)
        if vector is None:
            raise UnknownKey(self.dataset.name, params.key)
        return vector[None, :]

    def run(self) -> messages.SearchResult:
        """Search; safe in any thread."""
        return self.result(self.search_in_time(self.queries))

    def result(self, found: Sequence[Found]) -> messages.SearchResult:
        """The answer, from one result per query."""
        params = self.params
        # An exact search tells nothing of the codes.
        if self.view.codes is not None and self.recall < 1.0:
            self.dataset.note_queries(params, self.queries, self.filter, self.exclude)
        keys: list[Any] = [keys_to_wire(self.kind, one.keys) for one in found]
        distances: list[Any] = [one.distances.tolist() for one in found]
        columns: dict[str, list[Any]] | UnsetType = UNSET
        if self.included:
            columns = self.columns_of(found)
        if params.vectors is None:
            keys, distances = keys[0], distances[0]
        return messages.SearchResult(
            keys,
            distances,
            self.position,
            self.lag_seconds,
            columns,
            {self.shard.name: self.position},
            self.shard.share,
        )

    def columns_of(self, found: Sequence[Found]) -> dict[str, list[Any]]:
        """The values of the included columns, in the order of the keys."""
        attributes, paths = self.view.attributes, list(self.included.values())
        assert attributes is not None
        each = [attributes.values(paths, self.view.find(one.keys)) for one in found]
        if self.params.vectors is None:
            return dict(zip(self.included, each[0], strict=True))
        return {
            name: [values[place] for values in each] for place, name in enumerate(self.included)
        }

    def search_in_time(self, queries: NDArray[np.float32]) -> list[Found]:
        """One result per query, (q, dim) float32, with the request's other parameters.

        A FAISS call cannot be stopped, so only some of the queries are in one call. Raises
        ``TimedOut`` between two calls.
        """
        plan, found = self.plan, list[Found]()
        at_once = max(ELEMENTS_AT_ONCE // max(plan.cost, 1), 1)
        for start in range(0, max(len(queries), 1), at_once):
            if start and time.monotonic() > self.deadline:
                raise TimedOut(
                    f"{start} of {len(queries)} vectors were searched in {self.params.timeout_ms} "
                    "ms",
                    hint="send fewer at once, or allow more with timeout_ms",
                )
            found += plan.run(queries[start : start + at_once])
        return found


def search_together(searches: Sequence[PreparedSearch]) -> list[messages.SearchResult | Exception]:
    """The answers to searches that differ only in their queries.

    They come from one call; if that raises, from one call per search.
    """
    answers: list[messages.SearchResult | Exception] = []
    if len(searches) > 1:
        dataset = searches[0].dataset
        position, view = dataset.look()
        first = searches[0].params
        plan = plan_search(
            view,
            dataset.name,
            first.k,
            searches[0].recall,
            max_distance=first.max_distance,
        )
        for each in searches:
            each.look_at(position, plan)
        with contextlib.suppress(RequestError):  # one query is bad: one call per search
            found = iter(
                searches[0].search_in_time(np.concatenate([each.queries for each in searches]))
            )
            return [
                each.result(list(itertools.islice(found, each.query_count))) for each in searches
            ]
    for each in searches:
        try:
            answers.append(each.run())
        except Exception as error:  # noqa: BLE001 - the request's own task raises it
            answers.append(error)
    return answers
