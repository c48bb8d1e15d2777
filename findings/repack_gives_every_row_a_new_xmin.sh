#!/usr/bin/env bash
# One would guess: pg_repack is VACUUM FULL without the lock, so to a reader both leave the rows as they were.
# What is so: VACUUM FULL keeps xmin of each row. After pg_repack every row has the id of pg_repack's own transaction,
# although nobody wrote. Versions: pg_repack 1.4.8 on PostgreSQL 15.20, Debian 12.
# Why it matters: a program that takes xmin as the version of a row (row-version columns of ORMs, "read what changed since" by
# xmin, a row that proves which transaction committed it) sees a whole table change at once. Optimistic updates that are
# under way fail, and incremental readers read everything again. Keep the id in a column of its own.
set -euo pipefail
T=$(mktemp -d)
chmod 755 "$T"
BIN=$T/root/usr/lib/postgresql/15/bin
as_other() { if [ "$(id -u)" = 0 ]; then setpriv --reuid=65534 --regid=65534 --clear-groups env HOME="$T/run" "$@"; else "$@"; fi; }
finish() {
    [ ! -f "$T/run/data/postmaster.pid" ] || as_other "$BIN/pg_ctl" -D "$T/run/data" -m immediate -w stop >"$T/stop.log" 2>&1 || true
    rm -rf "$T"
}
trap finish EXIT
mkdir -p "$T/apt/lists/partial" "$T/apt/cache/archives/partial" "$T/debs" "$T/root" "$T/run"
apt() { apt-get -qq -o Dir::State::lists="$T/apt/lists" -o Dir::Cache="$T/apt/cache" -o APT::Sandbox::User=root "$@"; }
apt update
(cd "$T/debs" && apt download postgresql-15=15.20-0+deb12u1 postgresql-client-15=15.20-0+deb12u1 libpq5=15.20-0+deb12u1 \
    postgresql-15-repack=1.4.8-1+deb12u1 libicu72 libxml2 libldap-2.5-0 libsasl2-2)
for package in "$T"/debs/*.deb; do dpkg-deb -x "$package" "$T/root"; done
export LD_LIBRARY_PATH=$T/root/usr/lib/$(uname -m)-linux-gnu
[ "$(id -u)" != 0 ] || chown 65534:65534 "$T/run"
cd "$T/run"
as_other "$BIN/initdb" -D "$T/run/data" -U postgres -A trust --no-sync >/dev/null
as_other "$BIN/pg_ctl" -D "$T/run/data" -w -l "$T/run/log" -o "-c listen_addresses='' -c unix_socket_directories=$T/run -c fsync=off" start >/dev/null
sql() { as_other "$BIN/psql" -X -q -A -t -v ON_ERROR_STOP=1 -h "$T/run" -U postgres -c "$1"; }
states() { sql "SELECT count(DISTINCT xmin::text) || ' ids, ' || count(*) FILTER (WHERE xmin::text <> written_by::text) || ' rows with another id than their writer' FROM items"; }

sql "SELECT version()"
as_other "$BIN/pg_repack" --version
sql "CREATE TABLE items (id int PRIMARY KEY, written_by xid8 DEFAULT pg_current_xact_id()); CREATE EXTENSION pg_repack"
for id in 1 2 3 4 5; do sql "INSERT INTO items VALUES ($id)"; done
echo "written:           $(states)"
sql "VACUUM (FULL, FREEZE) items"
full=$(states)
echo "after VACUUM FULL: $full"
as_other "$BIN/pg_repack" -h "$T/run" -U postgres -d postgres -t items 2>/dev/null
repacked=$(states)
echo "after pg_repack:   $repacked"
[ "$full" = "5 ids, 0 rows with another id than their writer" ] && [ "$repacked" = "1 ids, 5 rows with another id than their writer" ]
