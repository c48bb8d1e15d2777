from __future__ import annotations

from collections.abc import Iterator

import pytest

from syncd.testing import Throwaway, throwaway


@pytest.fixture(scope="session")
def running() -> Iterator[Throwaway]:
    """A PostgreSQL and a syncd, shared by every test here."""
    with throwaway() as both:
        yield both
