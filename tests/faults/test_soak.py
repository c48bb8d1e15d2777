"""A minute of the soak; ``python -m tests.faults.soak`` runs half an hour."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.faults.soak import Soak

MINUTES = float(os.environ.get("SOAK_MINUTES", "1"))


@pytest.mark.timeout(MINUTES * 60 + 180)
def test_indexes_stay_in_sync_while_everything_is_killed(tmp_path: Path) -> None:
    soak = Soak(tmp_path, seed=2)
    try:
        soak.run(MINUTES * 60)
    finally:
        soak.close()
        print(dict(soak.counts))
    assert soak.counts["settles"] > MINUTES
    assert soak.counts["transactions"] > MINUTES * 50
