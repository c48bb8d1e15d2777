"""Settings: flag, variable, syncd.toml, default; and the error for a wrong one."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import psycopg
import pytest

from syncd.errors import SettingsError
from syncd.settings import Settings, load_settings, service_socket
from tests.daemon import Daemon
from tests.integration.commands import assert_failed, run

SECRET = "s3cret-word"  # noqa: S105  of no account


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of the tester; a home and a working directory for each test."""
    for name in list(os.environ):
        if name.startswith(("SYNCD_", "XDG_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def shown(**environment: str) -> dict[str, Any]:
    done = run("config", "--json", cwd=Path.cwd(), **environment)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_a_flag_goes_before_a_variable_before_the_file_before_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert load_settings().consumer == "default"
    Path("syncd.toml").write_text('consumer = "file"\ncheckpoint_seconds = 7\n')
    assert (load_settings().consumer, load_settings().checkpoint_seconds) == ("file", 7)
    monkeypatch.setenv("SYNCD_CONSUMER", "variable")
    assert (load_settings().consumer, load_settings().checkpoint_seconds) == ("variable", 7)
    assert load_settings(consumer="flag").consumer == "flag"
    monkeypatch.setenv("SYNCD_CONSUMER", "")  # an empty variable is not set
    assert load_settings().consumer == "file"
    assert load_settings(consumer=None).consumer == "file"


def test_an_empty_variable_is_not_set_for_any_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_settings()
    for name in Settings.model_fields:
        monkeypatch.setenv(f"SYNCD_{name.upper()}", "")
    assert load_settings() == expected
    monkeypatch.delenv("SYNCD_SOCKET")
    without = service_socket()
    monkeypatch.setenv("SYNCD_SOCKET", "")
    assert service_socket() == without


def test_paths_are_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SYNCD_DATA_DIR", "below")
    assert load_settings().data_dir == tmp_path / "below"
    assert load_settings().socket_path == tmp_path / "below" / "syncd.sock" == service_socket()
    monkeypatch.setenv("SYNCD_SOCKET", "s")
    assert load_settings().socket_path == tmp_path / "s" == service_socket()


def test_the_defaults_are_those_of_the_contract() -> None:
    settings = load_settings()
    assert settings.conninfo == ""
    assert settings.consumer == "default"
    assert settings.checkpoint_seconds == 60
    assert settings.max_connections == 1000
    assert settings.poll_seconds is None
    assert settings.notify is None
    assert settings.outbox_max_rows is None
    assert settings.verify_seconds == 86400
    assert settings.recall == 0.95
    assert (settings.listen, settings.tcp_listen, settings.tls) == ("off", None, None)
    assert (settings.http, settings.http_was_chosen) == ("127.0.0.1:9464", False)
    assert settings.max_staleness_seconds is None
    assert not settings.token.get_secret_value()
    assert not settings.webhook_url.get_secret_value()


CONTRACT = re.findall(
    r"\S+",
    """SYNCD_DSN SYNCD_DATA_DIR SYNCD_SOCKET SYNCD_LISTEN SYNCD_TOKEN SYNCD_TLS_CERT SYNCD_TLS_KEY
    SYNCD_MAX_CONNECTIONS SYNCD_HTTP SYNCD_CONSUMER SYNCD_CHECKPOINT_SECONDS SYNCD_POLL_SECONDS
    SYNCD_VERIFY_SECONDS SYNCD_MAX_STALENESS_SECONDS SYNCD_WEBHOOK_URL SYNCD_NOTIFY
    SYNCD_OUTBOX_MAX_ROWS SYNCD_RECALL SYNCD_READERS SYNCD_SQL_LISTEN""",
)
OF_SHARDS = ("SYNCD_SHARD", "SYNCD_REPLICA", "SYNCD_ADVERTISE")
"""The settings that the flags of a shard set."""


def test_every_setting_of_the_contract_is_read_and_described_and_there_is_no_other() -> None:
    assert [*shown()] == [f"SYNCD_{name.upper()}" for name in Settings.model_fields]
    assert sorted(shown()) == sorted([*CONTRACT, *OF_SHARDS])
    printed = run("config", cwd=Path.cwd()).stdout
    for name, field in Settings.model_fields.items():
        line = next(
            line for line in printed.splitlines() if line.startswith(f"SYNCD_{name.upper()} ")
        )
        assert field.description
        assert line.rstrip().endswith(field.description)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("checkpoint_seconds", "soon"),
        ("checkpoint_seconds", "0"),
        ("checkpoint_seconds", "-1"),
        ("checkpoint_seconds", "nan"),
        ("checkpoint_seconds", "inf"),
        ("poll_seconds", "0"),
        ("poll_seconds", "nan"),
        ("max_connections", "0"),
        ("max_connections", "1.5"),
        ("recall", "0"),
        ("recall", "1.01"),
        ("recall", "nan"),
        ("webhook_url", "https://h/\u00fc"),
        ("notify", "on"),
        ("outbox_max_rows", "-5"),
        ("outbox_max_rows", "99999999999999999999"),
        ("listen", "7432"),
        ("listen", "::1"),
        ("listen", "host:http"),
        ("http", "localhost"),
        ("http", "localhost:99999"),
        ("max_staleness_seconds", "0"),
        ("max_staleness_seconds", "inf"),
        ("webhook_url", "ftp://h/x"),
        ("webhook_url", "hooks.example/x"),
        ("webhook_url", "https://"),
        ("webhook_url", "https://h:port/x"),
        ("consumer", "x" * 51),
        ("consumer", "line\nbreak"),
    ],
)
def test_a_wrong_value_names_its_setting(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"SYNCD_{name.upper()}", value)
    with pytest.raises(SettingsError, match=name) as caught:
        load_settings()
    assert caught.value.hint


