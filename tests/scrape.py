"""Answers of a running service over HTTP, and events of its log."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import closing
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.daemon import Daemon

SECONDS = 30

Series = tuple[str, frozenset[tuple[str, str]]]
"""A sample's name and labels."""


def events(daemon: Daemon, name: str) -> list[dict[str, Any]]:
    """Events of one name in the service's log."""
    text = daemon.log.read_text().rpartition("\n")[0]  # the last line may be half written
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == name]


def wait_for_event(daemon: Daemon, name: str) -> dict[str, Any]:
    """The first event of a name, as soon as it is logged."""
    with subprocess.Popen(
        ["tail", "-n", "+1", "-F", str(daemon.log)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as tail:
        assert tail.stdout is not None
        for line in tail.stdout:
            if line.startswith(b"{") and json.loads(line)["event"] == name:
                tail.kill()
                found: dict[str, Any] = json.loads(line)
                return found
    raise AssertionError(name)


def url_of(daemon: Daemon, path: str = "/") -> str:
    """A URL of the service, from the address in its log."""
    return f"http://{events(daemon, 'http_listening')[-1]['address']}{path}"


def get(daemon: Daemon, path: str) -> tuple[int, str]:
    """Status and body of a GET."""
    try:
        url = url_of(daemon, path)
        with urllib.request.urlopen(url, timeout=SECONDS) as answer:  # noqa: S310  a test's own URL
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with closing(error):
            return error.code, error.read().decode()


def readyz(daemon: Daemon) -> tuple[int, dict[str, Any]]:
    """Status and verdict."""
    status, body = get(daemon, "/readyz")
    return status, json.loads(body)


def samples(daemon: Daemon) -> Mapping[Series, float]:
    """Every sample of ``/metrics``."""
    status, text = get(daemon, "/metrics")
    assert status == 200
    return {
        (one.name, frozenset(one.labels.items())): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


def sample(daemon: Daemon, name: str, **labels: str) -> float:
    """One sample of ``/metrics``."""
    return samples(daemon)[name, frozenset(labels.items())]
