"""Fixtures for the tests of a program that uses syncd.

To use them, write ``pytest_plugins = ["syncd.pytest_plugin"]`` in ``conftest.py``. A program that
has migrations overrides ``syncd_prepare`` there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from syncd.client.client import Client
from syncd.testing import Throwaway, throwaway


@pytest.fixture(scope="session")
def syncd_prepare() -> Callable[[str], None]:
    """A function that prepares the database before syncd starts; it gets the DSN."""

    def nothing(dsn: str) -> None:
        """Leave the database as it is: it has schema ``syncd`` with table ``syncd.embeddings``."""

    return nothing


@pytest.fixture(scope="session")
def syncd_throwaway(syncd_prepare: Callable[[str], None]) -> Iterator[Throwaway]:
    """The PostgreSQL and syncd of this run: ``dsn``, ``socket``, ``client()``, ``catch_up()``."""
    with throwaway(syncd_prepare) as running:
        yield running


@pytest.fixture
def syncd_client(syncd_throwaway: Throwaway) -> Iterator[Client]:
    """A client of this run's syncd."""
    with syncd_throwaway.client() as client:
        yield client
