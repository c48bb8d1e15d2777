"""``docker/`` names existing metrics, labels, settings and files; systemd gets the state."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from syncd.cli.main import MODULES
from syncd.ops.metrics import COUNTERS, GAUGES, HISTOGRAMS
from syncd.settings import Settings
from tests.daemon import CHECKOUT, READY_SECONDS, Daemon

DOCKER = CHECKOUT / "docker"
LABELS = {
    name: {*labels} for family in (GAUGES, COUNTERS) for name, (_, labels) in family.items()
} | {
    f"{name}_{suffix}": {*labels} | ({"le"} if suffix == "bucket" else set())
    for name, (_, labels) in HISTOGRAMS.items()
    for suffix in ("bucket", "sum", "count")
}
OF_PROMETHEUS = {"instance", "job"}


def dashboard_expressions() -> list[str]:
    dashboard: dict[str, Any] = json.loads((DOCKER / "grafana/syncd.json").read_text())
    queries = [each["query"]["query"] for each in dashboard["templating"]["list"]]
    return queries + [
        target["expr"] for panel in dashboard["panels"] for target in panel["targets"]
    ]


def alert_expressions() -> list[str]:
    return re.findall(
        r"^\s+expr: (.+)$", (DOCKER / "prometheus/alerts.yml").read_text(), re.MULTILINE
    )


def metrics_of(expression: str) -> set[str]:
    return set(re.findall(r"\bsyncd_\w+", expression))


def labels_of(expression: str) -> set[str]:
    """Labels that an expression selects, groups by, or lists the values of."""
    selected = re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"", expression)
    grouped = [
        name
        for names in re.findall(r"\b(?:by|without) \(([^)]*)\)", expression)
        for name in names.split(", ")
    ]
    return {*selected, *grouped, *re.findall(r"label_values\(\w+, (\w+)\)", expression)}


@pytest.mark.parametrize("expression", [*alert_expressions(), *dashboard_expressions()])
def test_an_expression_names_existing_metrics_and_labels(expression: str) -> None:
    metrics = metrics_of(expression)
    assert metrics or expression.startswith("up{")
    assert metrics <= LABELS.keys()
    assert labels_of(expression) <= OF_PROMETHEUS.union(*(LABELS[name] for name in metrics))
    for opening, closing in ("()", "{}", "[]"):
        assert expression.count(opening) == expression.count(closing)


def test_the_dashboard_shows_every_metric() -> None:
    shown = set().union(*map(metrics_of, dashboard_expressions()))
    assert set(GAUGES) | set(COUNTERS) <= shown
    for name in HISTOGRAMS:
        assert any(one.startswith(name) for one in shown), name


def test_an_alert_names_an_existing_command() -> None:
    text = (DOCKER / "prometheus/alerts.yml").read_text()
    commands = re.findall(r'command: "(.+?)"\}$', text, re.MULTILINE)
    assert len(commands) == text.count("- alert:") == len(alert_expressions())
    for command in commands:
        word, argument = command.split()[:2]
        assert argument in MODULES if word == "syncd" else word in ("journalctl", "SELECT")


@pytest.mark.parametrize(
    "path", [path for path in DOCKER.rglob("*") if path.is_file()], ids=lambda path: path.name
)
def test_a_file_names_existing_settings_and_files(path: Path) -> None:
    text = path.read_text()
    for name in re.findall(r"\bSYNCD_([A-Z_]+)", text):
        assert name.lower() in Settings.model_fields, name
    for mounted in re.findall(r"^\s+- (\./\S+?):/", text, re.MULTILINE):
        assert (path.parent / mounted).is_file(), mounted
    for copied in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        for name in copied.split():
            assert (CHECKOUT / name).exists(), name
            assert f"!{name}\n" in (DOCKER / "Dockerfile.dockerignore").read_text()


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)
@pytest.mark.parametrize("name", ["syncd.service", "syncd-route.service", "syncd-shard@.service"])
def test_systemd_understands_every_line_of_a_unit(name: str, tmp_path: Path) -> None:
    text = (DOCKER / name).read_text()
    unit = tmp_path / name.replace("@", "@0-3")
    unit.write_text(text.replace("/opt/syncd/bin/syncd", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False
    )
    assert unit.name not in done.stdout + done.stderr
    assert "Type=notify\n" in text


# systemd


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket of a service manager."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        path = str(tmp_path / "notify")
        manager.bind(path)
        manager.settimeout(READY_SECONDS)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        monkeypatch.setenv("WATCHDOG_USEC", "200000")
        yield manager


def test_systemd_hears_ready_once_datasets_answer_then_signs_of_life_then_the_stop(
    database: str, tmp_path: Path, told: socket.socket
) -> None:
    with psycopg.connect(database) as db:
        db.execute("CREATE TABLE t (id int PRIMARY KEY, v real[])")
        db.execute("SELECT syncd.attach('t')")
        db.commit()
        db.execute("LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
        daemon = Daemon(database, tmp_path / "data")
        process = daemon.spawn()
        while b"source_delayed" not in daemon.log.read_bytes():
            assert told.recv(4096) == b"WATCHDOG=1"  # the service runs, and is not ready
        db.rollback()
        assert daemon.wait_for_line(process).startswith(b"ready ")
        heard = b"WATCHDOG=1"
        while heard == b"WATCHDOG=1":
            heard = told.recv(4096)
        assert heard.startswith(b"READY=1\n")
        assert told.recv(4096) == b"WATCHDOG=1"
        daemon.stop()
        heard = b"WATCHDOG=1"
        while heard == b"WATCHDOG=1":
            heard = told.recv(4096)
        assert heard == b"STOPPING=1"
