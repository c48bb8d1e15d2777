"""The files of a cluster in ``docker/`` name settings, options, addresses and users that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from syncd.cli.main import app
from syncd.ops.web import WebServer
from syncd.settings import Settings, load_settings
from syncd.shard import Shard
from tests.containers import steps

DOCKER = Path(__file__).parents[2] / "docker"
SINGLE, SHARD, ROUTE = (
    (DOCKER / name).read_text()
    for name in ("syncd.service", "syncd-shard@.service", "syncd-route.service")
)
OBJECTS: dict[tuple[str, str], dict[str, Any]] = {
    (each["kind"], each["metadata"]["name"]): each
    for each in yaml.safe_load_all((DOCKER / "kubernetes.yaml").read_text())
}
SET = OBJECTS["StatefulSet", "syncd-of-3"]["spec"]
ROUTERS = OBJECTS["Deployment", "syncd-route"]["spec"]
WORK = [SET, ROUTERS, OBJECTS["Job", "syncd-init"]["spec"]]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
STEPS = {step.word: step.text for step in steps((DOCKER / "Dockerfile").read_text())}


def options(command: str) -> set[str]:
    """The options of a command of the CLI."""
    return {name for each in COMMANDS[command].params for name in each.opts}


def port_of(address: str) -> int:
    """The port of ``host:port``."""
    return int(address.rpartition(":")[2])


def container(of: dict[str, Any]) -> dict[str, Any]:
    """The one container of a pod's template."""
    (found,) = of["template"]["spec"]["containers"]
    return dict(found)


def environment(of: dict[str, Any], **pod: str) -> dict[str, str]:
    """The variables of a container; ``pod`` has those that come from fields of the pod."""
    found = dict(pod)
    for each in container(of).get("env", []):
        if "value" in each:
            found[each["name"]] = re.sub(r"\$\((\w+)\)", lambda m: found[m[1]], each["value"])
        else:
            assert each["name"] in pod, each
    return found


def settings_of(found: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings as the command reads them from these variables, and from those of the secret."""
    for name, value in (found | {"SYNCD_TOKEN": "t", "SYNCD_DSN": "host=/nowhere"}).items():
        monkeypatch.setenv(name, value)
        if name.startswith("SYNCD_"):
            assert name.removeprefix("SYNCD_").lower() in Settings.model_fields, name
    return load_settings()


# systemd


@pytest.mark.parametrize(("unit", "command"), [(SHARD, "serve"), (ROUTE, "route")])
def test_a_unit_runs_a_command_with_options_that_exist(
    unit: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = unit.replace("%i", "0-3").replace("%I", "0/3")  # as systemd does for @0-3
    (line,) = re.findall(r"^ExecStart=/opt/syncd/bin/syncd (.+)$", unit, re.MULTILINE)
    word, *arguments = line.split()
    assert word == command
    assert {each for each in arguments if each.startswith("--")} <= options(command)
    if command == "serve":
        assert Shard.parse(arguments[1]) == Shard(3, 0)
    given = re.findall(r"^Environment=(.+)$", unit, re.MULTILINE)
    found = dict(each.split("=", 1) for each in given[0].split())
    settings = settings_of(found, monkeypatch)
    assert settings.listen != "off"
    (state,) = re.findall(r"^StateDirectory=(.+)$", unit, re.MULTILINE) or [""]
    if state:
        assert settings.data_dir == Path("/var/lib") / state


def test_the_units_of_a_shard_and_of_a_router_fit_on_one_machine() -> None:
    ports = [
        re.findall(r":(\d+)\b", each.partition("\nEnvironment=")[2]) for each in (SHARD, ROUTE)
    ]
    assert not {*ports[0]} & {*ports[1], str(Settings.model_fields["http"].default).split(":")[1]}


def test_the_units_of_a_cluster_are_confined_like_that_of_one_syncd() -> None:
    def confined(unit: str) -> str:
        return unit.partition("WatchdogSec=")[2]

    assert confined(SHARD) == confined(ROUTE) == confined(SINGLE)
    assert re.findall(r"^TimeoutStopSec=.+$", SHARD, re.M) == re.findall(
        r"^TimeoutStopSec=.+$", SINGLE, re.M
    )


# Kubernetes


def test_each_pod_of_the_set_is_another_shard_of_one_layout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = SET["serviceName"]
    assert OBJECTS["Service", name]["spec"]["clusterIP"] == "None"
    assert OBJECTS["Service", name]["spec"]["publishNotReadyAddresses"] is True
    shards, addresses = set(), set()
    for number in range(SET["replicas"]):
        pod = f"syncd-of-3-{number}"
        settings = settings_of(environment(SET, NUMBER=str(number), POD=pod), monkeypatch)
        assert settings.listen != "off"
        assert settings.advertise == f"{pod}.{name}:{port_of(settings.listen)}"
        shards.add(settings.own_shard)
        addresses.add(settings.advertise)
    assert shards == {Shard(3, number) for number in range(3)}
    assert len(addresses) == 3


def test_the_set_keeps_the_data_directory_and_gives_it_time_to_save() -> None:
    (claim,) = SET["volumeClaimTemplates"]
    mounts = {each["name"]: each["mountPath"] for each in container(SET)["volumeMounts"]}
    assert mounts[claim["metadata"]["name"]] == STEPS["VOLUME"]
    stop = re.findall(r"^TimeoutStopSec=(\d+)$", SHARD, re.M)
    assert [str(SET["template"]["spec"]["terminationGracePeriodSeconds"])] == stop


def test_services_select_the_pods_that_listen_on_their_ports(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for service, work, pod in (
        ("syncd-shards", SET, {"NUMBER": "0", "POD": "p"}),
        ("syncd", ROUTERS, {}),
    ):
        spec = OBJECTS["Service", service]["spec"]
        labels = work["template"]["metadata"]["labels"]
        assert spec["selector"].items() <= labels.items()
        assert work["selector"]["matchLabels"] == labels
        ports = {each["name"]: each["containerPort"] for each in container(work)["ports"]}
        settings = settings_of(environment(work, **pod), monkeypatch)
        assert settings.listen != "off"
        assert [each["port"] for each in spec["ports"]] == [port_of(settings.listen)]
        assert ports == {"rpc": port_of(settings.listen), "http": int(STEPS["EXPOSE"])}


@pytest.mark.parametrize("work", WORK, ids=["shards", "routers", "init"])
def test_a_container_runs_a_command_as_the_image_s_user(work: dict[str, Any]) -> None:
    pod, one = work["template"]["spec"], container(work)
    command, *arguments = one["args"]
    assert {*arguments} <= options(command)
    (user,) = re.findall(r"useradd --uid (\d+)", STEPS["RUN"])
    confined = pod["securityContext"]
    assert {confined[name] for name in ("runAsUser", "runAsGroup", "fsGroup")} == {int(user)}
    assert one["securityContext"]["readOnlyRootFilesystem"] is True
    assert pod["enableServiceLinks"] is False
    mounted = {each["name"] for each in one["volumeMounts"]}
    claims = {each["metadata"]["name"] for each in work.get("volumeClaimTemplates", [])}
    assert mounted == {each["name"] for each in pod["volumes"]} | claims
    for probe in ("readinessProbe", "livenessProbe"):
        asked = one.get(probe, {})
        ports = {each["name"] for each in one.get("ports", [])}
        for way in asked.keys() & {"httpGet", "tcpSocket"}:
            assert asked[way]["port"] in ports
        if "httpGet" in asked:
            assert hasattr(WebServer, f"show_{asked['httpGet']['path'].removeprefix('/')}")
