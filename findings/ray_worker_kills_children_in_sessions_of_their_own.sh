#!/usr/bin/env bash
# One would guess: a program that a Ray actor starts with start_new_session=True outlives Ray on this machine, as a
# daemon outlives the shell that started it. If the worker itself is killed, it does.
# What is so: if only the raylet ends, its workers end in order, and before that each kills its child processes with
# SIGKILL, whichever session they are in. Version: ray 2.60.0. RAY_kill_child_processes_on_worker_exit=0 in the actor's
# runtime_env keeps them alive.
# Why it matters: a server started from an actor, such as an index beside PostgreSQL, is to answer on while Ray is upgraded
# or lost. With Ray's default it dies with the raylet, without a chance to save what it has.
set -euo pipefail
T=$(mktemp -d /tmp/f.XXXXXX) # short: Ray's sockets are in it
trap 'for session in $(cat "$T"/*.session 2>/dev/null); do ps -eo pid=,sid= | awk -v s="$session" "\$2 == s {print \$1}" | xargs -r kill -9 2>/dev/null || true; done; rm -rf "$T"' EXIT
python3 -m venv "$T/venv"
"$T/venv/bin/pip" install -q --disable-pip-version-check ray==2.60.0
export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$T/token"
"$T/venv/bin/python" -c 'import secrets; print(secrets.token_hex(32))' >"$T/token"

lives() { # lives NAME KILL_CHILDREN: whether an actor's child is alive 5 s after the raylet was killed
    local address pid child
    setsid sh -c 'echo $$ >"$1"; shift; exec "$@"' sh "$T/$1.session" \
        "$T/venv/bin/ray" start --head --port=0 --node-ip-address=127.0.0.2 --num-cpus=0 --include-dashboard=false \
        --object-store-memory=80000000 --temp-dir="$T/$1" --disable-usage-stats >"$T/$1.log" 2>&1
    address=$(cat "$T/$1/ray_current_cluster")
    child=$("$T/venv/bin/python" - "$address" "$2" 2>/dev/null <<'PYTHON'
import subprocess
import sys

import ray

ray.init(address=sys.argv[1], namespace="n", log_to_driver=False, configure_logging=False)


@ray.remote(num_cpus=0, lifetime="detached", name="a")
class Starter:
    def start(self):
        return subprocess.Popen(["sleep", "600"], start_new_session=True).pid


variables = {"RAY_kill_child_processes_on_worker_exit": sys.argv[2]}
print(ray.get(Starter.options(runtime_env={"env_vars": variables}).remote().start.remote(), timeout=60))
PYTHON
    )
    echo "$child" >"$T/$1.child.session" # it leads a session of its own
    pid=$(ps -eo pid=,sid=,args= | awk -v s="$(cat "$T/$1.session")" '$2 == s && /raylet\/raylet /{print $1}')
    kill -9 "$pid"
    sleep 5
    if kill -0 "$child" 2>/dev/null; then echo alive; else echo dead; fi
}

default=$(lives d 1)
kept=$(lives k 0)
echo "ray 2.60.0: a child in its own session, after its raylet was killed: $default; with kill_child_processes_on_worker_exit=0: $kept"
[ "$default $kept" = "dead alive" ]
