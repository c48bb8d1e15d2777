"""A reader's report fits in one line of the link, whatever is searched for."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from syncd.protocol.messages import SearchParams
from syncd.readers import answering
from syncd.readers.answering import Answering
from syncd.rpc.dispatch import Limits
from syncd.rpc.inputs import Inputs
from syncd.shard import WHOLE
from syncd.types import full_dataset_name
from tests.unit.index.rows import random_vectors


class Nothing:
    """A shelf without datasets, and a busy mark that nobody reads."""

    def find(self, name: str) -> Any:
        raise AssertionError(name)


def reader() -> Answering:
    nothing: Any = Nothing()
    inputs: Any = Inputs.__new__(Inputs)
    return Answering(lambda _: nothing, nothing, inputs, 0.95, WHOLE)


def line(one: Answering) -> int:
    return len(msgspec.json.encode(one.report(1)))


def asked(wanted: Any = None) -> SearchParams:
    return SearchParams(dataset="default/d", vector=[0.0], k=3, filter=wanted)


def test_queries_of_many_dimensions_and_datasets_fit_in_a_report() -> None:
    one = reader()
    for number in range(8):
        one.note_queries(
            full_dataset_name(f"d{number}"), asked(), random_vectors(600, 4000, seed=number)
        )
    assert answering.REPORT_BYTES < line(one) < Limits().line_bytes
    one.note_queries(full_dataset_name("d"), asked(), random_vectors(300, 8, seed=1))
    report = one.report(1)
    assert len(report.queries) == 300
    assert np.frombuffer(report.queries[0].vector, dtype="<f4").size == 8


def test_a_query_whose_filter_is_not_kept_is_not_reported() -> None:
    one = reader()
    large = {"note": {"in": ["x" * 100] * 400}}
    for _ in range(512):
        one.note_queries(full_dataset_name("d"), asked(large), random_vectors(1, 8, seed=1))
    assert one.report(1).queries == []
    one.note_queries(full_dataset_name("d"), asked({"note": "x"}), random_vectors(1, 8, seed=1))
    (query,) = one.report(1).queries
    assert msgspec.json.decode(query.filter) == {"note": "x"}
