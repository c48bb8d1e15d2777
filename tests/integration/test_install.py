"""The wheel that is built from the checkout works without the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from syncd.postgres import schema

ROOT = Path(__file__).parents[2]
BUILD_SECONDS = 300


def checked(command: Sequence[str | Path], cwd: Path) -> str:
    """Run a program without the tester's own settings; returns its stdout.

    A build that finds a folder which is not listed as a package fails.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SYNCD_", "PYTHON"))
    }
    done = subprocess.run(
        command,
        cwd=cwd,
        env=kept,
        capture_output=True,
        text=True,
        timeout=BUILD_SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "absent from the `packages` configuration" not in done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy of the checkout's files, so that a build leaves nothing behind."""
    folder = tmp_path_factory.mktemp("build")
    copy = folder / "checkout"
    copy.mkdir()
    for name in ("syncd", "sql", "migrations"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, copy / name)
    checked([sys.executable, "-m", "build", "--wheel", "--outdir", folder / "dist", copy], folder)
    (built,) = (folder / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_every_package_every_sql_file_and_every_page(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sql_files = {
        f"syncd/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "sql").rglob("*.sql")
    }
    python_files = {
        path.relative_to(ROOT).as_posix()
        if path.is_relative_to(ROOT / "syncd")
        else f"syncd/{path.relative_to(ROOT).as_posix()}"
        for folder in ("syncd", "migrations")
        for path in (ROOT / folder).rglob("*.py")
    }
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "syncd").rglob("*.md")}
    assert sql_files
    assert pages
    assert sorted((sql_files | python_files | pages | {"syncd/py.typed"}) - names) == []
    assert not [name for name in names if name.startswith(("tests/", "sql/", "migrations/"))]


@pytest.mark.long
@pytest.mark.timeout(2 * BUILD_SECONDS)
def test_installed_alone_it_prints_its_sql_from_any_directory(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    checked(
        [
            environment / "bin" / "python",
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            wheel,
        ],
        tmp_path,
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    program = environment / "bin" / "syncd"
    assert (
        checked([program, "init", "--show-sql"], elsewhere).rstrip()
        == schema.install_script().rstrip()
    )
    assert checked([program, "--version"], elsewhere).strip()
    assert "SYNCD_DATA_DIR" in checked([program, "config"], elsewhere)
    assert list(elsewhere.iterdir()) == []
