"""After any events in the tables, syncd and PostgreSQL, each index equals its table.

``ORACLE_PROFILE=long`` runs for about an hour with another seed each time. Every long run prints
its seed; ``ORACLE_SEED`` repeats it.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.oracle.machine import Oracle
from tests.oracle.sharded import ShardedOracle
from tests.servers import PostgresServer

PROFILES = {"short": ((20, 50), (2, 40)), "long": ((300, 100), (60, 60))}
"""Number of examples, and of rules per example: of one syncd, and of a cluster."""

PROFILE = os.environ.get("ORACLE_PROFILE", "short")
ALONE, SHARDED = PROFILES[PROFILE]
TIMEOUT_SECONDS = 600 if PROFILE == "short" else 24 * 3600
EVENTS = (
    "comparisons",
    "kills",
    "stops",
    "crashes",
    "cuts",
    "checkpoints",
    "truncates",
    "long_commits",
    "overtaken",
)
"""What must have happened with one syncd."""
SHARDED_EVENTS = ("comparisons", "kills", "reshards")
"""What must have happened with a cluster: each example has few rules."""


def explore(machine: type[Oracle], profile: tuple[int, int], events: Sequence[str]) -> None:
    """Run examples of a machine; each of ``events`` must have happened."""
    examples, steps = profile
    machine.counts = Counter()
    number = int(
        os.environ.get("ORACLE_SEED") or (1 if PROFILE == "short" else random.randrange(1 << 32))
    )
    print(f"ORACLE_SEED={number}")
    seed(number)(machine)  # derandomize would choose other steps after each change of a rule's text
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                database=None,
                deadline=None,
                phases=[Phase.generate],  # shrinking would run everything hundreds of times
                suppress_health_check=list(HealthCheck),
            ),
        )
    finally:
        print(", ".join(f"{name} {count}" for name, count in sorted(machine.counts.items())))
    for name in events:
        assert machine.counts[name] > 0, f"nothing of {name} in {machine.counts}"


@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_every_index_equals_its_table_after_any_sequence_of_writes_and_faults(
    own_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    class Machine(Oracle):
        server = own_server
        folder = tmp_path_factory.mktemp("oracle")

    explore(Machine, ALONE, EVENTS)


@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_the_shards_of_a_cluster_have_every_row_once_after_any_sequence_of_these_and_reshards(
    own_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    class Machine(ShardedOracle):
        server = own_server
        folder = tmp_path_factory.mktemp("sharded")

    explore(Machine, SHARDED, SHARDED_EVENTS)
