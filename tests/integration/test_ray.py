"""``syncd cluster up`` on a real Ray: on this machine, and on three simulated ones.

CI does not install Ray: its 250 MB take 18 s. ``test_cluster_up.py`` has an engine of threads. Each
simulated machine is a session of Ray's processes with an address of its own. Its shards listen on
that address.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psycopg
import pytest

from syncd.cluster.local_head import OBJECT_STORE_BYTES
from syncd.cluster.operating import look, read_layout
from syncd.errors import SyncdError
from syncd.settings import Settings, load_settings
from tests.daemon import Daemon
from tests.integration.commands import assert_failed

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="Ray is not installed: pip install 'syncd[ray]'; CI leaves it out, it takes 18 s",
)

SECONDS = 120.0
ROWS = 2000
TOKEN = "of a test"  # noqa: S105
SHARDS = 3
HEALTH = (
    '{"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000,'
    ' "health_check_timeout_ms": 1000, "health_check_failure_threshold": 3}'
)
"""As the page about clusters has it."""
HOSTS = ("127.0.0.11", "127.0.0.12", "127.0.0.13")


def processes() -> Iterator[tuple[int, int, str]]:
    """Each process's id, its session, and its command line."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if line:  # a process that has ended, and whose parent has not noticed, has none
                yield int(entry.name), os.getsid(int(entry.name)), line


class Machine:
    """A simulated machine: Ray's processes, and the shards that listen on its address."""

    def __init__(self, folder: Path, host: str, head: str) -> None:
        self.folder = folder
        self.host = host
        self.head = head
        self.session = 0

    def start(self) -> None:
        """Start Ray's processes: the head, if the head's address is on this machine."""
        mine = self.head.startswith(f"{self.host}:")
        flags = [f"--address={self.head}"]
        if mine:
            flags = ["--head", f"--port={self.head.rpartition(':')[2]}"]
            flags += [f"--temp-dir={self.folder / 'r'}", f"--system-config={HEALTH}"]
            flags += ["--include-dashboard=false"]
        flags += [f"--node-ip-address={self.host}", "--num-cpus=0", "--memory=2000000000"]
        flags += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats"]
        flags += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        log = self.folder / f"{self.host}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "ray.scripts.scripts", "start", *flags],
                env=os.environ
                | {
                    "SYNCD_DATA_DIR": str(self.folder / self.host),
                    "RAY_worker_maximum_startup_concurrency": "2",
                },
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        assert process.wait(SECONDS) == 0, log.read_text()
        self.session = process.pid

    def rays(self) -> list[int]:
        """Ray's processes."""
        return [pid for pid, session, _ in processes() if session == self.session]

    def runs_ray(self) -> bool:
        """Whether its raylet or one of its workers runs; Ray leaves its monitors behind."""
        words = ("/raylet/raylet ", "ray::ShardActor")
        mine = [line for _, session, line in processes() if session == self.session]
        return any(word in line for line in mine for word in words)

    def shards(self) -> list[int]:
        """The shards' processes."""
        return [pid for pid, _, line in processes() if f"--listen {self.host}:0" in line]

    def send(self, number: signal.Signals, *, shards: bool = True) -> None:
        """Send a signal to all its processes, or to Ray's only."""
        for pid in self.rays() + (self.shards() if shards else []):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill_head(self) -> None:
        """Kill the head and the raylet, and no worker."""
        for pid, session, line in processes():
            if session == self.session and ("/gcs_server " in line or "/raylet/raylet " in line):
                os.kill(pid, signal.SIGKILL)


class Searches:
    """A client that searches through the router until the block ends, and checks the answers."""

    def __init__(self, router: Daemon) -> None:
        self.router = router
        self.right, self.errors, self.wrong = 0, list[str](), list[str]()
        self.slowest = 0.0
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.search)

    def search(self) -> None:
        draw = random.Random(1)
        with self.router.client() as client:
            while not self.stopping.is_set():
                wanted = draw.randrange(2, ROWS - 2)
                begun = time.monotonic()
                try:
                    hits = client.search("numbers", [wanted + 0.25, 1], k=3)
                except SyncdError as error:
                    self.errors.append(error.message)
                    continue
                self.slowest = max(self.slowest, time.monotonic() - begun)
                if [hit.key for hit in hits] == [wanted, wanted + 1, wanted - 1]:
                    self.right += 1
                else:
                    self.wrong.append(f"{wanted}: {hits}")

    def until_right(self, more: int = 5) -> None:
        """Return when as many more answers were right."""
        goal = self.right + more
        until(lambda: self.right >= goal)

    def __enter__(self) -> Searches:
        self.thread.start()
        self.until_right(1)
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.thread.join()


