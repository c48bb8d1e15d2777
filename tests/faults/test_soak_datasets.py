"""A short soak of many datasets; ``python -m tests.faults.soak_datasets`` runs ten."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.soak_datasets import DatasetSoak

MINUTES = float(os.environ.get("SOAK_MINUTES", "0.7"))


@pytest.mark.timeout(MINUTES * 60 + 300)
def test_datasets_that_come_are_renamed_and_go_stay_in_step_and_give_their_memory_back(
    tmp_path: Path,
) -> None:
    soak = DatasetSoak(tmp_path, seed=2)
    try:
        soak.run(MINUTES * 60)
    finally:
        soak.close()
        print(dict(soak.counts))
    assert soak.counts["settles"] > MINUTES
    assert soak.counts["conversations"] > MINUTES * 200
