"""The datasets of a service, while a pass in another thread forms and removes some."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from syncd.errors import NotReady
from syncd.postgres.outbox import Cursor
from syncd.postgres.source import Source
from syncd.sync.registry.datasets import Dataset, Registry
from syncd.sync.source.followed import FollowedSource
from syncd.types import DatasetName, Position, Snapshot


def test_datasets_that_a_pass_forms_and_removes_do_not_end_a_look_at_all_of_them(
    tmp_path: Path,
) -> None:
    registry = Registry(tmp_path)
    for number in range(10):
        registry.publish(cast("Dataset", SimpleNamespace(name=DatasetName(f"default/{number}"))))
    seen = []
    for dataset in registry.listed():
        registry.publish(cast("Dataset", SimpleNamespace(name=DatasetName(f"{dataset.name}-new"))))
        registry.remove(dataset)
        seen.append(dataset.name)
    assert seen == [f"default/{number}" for number in range(10)]
    assert [each.name for each in registry.listed()] == [
        f"default/{number}-new" for number in range(10)
    ]


def test_a_dataset_does_not_answer_between_its_name_and_its_first_rows(tmp_path: Path) -> None:
    """A pass forms it in another thread; until its rows are applied, an answer would be empty."""
    registry = Registry(tmp_path)
    registry.pending = {}
    source = Source(
        id=1, oid=16384, schema="public", table="chats", key=["id"], key_types=["bigint"],
        vector="v", vector_type="real[]", dimension=None, project="('default'::text)",
        dataset="(chat)", live="(true)", metric="l2", columns=[], column_kinds=[],
        arguments_md5="", send="pg_catalog.array_send",
    )  # fmt: skip
    followed = FollowedSource(source, registry, Cursor(Position(Snapshot(3, 3, frozenset()), 0)))
    followed.caught_up()
    name = DatasetName("default/new")
    assert followed.dataset(name) is not None
    with pytest.raises(NotReady):
        registry.find(name)
    followed.caught_up()
    assert registry.find(name).state == "ready"
