"""The user that PostgreSQL runs as: it refuses to run as root, even if root starts it."""

from __future__ import annotations

import contextlib
import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from syncd.errors import EmbeddedUnavailable


@dataclass(frozen=True, slots=True)
class Account:
    """The unprivileged user that runs a server which root starts: PostgreSQL refuses root."""

    uid: int
    gid: int


def server_account(directory: Path) -> Account | None:
    """The account for the server; None if we are not root.

    It is the cluster's owner, else ``postgres``, else ``nobody``.
    """
    if os.geteuid() != 0:
        return None
    if directory.exists() and (status := directory.stat()).st_uid != 0:
        return Account(status.st_uid, status.st_gid)
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            return Account(user.pw_uid, user.pw_gid)
    raise EmbeddedUnavailable(
        "PostgreSQL does not run as root, and there is no user postgres or nobody to run it",
        hint="useradd --system postgres",
    )


def as_account(
    account: Account | None, directory: Path, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Popen's arguments: first enter the directory, then become the account.

    Of our environment the server gets only the time zone.
    """
    kept = {"PATH": os.defpath, "LC_ALL": "C"} | {
        name: os.environ[name] for name in ("TZ",) if name in os.environ
    }
    arguments: dict[str, Any] = {
        "cwd": directory,
        "env": kept | dict(environment or {}),
        "umask": 0o077,
    }
    if account is not None:
        arguments |= {"user": account.uid, "group": account.gid, "extra_groups": []}
    return arguments
