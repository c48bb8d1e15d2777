"""What syncd costs writers: single-row inserts a second into a bare table, an attached one, and one with an HNSW index, interleaved."""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path

from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from syncd.bench.environment import Environment, serving
from syncd.errors import SyncdError
from syncd.statements import statement

TABLES = ("bare", "attached", "hnsw")


@dataclass(frozen=True, slots=True)
class Ingest:
    """Median inserts a second over the rounds."""

    clients: int
    bare: float
    attached: float
    hnsw: float | None
    attached_to_bare: float
    attached_to_hnsw: float | None


def measure(where: Environment, *, dimension: int, clients: list[int], seconds: int, rounds: int) -> list[Ingest]:
    """Every table in turn, in each round, while syncd follows the attached one on the same machine."""
    tables = TABLES if where.vector_type == "vector" else TABLES[:2]
    where.create_tables(*tables, dimension=dimension)
    if "hnsw" in tables:
        where.run("create_hnsw", table="hnsw", operators="vector_cosine_ops")
    where.run("insert_sample", table="attached")
    where.run("attach", ["syncd_bench.attached", "cosine"])
    results = []
    with serving(where):
        for number in clients:
            rates: dict[str, list[float]] = {table: [] for table in tables}
            for _ in range(rounds):
                for table in tables:
                    rates[table].append(run_pgbench(where, table, number, seconds))
            bare, attached = statistics.median(rates["bare"]), statistics.median(rates["attached"])
            hnsw = statistics.median(rates["hnsw"]) if "hnsw" in tables else None
            results.append(
                Ingest(
                    number,
                    round(bare),
                    round(attached),
                    None if hnsw is None else round(hnsw),
                    # ratios of neighbours in time, since the machine's speed drifts
                    round(statistics.median(a / b for a, b in zip(rates["attached"], rates["bare"], strict=True)), 3),
                    None if hnsw is None else round(attached / hnsw, 1),
                )
            )
    return results


def run_pgbench(where: Environment, table: str, clients: int, seconds: int) -> float:
    """Transactions a second of one pgbench run."""
    script = where.directory / f"{table}.sql"
    query = sql.SQL(statement("bench", "insert_sample")).format(table=sql.Identifier(table))
    script.write_text(query.as_string(where.connection) + ";\n", encoding="utf-8")
    command = [
        find_pgbench(), "--no-vacuum", "--protocol=prepared", f"--client={clients}", f"--jobs={min(clients, 2)}",
        f"--time={seconds}", f"--file={script}",
    ]  # fmt: skip
    done = subprocess.run(  # noqa: S603 - a program of the PostgreSQL installation
        command, env=os.environ | libpq_variables(where.conninfo), capture_output=True, text=True, check=False
    )
    rate = re.search(r"^tps = ([0-9.]+)", done.stdout, re.MULTILINE)
    if done.returncode != 0 or rate is None:
        raise SyncdError(f"pgbench failed: {done.stderr.strip()[-1000:]}", hint="run it by itself to see why")
    return float(rate[1])


def find_pgbench() -> str:
    """The embedded PostgreSQL's, else the one on the path."""
    from syncd.postgres.embedded import EmbeddedUnavailable, binaries

    try:
        return str(binaries() / "pgbench")
    except EmbeddedUnavailable:
        found = shutil.which("pgbench")
        if found is None:
            raise SyncdError("pgbench is not installed", hint='pip install "syncd[embedded]"') from None
        return str(Path(found))


def libpq_variables(conninfo: str) -> dict[str, str]:
    """A connection string as libpq's environment variables, which pgbench reads."""
    names = {"host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "password": "PGPASSWORD", "dbname": "PGDATABASE"}
    return {names[name]: str(value) for name, value in conninfo_to_dict(conninfo).items() if name in names}
