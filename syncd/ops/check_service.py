"""Checks of the running service: its state, its tasks, its last verify and its checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version

from syncd.errors import ServiceUnavailable
from syncd.ops.amounts import ago, since
from syncd.ops.findings import Finding, fail, ok, warn
from syncd.ops.look import Service
from syncd.protocol.status_messages import VerifyStatus
from syncd.settings import Settings

LAG_SECONDS = 10.0
LATE_CHECKPOINTS = 3


def check_service(settings: Settings, service: Service) -> Iterator[Finding]:
    """The service runs, is in sync, and saves checkpoints."""
    status = service.status
    if status is None:
        assert service.error is not None
        # A service that runs and does not answer is a failure.
        report = warn if isinstance(service.error, ServiceUnavailable) else fail
        yield report(
            "service", service.error.message, service.error.hint or "see the log of syncd serve"
        )
        return
    for row in service.datasets:
        if row.state in ("failed", "must_rebuild"):
            yield fail(f"dataset {row.dataset}", f"is {row.state}", f"syncd why {row.dataset}")
        elif row.lag_seconds > LAG_SECONDS:
            yield warn(
                f"dataset {row.dataset}",
                f"is {row.state}, {ago(row.lag_seconds)} behind",
                f"syncd why {row.dataset}",
            )
        if row.in_sync is False:
            yield warn(
                f"dataset {row.dataset}",
                "the last verify found a difference",
                f"syncd verify {row.dataset} --repair",
            )
    detail = (
        f"{status.state}, consumer {status.consumer}, version {status.version}, "
        f"up {ago(status.uptime_seconds)}"
    )
    if status.state == "failed":
        yield fail(
            "service",
            f"{detail}: a source cannot be read",
            "see the lines about each source and dataset",
        )
    elif status.database_error:
        yield fail(
            "service",
            f"{detail}: {status.database_error}; it answers from its last position",
            "repair that, and watch: syncd status --watch",
        )
    else:
        yield ok(
            "service", f"{detail}, lag {ago(status.lag_seconds) if status.lag_seconds else 'none'}"
        )
    for task in status.failing_tasks:
        times = f"{task.failures} time{'s' if task.failures > 1 else ''}"
        detail = (
            f"fails, {times} in a row: {task.error}; tried again in {ago(task.retry_in_seconds)}"
        )
        yield warn(
            f"task {task.task}",
            detail,
            "see task_failed in the log of syncd serve; watch: syncd status --watch",
        )
    if status.version != version("syncd"):
        detail = f"the running service is {status.version}, this program {version('syncd')}"
        yield warn("service", detail, "restart syncd serve")
    if status.verify is not None:
        yield check_verify(status.verify)
    checkpoint = status.checkpoint
    age = None if checkpoint.at is None else (datetime.now(UTC) - checkpoint.at).total_seconds()
    late = LATE_CHECKPOINTS * settings.checkpoint_seconds
    if checkpoint.error:
        yield fail(
            "checkpoint",
            f"the last attempt failed: {checkpoint.error}",
            "repair that, then: syncd checkpoint",
        )
    # The start may load a checkpoint that is days old.
    elif min(status.uptime_seconds, math.inf if age is None else age) > late:
        shown = "none since the service started" if age is None else f"{ago(age)} old"
        yield warn(
            "checkpoint",
            f"{shown}, expected every {settings.checkpoint_seconds:.0f} s",
            "syncd checkpoint",
        )
    else:
        yield ok("checkpoint", "not due yet" if age is None else f"{ago(age)} old")


def check_verify(verify: VerifyStatus) -> Finding:
    """Every table is compared with its indexes regularly: without a verify no drift is found."""
    age = since(verify.at)
    if verify.overdue:
        detail = (
            f"the last whole one is {age}, more than twice "
            f"SYNCD_VERIFY_SECONDS={verify.interval_seconds:g}: {verify.overdue}"
        )
        return warn("verify", detail, "repair that, then: syncd verify")
    return ok(
        "verify",
        age
        if verify.interval_seconds
        else f"{age}; none in the background: SYNCD_VERIFY_SECONDS=0",
    )
