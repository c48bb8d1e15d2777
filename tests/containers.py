"""A Dockerfile's steps in clean roots, and its programs in namespaces, without an engine.

Needs root, debootstrap and util-linux. An engine takes the base image that FROM names. Here the
base is the same distribution's packages, from the sources of this machine's apt.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Self

TOOLS = ("apt-get", "chroot", "cp", "debootstrap", "ip", "mount", "nsenter", "unshare")
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
STOP_SECONDS = 60


class Step(NamedTuple):
    """One instruction of a Dockerfile."""

    word: str
    text: str


def steps(dockerfile: str) -> list[Step]:
    """The instructions, with continued lines joined and without comments."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [Step(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


@dataclass
class Image:
    """The result of the steps so far."""

    root: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    folder: str = "/"
    user: str = "root"
    volume: str = ""
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    healthcheck: list[str] = field(default_factory=list)

    def inside(self, path: str) -> Path:
        """The path on this machine of a path in the image."""
        absolute = PurePosixPath("/", self.folder, path)  # an absolute path replaces the folder
        return self.root / absolute.relative_to("/")

    def set_variables(self, text: str) -> None:
        """ENV: names with values, which can refer to previous names."""
        for name, value in (each.split("=", 1) for each in shlex.split(text)):
            self.environment[name] = re.sub(
                r"\$(\w+)", lambda match: self.environment[match[1]], value
            )


def build(dockerfile: str, context: Path, base: Path, directory: Path) -> Image:
    """Do every step, and return the last stage. The root ``base`` replaces the images of FROM."""
    stages: dict[str, Image] = {}
    image = Image(base)
    for word, text in steps(dockerfile):
        if word == "FROM":
            image = Image(directory / str(len(stages)))
            stages[text.split()[-1]] = image
            subprocess.run(["cp", "-a", base, image.root], check=True)
        elif word == "WORKDIR":
            image.folder = text
            image.inside(".").mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            copy(image, text, stages, context)
        elif word == "RUN":
            pip, folders = pip_of_this_machine()
            subprocess.run(
                enclosed(image, ["sh", "-c", text], environment=pip, binds=folders, user="root"),
                check=True,
            )
        elif word == "ENV":
            image.set_variables(text)
        elif word == "USER":
            image.user = text
        elif word == "VOLUME":
            image.volume = text
        elif word == "HEALTHCHECK":
            image.healthcheck = json.loads(text.partition("CMD ")[2])
        elif word == "ENTRYPOINT":
            image.entrypoint = json.loads(text)
        elif word == "CMD":
            image.command = json.loads(text)
        elif word != "EXPOSE":
            raise ValueError(f"no such step here: {word} {text}")
    return image


def copy(image: Image, text: str, stages: Mapping[str, Image], context: Path) -> None:
    """COPY as an engine does it: the contents of a folder, without ignored files of the context."""
    *sources, target = text.split()
    of_stage = sources[0].startswith("--from=")
    origin = stages[sources.pop(0).removeprefix("--from=")].root if of_stage else context
    for source in (origin / name.lstrip("/") for name in sources):
        if source.is_dir():
            ignore = None if of_stage else shutil.ignore_patterns("__pycache__")
            shutil.copytree(
                source, image.inside(target), symlinks=True, ignore=ignore, dirs_exist_ok=True
            )
        else:
            shutil.copy2(source, image.inside(target))


def debian(root: Path) -> None:
    """This machine's distribution with only Python in it, as in the official Python image."""
    codename = re.findall(
        r"^VERSION_CODENAME=(\w+)$", Path("/etc/os-release").read_text(), re.MULTILINE
    )[0]
    asked = ["apt-get", "indextargets", "--format", "$(CODENAME) $(REPO_URI)"]
    known = dict(line.split() for line in subprocess.check_output(asked, text=True).splitlines())
    packages = "--include=ca-certificates,python3-venv"
    subprocess.run(
        ["debootstrap", "--variant=minbase", packages, codename, root, known[codename]], check=True
    )
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")


