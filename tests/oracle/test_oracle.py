"""After any events in the tables, syncd and PostgreSQL, each index equals its table.

``ORACLE_PROFILE=long`` runs for about an hour with another seed each time. Every long run prints
its seed; ``ORACLE_SEED`` repeats it.
"""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.oracle.machine import Oracle
from tests.servers import PostgresServer

PROFILES = {"short": (20, 50), "long": (300, 100)}
"""Number of examples, and of rules per example."""

PROFILE = os.environ.get("ORACLE_PROFILE", "short")
EXAMPLES, STEPS = PROFILES[PROFILE]
TIMEOUT_SECONDS = 600 if PROFILE == "short" else 24 * 3600


@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_every_index_equals_its_table_after_any_sequence_of_writes_and_faults(
    own_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    counts: Counter[str] = Counter()

    class Machine(Oracle):
        server = own_server
        folder = tmp_path_factory.mktemp("oracle")

    Machine.counts = counts
    number = int(
        os.environ.get("ORACLE_SEED") or (1 if PROFILE == "short" else random.randrange(1 << 32))
    )
    print(f"ORACLE_SEED={number}")
    seed(number)(Machine)  # derandomize would choose other steps after each change of a rule's text
    try:
        run_state_machine_as_test(
            Machine,
            settings=settings(
                max_examples=EXAMPLES,
                stateful_step_count=STEPS,
                database=None,
                deadline=None,
                phases=[Phase.generate],  # shrinking would run everything hundreds of times
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        print(", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    for name in (
        "comparisons",
        "kills",
        "stops",
        "crashes",
        "cuts",
        "checkpoints",
        "truncates",
        "long_commits",
        "overtaken",
    ):
        assert counts[name] > 0, f"nothing of {name} in {counts}"
