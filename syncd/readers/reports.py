"""What readers report to the main process: counts of searches, and a sample of their queries."""

from __future__ import annotations

import contextlib

import anyio
import msgspec
import numpy as np

from syncd.errors import RequestError
from syncd.index.filter.language import parse_filter
from syncd.protocol.wire import key_from_wire
from syncd.readers.answering import AskedQuery, ReportParams
from syncd.readers.process import Order
from syncd.readers.seats import Seats
from syncd.sync.registry.counters import OTHER, Searches
from syncd.sync.registry.datasets import Dataset, Registry

COLLECT_SECONDS = 0.5
"""How long a scrape waits for the counts of the readers."""


class Reports:
    """The reports of all readers, added to the counts of this process."""

    def __init__(self, registry: Registry, seats: Seats) -> None:
        self.registry = registry
        self.seats = seats
        self.ordered = 0
        self.came = anyio.Event()

    def note(self, params: ReportParams) -> bool:
        """Add a reader's counts and queries to those of this process."""
        counters, datasets = self.registry.counters, self.registry.by_name
        for name, counted in params.searches.items():
            searches = Searches()
            searches.seconds.counts, searches.seconds.sum = counted.counts, counted.seconds
            searches.outcomes.update(counted.outcomes)
            counters.searches_of(name if name in datasets else OTHER).add(searches)
        for asked in params.queries:
            dataset = datasets.get(asked.dataset)
            if dataset is not None:
                note_query(dataset, asked)
        reader = self.seats.processes.get(params.seat)
        if reader is not None and params.answers:
            reader.reported = params.answers
            came, self.came = self.came, anyio.Event()
            came.set()
        return True

    async def collect(self) -> None:
        """Return when every reader has reported, or after ``COLLECT_SECONDS``."""
        self.ordered += 1
        number = self.ordered
        readers = self.seats.processes
        self.seats.order(Order("report", number))
        with anyio.move_on_after(COLLECT_SECONDS):
            while any(each.is_ready and each.reported < number for each in readers.values()):
                await self.came.wait()


def note_query(dataset: Dataset, asked: AskedQuery) -> None:
    """Sample a query that a reader answered, unless the dataset has changed its columns."""
    with contextlib.suppress(RequestError):
        view = dataset.index.view
        wanted = parse_filter(msgspec.json.decode(asked.filter) or {}, view.columns, dataset.name)
        key = msgspec.json.decode(asked.key)
        own = None if key is None else key_from_wire(dataset.key_kind, key, dataset.key_kinds)
        query = np.frombuffer(asked.vector, dtype="<f4")[None]
        dataset.index.asked.note(query, wanted, own)
