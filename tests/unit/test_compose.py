"""docker/compose.yaml agrees with itself, with the Dockerfile and with the mounted files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from psycopg import pq

from syncd.cli.main import MODULES
from syncd.settings import Settings
from tests.containers import steps

DOCKER = Path(__file__).parents[2] / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
STEPS = {
    step.word: step.text for step in steps((DOCKER / "Dockerfile").read_text())
}  # of the last stage
ENVIRONMENT = dict(re.findall(r"(\S+?)=(\S+)", STEPS["ENV"]))


def test_metrics_is_a_profile_and_the_rest_runs_without_one() -> None:
    profiles = {name: service.get("profiles", []) for name, service in SERVICES.items()}
    metrics = ["metrics"]
    assert profiles == {
        "postgres": [],
        "init": [],
        "syncd": [],
        "prometheus": metrics,
        "grafana": metrics,
    }


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_refers_only_to_names_that_exist(name: str) -> None:
    service = SERVICES[name]
    assert service["image"]
    if build := service.get("build"):
        assert (DOCKER / build["context"] / build["dockerfile"]).samefile(DOCKER / "Dockerfile")
    for other, wait in service.get("depends_on", {}).items():
        if wait["condition"] == "service_healthy":
            assert SERVICES[other]["healthcheck"]["test"]
        else:
            assert wait["condition"] == "service_completed_successfully"
            assert "restart" not in SERVICES[other]
    for volume in service.get("volumes", []):
        source, target, *_ = volume.split(":")
        assert (
            (DOCKER / source).is_file() if source.startswith(".") else source in COMPOSE["volumes"]
        )
        assert target.startswith("/")
    for port in service.get("ports", []):
        assert port.startswith("127.0.0.1:"), "any client that reaches it may search"


def test_every_volume_is_used() -> None:
    mounted = {
        volume.split(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", [])
    }
    assert COMPOSE["volumes"].keys() <= mounted


def test_syncd_is_told_of_the_database_that_postgres_makes() -> None:
    made, told = SERVICES["postgres"]["environment"], SERVICES["syncd"]["environment"]
    assert SERVICES["init"]["environment"] == told
    assert told["PGHOST"] in SERVICES
    assert [told[f"PG{name}"] for name in ("USER", "DATABASE", "PASSWORD")] == [
        made[f"POSTGRES_{name}"] for name in ("USER", "DB", "PASSWORD")
    ]
    known = {option.envvar.decode() for option in pq.Conninfo.get_defaults() if option.envvar}
    assert {name for name in told if not name.startswith("SYNCD_")} <= known
    assert {
        name.removeprefix("SYNCD_").lower() for name in told if name.startswith("SYNCD_")
    } <= set(Settings.model_fields)


def test_the_image_runs_existing_commands_as_the_user_that_owns_the_kept_volumes() -> None:
    assert json.loads(STEPS["ENTRYPOINT"]) == ["syncd"]
    healthcheck = json.loads(STEPS["HEALTHCHECK"].partition("CMD ")[2])
    assert healthcheck[0] == "syncd"
    for command in (healthcheck[1], json.loads(STEPS["CMD"])[0], SERVICES["init"]["command"][0]):
        assert command in MODULES
    user, volume = STEPS["USER"], STEPS["VOLUME"]
    assert user not in ("root", "0")
    assert f"-o {user} -g {user} -m 0750 {volume}" in STEPS["RUN"]
    assert ENVIRONMENT["SYNCD_DATA_DIR"] == volume
    assert SERVICES["syncd"]["volumes"] == [f"indexes:{volume}"]
    unit = (DOCKER / "syncd.service").read_text()
    assert f"TimeoutStopSec={SERVICES['syncd']['stop_grace_period'].removesuffix('s')}\n" in unit


def test_the_ports_that_are_named_are_those_that_are_listened_on() -> None:
    port = ENVIRONMENT["SYNCD_HTTP"].rpartition(":")[2]
    assert STEPS["EXPOSE"] == port
    assert SERVICES["syncd"]["ports"] == [f"127.0.0.1:{port}:{port}"]
    prometheus = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text())
    assert prometheus["scrape_configs"][0]["static_configs"] == [{"targets": [f"syncd:{port}"]}]
    (source,) = yaml.safe_load((DOCKER / "grafana/datasource.yml").read_text())["datasources"]
    assert (
        source["url"]
        == f"http://prometheus:{SERVICES['prometheus']['ports'][0].rpartition(':')[2]}"
    )


def test_prometheus_and_grafana_find_the_mounted_files() -> None:
    mounted = {
        name: {volume.split(":")[1] for volume in SERVICES[name]["volumes"]}
        for name in ("prometheus", "grafana")
    }
    (rules,) = yaml.safe_load((DOCKER / "prometheus/prometheus.yml").read_text())["rule_files"]
    assert f"/etc/prometheus/{rules}" in mounted["prometheus"]
    (provider,) = yaml.safe_load((DOCKER / "grafana/dashboards.yml").read_text())["providers"]
    home = Path(SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home) in mounted["grafana"]
    assert home.parent == Path(provider["options"]["path"])
    alerts = yaml.safe_load((DOCKER / "prometheus/alerts.yml").read_text())
    assert all(
        rule["expr"] and rule["annotations"]["command"] for rule in alerts["groups"][0]["rules"]
    )