def until(true: object, seconds: float = SECONDS) -> float:
    """Return when a condition holds: after how many seconds."""
    assert callable(true)
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < seconds
        time.sleep(0.02)
    return time.monotonic() - begun


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a short path: those of Ray's sockets are 70 characters longer."""
    found = Path(tempfile.mkdtemp(prefix="r-", dir="/tmp"))
    yield found
    shutil.rmtree(found, ignore_errors=True)


@pytest.fixture
def settings(
    db: psycopg.Connection, database: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Settings:
    """Settings of a database with a table; the commands find them in the environment."""
    db.execute("CREATE TABLE numbers (id bigint PRIMARY KEY, v real[])")
    db.execute("SELECT syncd.attach('numbers', metric => 'l2')")
    db.execute(f"INSERT INTO numbers SELECT i, ARRAY[i, 1] FROM generate_series(1, {ROWS}) i")
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    return load_settings(dsn=database, token=TOKEN, data_dir=folder / "data")


def command(settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``syncd cluster``."""
    variables = {
        "SYNCD_DSN": settings.conninfo,
        "SYNCD_TOKEN": TOKEN,
        "SYNCD_DATA_DIR": str(settings.data_dir),
        "SYNCD_HTTP": "off",
    }
    return subprocess.run(
        [sys.executable, "-m", "syncd.cli.main", "cluster", *arguments],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=2 * SECONDS,
        check=False,
    )


def shards_in(settings: Settings) -> dict[str, int]:
    """The shards' processes of a local cluster."""
    found: dict[str, int] = {}
    for pid, _, line in processes():
        with contextlib.suppress(OSError):
            if " serve --shard " in line and Path(f"/proc/{pid}/cwd").readlink().is_relative_to(
                settings.data_dir
            ):
                found[line.split()[-1]] = pid
    return found


@contextlib.contextmanager
def routed(settings: Settings, folder: Path) -> Iterator[Daemon]:
    """A router."""
    router = Daemon(settings.conninfo, folder / "router", token=TOKEN)
    router.command = "route"
    router.start()
    try:
        yield router
    finally:
        router.kill()


@pytest.mark.timeout(600)
def test_a_whole_cluster_on_this_machine_starts_survives_its_head_and_leaves_nothing(
    settings: Settings, folder: Path
) -> None:
    up = ("up", "--shards", "2", "--address", "local")
    done = command(settings, *up)
    assert done.returncode == 0, done.stderr
    first = shards_in(settings)
    assert sorted(first) == ["0/2", "1/2"]
    parents = {Path(f"/proc/{pid}/stat").read_text().split()[3] for pid in first.values()}
    names = {Path(f"/proc/{parent}/cmdline").read_bytes()[:15] for parent in parents}
    assert names == {b"ray::ShardActor"}
    try:
        with routed(settings, folder) as router, Searches(router) as searches:
            done = command(settings, *up)
            assert (done.returncode, shards_in(settings)) == (0, first), done.stderr
            for pid, _, line in processes():
                if "/gcs_server " in line and str(folder) in line:
                    os.kill(pid, signal.SIGKILL)
            searches.until_right()
            done = command(settings, *up)
            assert (done.returncode, shards_in(settings)) == (0, first), done.stderr
            searches.until_right()
        assert (searches.errors, searches.wrong) == ([], [])
    finally:
        done = command(settings, "down", "--address", "local")
    assert done.returncode == 0, done.stderr
    assert shards_in(settings) == {}
    assert [line for _, _, line in processes() if f"{folder}/" in line] == []
    again = command(settings, "down", "--address", "local")
    assert (again.returncode, again.stderr) == (0, "")


@pytest.fixture
def machines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Machine]]:
    """Three machines, of which the first one has the head."""
    (folder / "token").write_text(secrets.token_hex(32))
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "token"))
    with socket.socket() as probe:
        probe.bind((HOSTS[0], 0))
        head = f"{HOSTS[0]}:{probe.getsockname()[1]}"
    found = [Machine(folder, host, head) for host in HOSTS]
    try:
        for each in found:
            each.start()
        yield found
    finally:
        for each in found:
            each.send(signal.SIGKILL)


def states(settings: Settings) -> str:
    """For a failure: each replica's address, state and error."""
    return str([(e.consumer, e.address, e.state, e.error) for e in look(settings).shards])


def whole(settings: Settings, hosts: Sequence[str] = HOSTS, replicas: int = 2) -> bool:
    """Whether all replicas of each shard answer, on these machines."""
    registered = [each for some in read_layout(settings).replicas.values() for each in some]
    if not all(any(f"//{host}:" in each.address for host in hosts) for each in registered):
        return False  # without asking: a frozen process takes 2 s not to answer
    found = look(settings).shards
    return len(found) == replicas * SHARDS and all(each.state == "ready" for each in found)


