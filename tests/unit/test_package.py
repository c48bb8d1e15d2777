"""Names and cost of ``import syncd``."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import syncd
from syncd import errors
from syncd.imports import without_collections

ROOT = Path(__file__).parents[2]
HEAVY = (
    "faiss",
    "structlog",
    "psycopg",
    "pydantic",
    "pydantic_settings",
    "alembic",
    "typer",
    "rich",
    "starlette",
)


def test_every_error_is_importable_from_the_package() -> None:
    found = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.SyncdError)
    }
    assert found <= set(syncd.__all__)
    assert all(getattr(syncd, name) is getattr(errors, name) for name in found)


def test_the_import_loads_nothing_that_only_the_service_needs() -> None:
    asked = f"import sys, syncd; print(*set(sys.modules).intersection({HEAVY}))"
    assert (
        subprocess.run(
            [sys.executable, "-c", asked], capture_output=True, text=True, check=True
        ).stdout
        == "\n"
    )


def test_numpy_is_imported_without_threads_and_faiss_keeps_its_own() -> None:
    asked = (
        "import os; from syncd.imports import import_numpy; import_numpy(); "
        "print(len(os.listdir('/proc/self/task')), os.environ.get('OPENBLAS_NUM_THREADS')); "
        "import faiss; assert faiss.omp_get_max_threads() == len(os.sched_getaffinity(0))"
    )
    environment = {
        name: text for name, text in os.environ.items() if not name.endswith("_NUM_THREADS")
    }
    done = subprocess.run(
        [sys.executable, "-c", asked],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "1 None\n"


def test_imports_are_not_collected_and_later_objects_are() -> None:
    before, kept = gc.get_freeze_count(), [[number] for number in range(10)]
    with without_collections():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() >= before + len(kept)


def test_every_folder_with_code_is_listed_as_a_package() -> None:
    """An editable install works without it; an installed one cannot import the folder."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT).parts for path in (ROOT / "syncd").rglob("*.py")}
    assert sorted({".".join(parts) for parts in folders} - set(listed)) == []
