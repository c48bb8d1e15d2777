"""The status page in a browser: on a phone, by day and by night, following the service."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.browser import CHROMIUM, Browser, browser
from tests.conftest import clone
from tests.daemon import Daemon
from tests.scrape import url_of
from tests.servers import PostgresServer

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

ROWS = "document.querySelector('#live table').rows[1].cells[2].textContent"
NAME = "a-name-that-is-far-too-long-for-a-phone-" + "x" * 200
PNG = b"\x89PNG\r\n"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium")) as it:
        yield it


@pytest.fixture(scope="module")
def database(server: PostgresServer) -> Iterator[str]:
    yield from clone(server)


@pytest.fixture(scope="module")
def service(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with psycopg.connect(database, autocommit=True) as db:
        db.execute("CREATE TABLE t (id int PRIMARY KEY, v real[])")
        db.execute("INSERT INTO t SELECT i, ARRAY[i, 1] FROM generate_series(1, 20) AS i")
        db.execute(
            "SELECT syncd.attach('t', dataset => $$'a-name-that-is-far-too-long-for-a-phone-' || "
            "repeat('x', 200)$$)"
        )
    daemon = Daemon(
        database, tmp_path_factory.mktemp("page") / "data", http="127.0.0.1:0"
    ).with_constant("syncd.ops.history.SAMPLE_SECONDS", 0.2)
    yield daemon.start()
    if daemon.process is not None:
        daemon.stop()


def when(condition: str) -> str:
    """A script that ends once the page has changed so that a condition holds."""
    return (
        f"new Promise(so => {{ const look = () => {condition} && so(true); look();"
        " new MutationObserver(look).observe(document.body, {subtree: true, childList: true, "
        "attributes: true}) })"
    )


def test_the_page_fits_a_phone_by_day_and_by_night_and_follows_a_change(
    service: Daemon, database: str, chromium: Browser, tmp_path: Path
) -> None:
    colours = []
    for dark in (False, True):
        chromium.be_a_phone(dark=dark)
        chromium.open(url_of(service))
        colours.append(chromium.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert chromium.evaluate("document.documentElement.scrollWidth") <= 390
        assert chromium.evaluate(when("document.querySelector('h1').textContent == 'In sync'"))
        picture = chromium.screenshot()
        assert picture.startswith(PNG)
        (tmp_path / f"page-{'dark' if dark else 'light'}.png").write_bytes(picture)
    assert colours == ["rgb(255, 255, 255)", "rgb(17, 17, 19)"]
    assert chromium.evaluate(ROWS) == "20"
    with psycopg.connect(database, autocommit=True) as db:
        db.execute("INSERT INTO t VALUES (100, '{1,2}')")
    assert chromium.evaluate(when(f"{ROWS} == '21'"))
    assert chromium.evaluate(when("document.querySelectorAll('svg polyline').length >= 3"))
    assert chromium.complaints == []


def test_a_search_is_typed_and_answered_without_javascript(
    service: Daemon, chromium: Browser
) -> None:
    chromium.call("Emulation.setScriptExecutionDisabled", value=True)
    chromium.open(url_of(service))
    chromium.submit(dataset=NAME, key="7")
    chromium.call("Emulation.setScriptExecutionDisabled", value=False)
    assert '<td class="name">8</td>' in chromium.html.partition('id="found"')[2]


def test_the_page_says_when_the_service_has_gone(service: Daemon, chromium: Browser) -> None:
    chromium.open(url_of(service))
    assert chromium.evaluate("document.getElementById('lost').hidden") is True
    service.stop()
    assert chromium.evaluate(when("!document.getElementById('lost').hidden"))