def assert_apart(settings: Settings) -> None:
    """No two replicas of a shard are on one machine."""
    on = {(each.shard, each.address.rpartition(":")[0]) for each in look(settings).shards}
    assert len(on) == 2 * SHARDS, on


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_searches_go_on_while_actors_machines_and_the_head_are_lost(
    settings: Settings, machines: list[Machine], folder: Path
) -> None:
    head = machines[0].head
    up = ("up", "--shards", str(SHARDS), "--replicas", "2", "--address", head)
    for shards, replicas, words in ((1, 4, "need 4 machines"), (9, 2, "do not fit")):
        few = ("up", "--shards", str(shards), "--replicas", str(replicas), "--address", head)
        assert_failed(command(settings, *few), 1, words, "ray start --address")
    done = command(settings, *up)
    assert done.returncode == 0, done.stderr
    assert whole(settings)
    assert_apart(settings)
    before = [pid for each in machines for pid in each.shards()]
    assert command(settings, *up).returncode == 0
    assert [pid for each in machines for pid in each.shards()] == before
    with routed(settings, folder) as router, Searches(router) as searches:

        def measure(what: str, after: float) -> None:
            searches.until_right()
            print(
                f"{what}: whole after {after:.1f} s; {searches.right} answers, {searches.errors}, "
                f"slowest {searches.slowest:.3f} s"
            )
            searches.slowest = 0.0

        def until_whole(hosts: Sequence[str]) -> float:
            try:
                return until(lambda: whole(settings, hosts))
            except AssertionError:
                raise AssertionError(states(settings)) from None

        with contextlib.suppress(ProcessLookupError):
            os.kill(before[0], signal.SIGKILL)
        until(lambda: before[0] not in [pid for each in machines for pid in each.shards()])
        measure("process killed", until_whole(HOSTS))

        actors = [pid for pid, _, line in processes() if line.startswith("ray::ShardActor")]
        now = [pid for each in machines for pid in each.shards()]
        actor = next(pid for pid in actors if pid in machines[1].rays())
        os.kill(actor, signal.SIGKILL)
        measure(
            "actor killed",
            until(
                lambda: (
                    sum(line.startswith("ray::ShardActor") for _, _, line in processes())
                    == 2 * SHARDS
                )
            ),
        )
        assert [pid for each in machines for pid in each.shards()] == now

        machines[2].send(signal.SIGKILL)
        measure("machine killed", until_whole(HOSTS[:2]))
        assert_apart(settings)

        machines[2].start()
        machines[1].send(signal.SIGSTOP)
        measure("machine frozen", until_whole([HOSTS[0], HOSTS[2]]))
        machines[1].send(signal.SIGCONT)
        measure("it went on", until(lambda: not machines[1].shards()))
        assert_apart(settings)
        until(lambda: not machines[1].runs_ray())

        now = [pid for each in machines for pid in each.shards()]
        machines[0].send(signal.SIGKILL, shards=False)
        searches.until_right(50)
        assert [pid for each in machines for pid in each.shards()] == now
        measure("head killed", 0.0)
        assert searches.wrong == []
        print(f"searches: {searches.right} right, errors: {searches.errors}")
        assert searches.errors == []
    done = command(settings, "down", "--address", head)
    assert done.returncode == 0, done.stderr
    assert [pid for each in machines for pid in each.shards()] == []
    # The other machine's Ray has not ended yet: it must not start them again.
    assert any(line.startswith("ray::ShardActor") for _, _, line in processes())
    until(lambda: not any(each.runs_ray() for each in machines), 240)
    assert [pid for each in machines for pid in each.shards()] == []


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_without_replicas_a_lost_machine_is_an_error_that_names_its_shards_until_they_are_moved(
    settings: Settings, machines: list[Machine], folder: Path
) -> None:
    done = command(settings, "up", "--shards", str(SHARDS), "--address", machines[0].head)
    assert done.returncode == 0, done.stderr
    assert [len(each.shards()) for each in machines] == [1, 1, 1]
    with routed(settings, folder) as router, Searches(router) as searches:
        machines[2].send(signal.SIGKILL)
        seconds = until(lambda: whole(settings, HOSTS[:2], replicas=1))
        searches.until_right()
        shards, errors = machines[0].shards(), len(searches.errors)
        machines[0].kill_head()
        until(lambda: not machines[0].runs_ray())  # the workers end in order
        searches.until_right()
        assert (machines[0].shards(), len(searches.errors)) == (shards, errors)
    print(f"machine killed: whole after {seconds:.1f} s; {searches.right} right answers")
    assert searches.wrong == []
    assert searches.errors
    assert {error.partition(": ")[0] for error in searches.errors} == {
        "1 of 3 shards did not answer"
    }
    done = command(settings, "down", "--address", machines[0].head)
    assert done.returncode == 0, done.stderr
    assert [each.shards() for each in machines] == [[], [], []]
