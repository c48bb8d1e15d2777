"""The datasets of a service, while a pass in another thread forms and removes some."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

from syncd.sync.registry.datasets import Dataset, Registry
from syncd.types import DatasetName


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
