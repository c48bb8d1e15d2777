"""Named points of a pass, a checkpoint, a start, a build and a compaction, at which syncd is
killed.

The product does not know them: ``watch`` runs in syncd's process before the service starts, and
puts a wrapper around the function of each point. The test names one point in a file. The process
that reaches this point writes another file, and kills itself as ``kill -9`` does.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import os
import pkgutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

ARMED, REACHED = "armed", "reached"

Phase = Literal[
    "scan",
    "start",
    "pass",
    "checkpoint",
    "stop",
    "build",
    "compaction",
    "restart",
    "publication",
    "reshard",
]


class Point(NamedTuple):
    """A moment before or after a function, at its ``nth`` call since the point was armed."""

    phase: Phase
    name: str
    when: Literal["before", "after"]
    function: str
    nth: int = 1


POINTS = [
    Point("scan", "before the first page", "before", "syncd.sync.consumer.passes:scan_page"),
    Point(
        "scan",
        "after the first page of several",
        "after",
        "syncd.sync.consumer.passes:scan_page",
    ),
    Point(
        "scan",
        "in the middle of a page",
        "after",
        "syncd.index.dataset:DatasetIndex.apply_stored",
        2,
    ),
    Point(
        "scan",
        "before the end of a scan",
        "before",
        "syncd.sync.source.followed:FollowedSource.end_scan",
    ),
    Point(
        "scan",
        "after the end of a scan",
        "after",
        "syncd.sync.source.followed:FollowedSource.end_scan",
        2,
    ),
    Point(
        "scan",
        "before the first checkpoint is captured",
        "before",
        "syncd.sync.background.checkpoints:capture",
    ),
    Point("start", "before the directory is locked", "before", "syncd.service:locked_data_dir"),
    Point(
        "start",
        "before the manifest is read",
        "before",
        "syncd.store.checkpoint:CheckpointStore.load",
    ),
    Point(
        "start",
        "after the manifest is read",
        "after",
        "syncd.store.checkpoint:CheckpointStore.load",
    ),
    Point(
        "start",
        "after leftovers are removed",
        "after",
        "syncd.store.checkpoint:CheckpointStore.remove_leftovers",
    ),
    Point(
        "start",
        "before the database is connected",
        "before",
        "syncd.sync.consumer.consumer:open_pass_connection",
    ),
    Point(
        "start", "before the name is taken", "before", "syncd.sync.consumer.connecting:take_name"
    ),
    Point("start", "after the name is taken", "after", "syncd.sync.consumer.connecting:take_name"),
    Point(
        "start",
        "after the sources are read",
        "after",
        "syncd.sync.consumer.connecting:read_registry",
    ),
    Point(
        "start",
        "in the middle of loading",
        "after",
        "syncd.sync.source.loading:DatasetIndex.load",
        2,
    ),
    Point("start", "after loading", "after", "syncd.sync.consumer.consumer:Consumer.load"),
    Point("start", "in the first pass", "after", "syncd.sync.consumer.passes:Pass.checked"),
    Point("start", "before it says that it is ready", "before", "syncd.cli.serve:say"),
    Point("pass", "before the locks", "before", "syncd.sync.consumer.passes:Pass.begin"),
    Point(
        "pass",
        "between the locks and the snapshot",
        "after",
        "syncd.sync.consumer.passes:Pass.begin",
    ),
    Point("pass", "after the snapshot", "after", "syncd.sync.consumer.passes:Pass.checked"),
    Point(
        "pass",
        "after the changed keys are read",
        "after",
        "syncd.sync.consumer.passes:read_changes",
    ),
    Point("pass", "before the first source", "before", "syncd.sync.consumer.passes:bring"),
    Point("pass", "before rows are applied", "before", "syncd.sync.consumer.bringing:apply"),
    Point("pass", "between two datasets", "after", "syncd.index.dataset:DatasetIndex.apply_stored"),
    Point(
        "pass",
        "before rows are in memory",
        "before",
        "syncd.index.generation.generation:Generation.write",
    ),
    Point(
        "pass", "before rows are published", "before", "syncd.index.dataset:DatasetIndex._publish"
    ),
    Point(
        "pass",
        "after rows are written ahead",
        "after",
        "syncd.index.storage.columns:Column.seal",
        2,
    ),
    Point("pass", "after rows are applied", "after", "syncd.sync.consumer.bringing:apply"),
    Point("pass", "between two sources", "after", "syncd.sync.consumer.passes:bring"),
    Point(
        "pass",
        "before the end of its transaction",
        "before",
        "syncd.sync.consumer.transaction:Transaction.commit",
    ),
    Point(
        "pass",
        "after the end of its transaction",
        "after",
        "syncd.sync.consumer.transaction:Transaction.commit",
    ),
    Point(
        "pass",
        "after its last step",
        "after",
        "syncd.sync.consumer.consumer:Consumer.note_progress",
    ),
    Point(
        "checkpoint",
        "after the first source is captured",
        "after",
        "syncd.sync.background.checkpoints:capture",
    ),
    Point(
        "checkpoint", "before the nonce", "before", "syncd.sync.background.checkpoints:write_nonce"
    ),
    Point(
        "checkpoint", "after the nonce", "after", "syncd.sync.background.checkpoints:write_nonce"
    ),
    Point("checkpoint", "before the first file", "before", "syncd.index.storage.columns:write_at"),
    Point(
        "checkpoint",
        "after the first file is written",
        "after",
        "syncd.index.storage.columns:write_at",
    ),
    Point(
        "checkpoint",
        "after a file is durable",
        "after",
        "syncd.index.storage.columns:make_durable",
        3,
    ),
    Point("checkpoint", "before a bitmap", "before", "syncd.index.generation.generation:write_at"),
    Point("checkpoint", "after a bitmap", "after", "syncd.index.generation.generation:write_at"),
    Point(
        "checkpoint",
        "between two datasets",
        "after",
        "syncd.index.generation.generation:Generation.save",
    ),
    Point("checkpoint", "before the manifest", "before", "syncd.store.checkpoint:write_manifest"),
    Point(
        "checkpoint", "before the previous manifest is renamed", "before", "pathlib:Path.replace"
    ),
    Point("checkpoint", "between the two renames", "after", "pathlib:Path.replace"),
    Point(
        "checkpoint",
        "before the renames are durable",
        "before",
        "syncd.store.manifest:sync_directory",
    ),
    Point("checkpoint", "after the manifest", "after", "syncd.store.checkpoint:write_manifest"),
    Point(
        "checkpoint",
        "before obsolete files are removed",
        "before",
        "syncd.store.checkpoint:remove_file",
    ),
    Point(
        "checkpoint",
        "after the first obsolete file is removed",
        "after",
        "syncd.store.checkpoint:remove_file",
    ),
    Point(
        "checkpoint",
        "before it is noted in the database",
        "after",
        "syncd.store.checkpoint:CheckpointStore.save",
    ),
    Point(
        "stop", "before requests under way are finished", "before", "syncd.rpc.server:Server.stop"
    ),
    Point(
        "stop", "before the last checkpoint", "before", "syncd.service:Service.save_last_checkpoint"
    ),
    Point("stop", "in the last checkpoint", "before", "syncd.store.checkpoint:write_manifest"),
]

CODES_POINTS = [
    Point("build", "before a codebook is trained", "before", "syncd.index.build.plan:train"),
    Point("build", "after a part is encoded", "after", "syncd.index.build.encoding:Encoder.encode"),
    Point("build", "before recall is measured", "before", "syncd.index.build.plan:calibrate"),
    Point(
        "build", "before codes are used", "before", "syncd.index.dataset:DatasetIndex.swap_codes"
    ),
    Point("build", "after codes are used", "after", "syncd.index.dataset:DatasetIndex.swap_codes"),
    Point("compaction", "before it begins", "before", "syncd.index.dataset:DatasetIndex._compact"),
    Point(
        "compaction",
        "after the old files are checked",
        "before",
        "syncd.index.generation.compaction:Move.follow",
    ),
    Point(
        "compaction",
        "after the first rows are copied",
        "after",
        "syncd.index.generation.compaction:Move.copy",
    ),
    Point(
        "compaction",
        "in the middle of copying",
        "after",
        "syncd.index.generation.compaction:Move.copy",
        3,
    ),
    Point(
        "compaction",
        "after all rows are copied",
        "after",
        "syncd.index.generation.compaction:Move.follow",
    ),
    Point(
        "compaction",
        "after they are encoded",
        "after",
        "syncd.index.generation.compaction:Move.encoded",
    ),
    Point(
        "compaction", "before the last round", "before", "syncd.index.dataset:DatasetIndex._move_in"
    ),
    Point(
        "compaction",
        "before the new generation is published",
        "after",
        "syncd.index.generation.compaction:Move.follow",
        2,
    ),
    Point(
        "compaction", "after it is published", "after", "syncd.index.dataset:DatasetIndex._move_in"
    ),
    Point(
        "compaction",
        "before its checkpoint",
        "before",
        "syncd.sync.background.builder:Builder.save",
    ),
    Point(
        "compaction",
        "before the files of the new generation are durable",
        "before",
        "syncd.index.generation.generation:Generation.save",
    ),
    Point("compaction", "before codes are written", "before", "syncd.index.codes.files:write_at"),
    Point("compaction", "after codes are written", "after", "syncd.index.codes.files:write_at"),
    Point("compaction", "after codes are durable", "after", "syncd.index.codes.files:make_durable"),
    Point(
        "compaction",
        "before the manifest that names the new generation",
        "before",
        "syncd.store.checkpoint:write_manifest",
    ),
    Point("compaction", "after that manifest", "after", "syncd.store.checkpoint:write_manifest"),
    Point(
        "compaction",
        "after the first old file is removed",
        "after",
        "syncd.store.checkpoint:remove_file",
    ),
    Point(
        "compaction", "after its checkpoint", "after", "syncd.store.checkpoint:CheckpointStore.save"
    ),
    Point(
        "restart",
        "before codes are loaded",
        "before",
        "syncd.index.generation.generation:load_codes",
    ),
    Point(
        "restart", "after codes are loaded", "after", "syncd.index.generation.generation:load_codes"
    ),
]

READER_POINTS = [
    Point(
        "publication", "before a word changes", "before", "syncd.index.storage.arena:Arena.point"
    ),
    Point(
        "publication",
        "between a view and its position",
        "before",
        "syncd.readers.publishing:Publisher.publish",
    ),
    Point(
        "publication",
        "after a position is published",
        "after",
        "syncd.readers.publishing:Publisher.publish",
    ),
]

OPERATING = "syncd.cluster.operating"
RESHARD_POINTS = [
    Point("reshard", "before it waits for the shards", "before", f"{OPERATING}:wait_for_shards"),
    Point("reshard", "when the shards are ready", "after", f"{OPERATING}:wait_for_shards"),
    Point("reshard", "while the shards verify", "after", "syncd.cluster.verifying:capture"),
    Point("reshard", "when the shards are verified", "after", f"{OPERATING}:verify"),
    Point("reshard", "before the token", "before", f"{OPERATING}:catch_up"),
    Point("reshard", "while the shards catch up", "after", "syncd.client.client:Client.wait"),
    Point("reshard", "before the swap", "before", f"{OPERATING}:swap"),
    Point("reshard", "between the swap's statements", "before", f"{OPERATING}:notify_routers"),
    Point("reshard", "before the swap is committed", "after", f"{OPERATING}:notify_routers"),
    Point("reshard", "after the swap", "after", f"{OPERATING}:swap"),
]
"""Steps of ``syncd cluster reshard``. Only after the last one does the other layout answer."""


def arm(folder: Path, point: Point) -> None:
    """Let the process be killed at a point."""
    (folder / REACHED).unlink(missing_ok=True)
    (folder / "new").write_text(repr(point))
    (folder / "new").rename(folder / ARMED)


def reached(folder: Path) -> str:
    """The point at which a process was killed; empty if it was not."""
    return (folder / REACHED).read_text() if (folder / REACHED).exists() else ""


def watch(folder: str, some: Sequence[Point] = (*POINTS, *CODES_POINTS, *READER_POINTS)) -> None:
    """Put a wrapper around the function of each point, in syncd's process."""
    for point in some:
        module, _, path = point.function.partition(":")
        owner = pkgutil.resolve_name(module)
        *outer, name = path.split(".")
        for each in outer:
            owner = getattr(owner, each)
        static = inspect.getattr_static(owner, name)
        function = getattr(owner, name)
        wrapped = wrapper(point, function, Path(folder))
        setattr(owner, name, staticmethod(wrapped) if isinstance(static, classmethod) else wrapped)


def wrapper(point: Point, function: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """The function, with a kill before or after it."""
    calls = itertools.count(1)  # next() is atomic: several threads save datasets

    def here() -> None:
        try:
            armed = (folder / ARMED).read_text()
        except FileNotFoundError:
            return
        if armed == repr(point) and next(calls) == point.nth:
            (folder / REACHED).write_text(repr(point))
            (folder / ARMED).unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    @functools.wraps(function)
    async def around_coroutine(*arguments: Any, **named: Any) -> Any:
        if point.when == "before":
            here()
        result = await function(*arguments, **named)
        if point.when == "after":
            here()
        return result

    @functools.wraps(function)
    def around(*arguments: Any, **named: Any) -> Any:
        if point.when == "before":
            here()
        result = function(*arguments, **named)
        if point.when == "after":
            here()
        return result

    return around_coroutine if inspect.iscoroutinefunction(function) else around