def pip_of_this_machine() -> tuple[dict[str, str], dict[str, Path]]:
    """Settings of this machine's pip for its packages, and the files and folders that they name."""
    text = subprocess.check_output(["python3", "-m", "pip", "config", "list"], text=True)
    values = {
        name.rpartition(".")[2]: value.strip("'")
        for name, value in re.findall(r"^(\S+?)=(.+)$", text, re.M)
    }
    named = {
        Path(word.removeprefix("file://")) for value in values.values() for word in value.split()
    }
    environment = {f"PIP_{name.upper().replace('-', '_')}": value for name, value in values.items()}
    folders = {
        path if path.is_file() else path.parent if path.name == "simple" else path for path in named
    }
    return environment, {
        str(path): path for path in folders if path.is_absolute() and path.exists()
    }


def enclosed(
    image: Image,
    command: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    binds: Mapping[str, Path] | None = None,
    user: str | None = None,
    alone: bool = False,
) -> list[str]:
    """A command that runs ``command`` in the image, as process 1.

    ``alone``: restricted as in compose.yaml, and with a network of its own.
    """
    root = str(image.root)
    mounts = [["mount", "--bind", root, root], ["mount", "-t", "proc", "proc", f"{root}/proc"]]
    if alone:
        mounts += [["ip", "link", "set", "lo", "up"], ["mount", "-o", "remount,bind,ro", root]]
        temporary = str(image.root / "tmp")
        mounts += [["mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", temporary]]
    for place, path in (binds or {}).items():
        inside = image.inside(place)
        if path.is_dir():
            inside.mkdir(parents=True, exist_ok=True)
        else:
            inside.parent.mkdir(parents=True, exist_ok=True)
            inside.touch()
        mounts.append(["mount", "--bind", str(path), str(inside)])
    last = ["exec", "chroot", root, *as_user(image, command, environment or {}, user or image.user)]
    script = "\n".join(map(shlex.join, [*mounts, last]))
    namespaces = ["--mount", "--pid", *(["--net"] if alone else [])]
    return ["unshare", *namespaces, "--fork", "--kill-child", "sh", "-euc", script]


def as_user(
    image: Image, command: Sequence[str], environment: Mapping[str, str], user: str
) -> list[str]:
    """The command with the image's environment. Users other than root can get no capability."""
    rights = [f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    if user != "root":
        rights += ["--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]
    variables = [
        f"{name}={value}" for name, value in (image.environment | dict(environment)).items()
    ]
    return ["setpriv", *rights, "env", "-i", "-C", image.folder, *variables, *command]


class Container:
    """A running program of an image, restricted as in compose.yaml.

    Only its volume and /tmp can be written.
    """

    def __init__(
        self,
        image: Image,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        binds: Mapping[str, Path],
        log: Path,
    ) -> None:
        self.image = image
        self.environment = environment
        command = enclosed(
            image, [*image.entrypoint, *arguments], environment=environment, binds=binds, alone=True
        )
        with log.open("wb") as end:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=end, text=True)

    @property
    def pid(self) -> int:
        """Process id of the container's process 1 on this machine."""
        parent = self.process.pid
        return int(Path(f"/proc/{parent}/task/{parent}/children").read_text())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()  # --kill-child ends process 1 as well
        self.process.communicate()

    def line(self) -> str:
        """The next line that the program prints; empty when it has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def execute(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run another command in the container, as ``docker exec`` does."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--net", "--root"]
        return subprocess.run(
            [*enter, *as_user(self.image, command, self.environment, self.image.user)],
            capture_output=True,
            text=True,
            check=False,
        )

    def end(self, how: signal.Signals | None = signal.SIGTERM) -> int:
        """Send process 1 a signal, or wait for its end, and return the exit status."""
        if how is not None:
            os.kill(self.pid, how)
        self.process.communicate(timeout=STOP_SECONDS)
        return self.process.returncode
