"""The cost of syncd for writers: single-row inserts per second into three tables, interleaved.

One table is bare, one is attached, one has an HNSW index.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from syncd.bench.environment import Environment, Serving, serving
from syncd.errors import SyncdError
from syncd.statements import filled

RUNS = {"bare": "bare", "attached": "attached", "captured": "attached", "hnsw": "hnsw"}
"""The table that each run writes.

For ``captured`` syncd is paused. Only the triggers' cost is left, as on a machine on which syncd
has cores of its own.
"""
CAUGHT_UP_MS = 600_000


@dataclass(frozen=True, slots=True)
class Ingest:
    """Median inserts per second over the rounds."""

    clients: int
    bare: float
    attached: float
    captured: float
    hnsw: float | None
    attached_to_bare: float
    captured_to_bare: float
    attached_to_hnsw: float | None


def measure(
    where: Environment, *, dimension: int, clients: list[int], seconds: int, rounds: int
) -> list[Ingest]:
    """Measure every run in turn, in each round, while syncd follows the attached table.

    Each run begins when syncd has nothing left to do.
    """
    runs = [run for run in RUNS if run != "hnsw" or where.vector_type == "vector"]
    where.create_tables(*dict.fromkeys(RUNS[run] for run in runs), dimension=dimension)
    if "hnsw" in runs:
        where.run("create_hnsw", table="hnsw", operators="vector_cosine_ops")
    where.run("insert_sample", table="attached")
    where.run("attach", ["syncd_bench.attached", "cosine"])
    with serving(where) as service:
        return [
            measure_clients(where, service, runs, number, seconds, rounds) for number in clients
        ]


def measure_clients(
    where: Environment,
    service: Serving,
    runs: Sequence[str],
    clients: int,
    seconds: int,
    rounds: int,
) -> Ingest:
    """Measure the rounds of one number of writers."""
    rates: dict[str, list[float]] = {run: [] for run in runs}
    for _ in range(rounds):
        for run in runs:
            service.settle()
            with service.paused() if run == "captured" else nullcontext():
                rates[run].append(run_pgbench(where, RUNS[run], clients, seconds))
            with service.client() as client:
                client.wait(str(where.value("token")), timeout_ms=CAUGHT_UP_MS)
    rate = {run: statistics.median(found) for run, found in rates.items()}

    def share(run: str) -> float:
        """Median ratio to the bare table's rate in the same round: the machine's speed drifts."""
        ratios = [a / b for a, b in zip(rates[run], rates["bare"], strict=True)]
        return round(statistics.median(ratios), 3)

    return Ingest(
        clients,
        round(rate["bare"]),
        round(rate["attached"]),
        round(rate["captured"]),
        round(rate["hnsw"]) if "hnsw" in rate else None,
        share("attached"),
        share("captured"),
        round(rate["attached"] / rate["hnsw"], 1) if "hnsw" in rate else None,
    )


def run_pgbench(where: Environment, table: str, clients: int, seconds: int) -> float:
    """Transactions per second of one pgbench run."""
    script = where.directory / f"{table}.sql"
    query = filled("bench", "insert_sample", table=sql.Identifier(table))
    script.write_text(query.as_string(where.connection) + ";\n", encoding="utf-8")
    command = [
        find_pgbench(),
        "--no-vacuum",
        "--protocol=prepared",
        f"--client={clients}",
        f"--jobs={min(clients, 2)}",
        f"--time={seconds}",
        f"--file={script}",
    ]
    done = subprocess.run(  # noqa: S603 - a program of the PostgreSQL installation
        command,
        env=os.environ | libpq_variables(where.conninfo),
        capture_output=True,
        text=True,
        check=False,
    )
    rate = re.search(r"^tps = ([0-9.]+)", done.stdout, re.MULTILINE)
    if done.returncode != 0 or rate is None:
        raise SyncdError(
            f"pgbench failed: {done.stderr.strip()[-1000:]}",
            hint="run pgbench alone to see the reason",
        )
    return float(rate[1])


def find_pgbench() -> str:
    """Path of the embedded PostgreSQL's pgbench, else of the one on the PATH."""
    from syncd.postgres.embedded.embedded import EmbeddedUnavailable, binaries

    try:
        return str(binaries() / "pgbench")
    except EmbeddedUnavailable:
        found = shutil.which("pgbench")
        if found is None:
            raise SyncdError(
                "pgbench is not installed", hint='pip install "syncd[embedded]"'
            ) from None
        return str(Path(found))


def libpq_variables(conninfo: str) -> dict[str, str]:
    """libpq's environment variables for a connection string, which pgbench reads.

    Its transactions are not read-only, even if this is the role's default.
    """
    names = {
        "host": "PGHOST",
        "port": "PGPORT",
        "user": "PGUSER",
        "password": "PGPASSWORD",
        "dbname": "PGDATABASE",
    }
    options = f"{os.environ.get('PGOPTIONS', '')} -c default_transaction_read_only=off".strip()
    known = {
        names[name]: str(value)
        for name, value in conninfo_to_dict(conninfo).items()
        if name in names
    }
    return known | {"PGOPTIONS": options}
