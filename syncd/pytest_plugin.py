"""Fixtures for the tests of a program that uses syncd. In ``conftest.py``: ``pytest_plugins = ["syncd.pytest_plugin"]``.

A program that has migrations overrides ``syncd_prepare`` there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from syncd.client.client import Client
from syncd.testing import Throwaway, throwaway


@pytest.fixture(scope="session")
def syncd_prepare() -> Callable[[str], None]:
    """What is done to the database before syncd starts; it gets the DSN. By default nothing."""

    def nothing(dsn: str) -> None:
        """The database has schema ``syncd``, and in it the table ``syncd.embeddings``."""

    return nothing


@pytest.fixture(scope="session")
def syncd_throwaway(syncd_prepare: Callable[[str], None]) -> Iterator[Throwaway]:
    """A PostgreSQL and a syncd of this run's own: ``dsn``, ``socket``, ``client()`` and ``catch_up()``."""
    with throwaway(syncd_prepare) as running:
        yield running


@pytest.fixture
def syncd_client(syncd_throwaway: Throwaway) -> Iterator[Client]:
    """A client of that syncd."""
    with syncd_throwaway.client() as client:
        yield client