def test_a_wrong_setting_exits_2_on_every_command(tmp_path: Path) -> None:
    assert_failed(
        run("serve", SYNCD_CHECKPOINT_SECONDS="soon", cwd=tmp_path),
        2,
        "checkpoint_seconds",
        "SYNCD_CHECKPOINT_SECONDS",
    )
    assert_failed(run("status", SYNCD_NOTIFY="on", cwd=tmp_path), 2, "notify")
    assert_failed(
        run("init", SYNCD_DSN=f"postgresql://u:{SECRET}@h:port/x", cwd=tmp_path), 2, "SYNCD_DSN"
    )
    Path("syncd.toml").write_text("checkpoint_secnods = 1\n")
    assert_failed(run("config", cwd=tmp_path), 2, "checkpoint_secnods")
    Path("syncd.toml").write_text("checkpoint_seconds = \n")
    assert_failed(run("config", cwd=tmp_path), 2, "syncd.toml")


def test_listening_without_a_token_exits_2_and_says_why(tmp_path: Path) -> None:
    done = run("serve", SYNCD_LISTEN="127.0.0.1:7432", cwd=tmp_path)
    assert_failed(
        done, 2, "listen is 127.0.0.1:7432", "no token", "SYNCD_TOKEN", "SYNCD_LISTEN=off"
    )
    assert load_settings(listen="[::1]:7432", token=SECRET).tcp_listen == "[::1]:7432"


@pytest.mark.parametrize(("given", "missing"), [("tls_cert", "tls_key"), ("tls_key", "tls_cert")])
def test_a_certificate_and_its_key_go_together(given: str, missing: str) -> None:
    with pytest.raises(SettingsError, match=f"{missing} is not set") as caught:
        load_settings(**{given: "/some/file"})
    assert f"SYNCD_{missing.upper()}" in caught.value.hint


def test_an_ops_address_counts_as_chosen_wherever_it_was_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SYNCD_HTTP", "127.0.0.1:9464")
    assert load_settings().http_was_chosen


def test_a_connection_string_that_cannot_be_read_is_never_repeated(tmp_path: Path) -> None:
    for dsn in (
        f"postgresql://user:{SECRET}@h:{SECRET}/x",
        f"host=x {SECRET}",
        f"host=x password='{SECRET}",
        f"postgresql://u:{SECRET}@[h/x",
    ):
        done = run("init", SYNCD_DSN=dsn, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert SECRET not in done.stdout + done.stderr


def test_config_shows_every_setting_and_no_secret(tmp_path: Path) -> None:
    secrets = {
        "SYNCD_DSN": f"host=/nosuch password={SECRET}",
        "SYNCD_TOKEN": SECRET,
        "SYNCD_WEBHOOK_URL": f"https://hooks.example/{SECRET}",
    }
    for arguments in (["config"], ["config", "--json"]):
        done = run(*arguments, **secrets, PGPASSWORD=SECRET, cwd=tmp_path)
        assert done.returncode == 0
        assert SECRET not in done.stdout + done.stderr
        for name in Settings.model_fields:
            assert f"SYNCD_{name.upper()}" in done.stdout
    values = json.loads(done.stdout)
    assert {values[name] for name in secrets} == {"(set)"}
    assert shown()["SYNCD_DSN"] is None
    for url in (f"{SECRET}.example/x", f"https://h:{SECRET}/"):  # a wrong one is not repeated
        done = run("config", SYNCD_WEBHOOK_URL=url, cwd=tmp_path)
        assert done.returncode == 2
        assert SECRET not in done.stdout + done.stderr


def test_config_names_the_file_that_is_read_and_shows_an_example_line(tmp_path: Path) -> None:
    done = run("config", cwd=tmp_path)
    assert "there is no configuration file: syncd.toml or /etc/syncd/syncd.toml\n" in done.stderr
    line = done.stderr.splitlines()[-1].partition(": ")[2]
    (tmp_path / "syncd.toml").write_text(line)
    done = run("config", cwd=tmp_path)
    assert f"read: {tmp_path / 'syncd.toml'}\n" in done.stderr
    assert re.search(r"SYNCD_CHECKPOINT_SECONDS +30\.0 ", done.stdout)


def test_settings_that_belong_to_the_database_are_stored_there_and_kept(
    db: psycopg.Connection, database: str, tmp_path: Path
) -> None:
    def stored() -> tuple[Any, Any]:
        row = db.execute(
            "SELECT m.last_value, l.max_rows FROM syncd.notify_mode AS m, syncd.outbox_limit AS l"
        ).fetchone()
        assert row is not None
        return row[0], row[1]

    assert stored() == (1, 10_000_000)
    run(
        "init", "--dsn", database, SYNCD_NOTIFY="guarded", SYNCD_OUTBOX_MAX_ROWS="500", cwd=tmp_path
    )
    assert stored() == (2, 500)
    run("init", "--dsn", database, cwd=tmp_path)
    assert stored() == (2, 500)
    daemon = Daemon(database, tmp_path / "data", notify="off", outbox_max_rows=700).start()
    assert stored() == (0, 700)
    with daemon.client() as client:
        assert not client.status().listener_connected
    daemon.stop()
    daemon = Daemon(database, tmp_path / "data").start()
    assert stored() == (0, 700)
    daemon.stop()
