-- Searches from SQL: syncd.search and syncd.search_key ask the running service over dblink, through
-- its listener for PostgreSQL clients (SYNCD_SQL_LISTEN).
--
-- syncd.ask does it. It runs as the owner of schema syncd, who alone has the password. Until
-- syncd.connect_search has been called it says what to type.

-- The commands that connect searches, for a hint.
CREATE FUNCTION syncd.how_to_connect_search() RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog
AS $function$
    SELECT CASE WHEN EXISTS (SELECT FROM pg_extension WHERE extname = 'dblink') THEN ''
                ELSE 'as a superuser: CREATE EXTENSION dblink; ' END
        || CASE WHEN EXISTS (SELECT FROM pg_foreign_data_wrapper AS w
                             WHERE w.fdwname = 'dblink_fdw'
                               AND has_foreign_data_wrapper_privilege(owner, w.oid, 'USAGE'))
                THEN ''
                ELSE 'as a superuser: GRANT USAGE ON FOREIGN DATA WRAPPER dblink_fdw TO '
                     || quote_ident(owner) || '; ' END
        || format('as %I: SELECT syncd.connect_search(''host=HOST port=PORT password=TOKEN''); '
                  'HOST and PORT are those of SYNCD_SQL_LISTEN, TOKEN is SYNCD_TOKEN', owner)
    FROM (SELECT pg_get_userbyid(nspowner) AS owner FROM pg_namespace
          WHERE nspname = 'syncd') AS o
$function$;

-- One search: "by" says what "query" is. Replaced by syncd.connect_search, with the same head.
-- Its rows and its cost are such that the planner looks the few keys up by their index.
CREATE FUNCTION syncd.ask(dataset text, by text, query text, k integer, filter jsonb, recall real,
                          max_distance double precision, fresh boolean)
RETURNS TABLE (key text, distance double precision)
LANGUAGE plpgsql STABLE SECURITY DEFINER PARALLEL UNSAFE COST 1000 ROWS 10
SET search_path = pg_catalog, pg_temp
AS $function$
BEGIN
    RAISE EXCEPTION 'this database has no connection to the search service'
        USING ERRCODE = 'object_not_in_prerequisite_state', DETAIL = 'not_ready',
              HINT = syncd.how_to_connect_search();
END
$function$;

-- The functions that users call. They are inlined, so the planner sees syncd.ask.
CREATE FUNCTION syncd.search(dataset text, query text, k integer DEFAULT 10,
                             filter jsonb DEFAULT NULL, recall real DEFAULT NULL,
                             max_distance double precision DEFAULT NULL,
                             fresh boolean DEFAULT false)
RETURNS TABLE (key text, distance double precision)
LANGUAGE sql STABLE PARALLEL UNSAFE COST 1000 ROWS 10
AS $function$
    SELECT a.key, a.distance
    FROM syncd.ask(dataset, 'query', query, k, filter, recall, max_distance, fresh) AS a
$function$;

CREATE FUNCTION syncd.search_key(dataset text, key text, k integer DEFAULT 10,
                                 filter jsonb DEFAULT NULL, recall real DEFAULT NULL,
                                 max_distance double precision DEFAULT NULL,
                                 fresh boolean DEFAULT false,
                                 OUT key text, OUT distance double precision)
RETURNS SETOF record
LANGUAGE sql STABLE PARALLEL UNSAFE COST 1000 ROWS 10
AS $function$
    SELECT a.key, a.distance
    FROM syncd.ask($1, 'key', $2, k, filter, recall, max_distance, fresh) AS a
$function$;

-- Add syncd.search for queries of a type that is an array, or that can be cast to one. Arrays go in
-- PostgreSQL's binary form. Their text would depend on extra_float_digits, and takes half as long
-- again (128 numbers: 7 µs instead of 5).
CREATE FUNCTION syncd.add_search_of(type text) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog
AS $add$
BEGIN
    EXECUTE format($create$
        CREATE OR REPLACE FUNCTION syncd.search(dataset text, query %s, k integer DEFAULT 10,
                                                filter jsonb DEFAULT NULL,
                                                recall real DEFAULT NULL,
                                                max_distance double precision DEFAULT NULL,
                                                fresh boolean DEFAULT false)
        RETURNS TABLE (key text, distance double precision)
        LANGUAGE sql STABLE PARALLEL UNSAFE COST 1000 ROWS 10
        AS $function$
            SELECT a.key, a.distance
            FROM syncd.ask(dataset, 'query_array',
                           pg_catalog.encode(pg_catalog.array_send(query::real[]), 'base64'),
                           k, filter, recall, max_distance, fresh) AS a
        $function$ $create$, type);
END
$add$;
SELECT syncd.add_search_of(element || '[]')
FROM unnest(ARRAY['real', 'double precision', 'numeric', 'smallint', 'integer', 'bigint'])
     AS element;

-- The same for pgvector's types, if they are installed when searches are connected.
CREATE FUNCTION syncd.add_search_of_pgvector() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog
AS $add$
BEGIN
    PERFORM syncd.add_search_of(format('%I.%I', n.nspname, t.typname))
    FROM pg_extension AS e
    JOIN pg_depend AS d ON d.refclassid = 'pg_extension'::regclass AND d.refobjid = e.oid
                       AND d.deptype = 'e' AND d.classid = 'pg_type'::regclass
    JOIN pg_type AS t ON t.oid = d.objid
    JOIN pg_namespace AS n ON n.oid = t.typnamespace
    WHERE e.extname = 'vector' AND t.typname IN ('vector', 'halfvec');
END
$add$;

-- Every function of searches, for GRANT and REVOKE.
CREATE FUNCTION syncd.search_functions() RETURNS SETOF regprocedure
LANGUAGE sql STABLE SET search_path = pg_catalog
AS $function$
    SELECT p.oid::regprocedure FROM pg_proc AS p
    WHERE p.pronamespace = 'syncd'::regnamespace AND p.proname IN ('ask', 'search', 'search_key')
$function$;

-- PostgreSQL lets every role call a new function.
CREATE FUNCTION syncd.close_search() RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog
AS $function$
DECLARE
    function regprocedure;
BEGIN
    FOR function IN SELECT syncd.search_functions() LOOP
        EXECUTE format('REVOKE EXECUTE ON FUNCTION %s FROM PUBLIC', function);
    END LOOP;
END
$function$;
SELECT syncd.close_search();

-- The options of a libpq connection string of the form "host=… port=…".
CREATE FUNCTION syncd.connection_options(conninfo text, OUT name text, OUT value text)
RETURNS SETOF record
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog
AS $function$
DECLARE
    rest text := conninfo;
    found text[];
BEGIN
    LOOP
        found := regexp_match(
            rest, '^\s*(\w+)\s*=\s*(''(?:[^''\\]|\\.)*''|(?:[^\s''\\]|\\.)*)(?=\s|$)(.*)$');
        IF found IS NULL THEN
            EXIT WHEN rest ~ '^\s*$';
            RAISE EXCEPTION 'the connection string is not of the form name=value name=value'
                USING ERRCODE = 'invalid_parameter_value',
                      HINT = 'For example: host=127.0.0.1 port=7433 password=TOKEN; '
                             'a value with spaces is quoted like ''this''.';
        END IF;
        name := found[1];
        value := found[2];
        IF starts_with(value, '''') THEN
            value := substr(value, 2, length(value) - 2);
        END IF;
        value := regexp_replace(value, '\\(.)', '\1', 'g');
        rest := found[3];
        RETURN NEXT;
    END LOOP;
END
$function$;

-- Connect searches to the service, and give roles the rights that a search needs. conninfo names
-- SYNCD_SQL_LISTEN's host and port, and the password. Without roles the caller gets the rights.
--
-- The server and its only user mapping belong to schema syncd's owner, and no other role may use
-- them: a role that may use a server can read its own mapping, and with it the password.
CREATE FUNCTION syncd.connect_search(conninfo text, roles text[] DEFAULT NULL) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog
AS $connect$
DECLARE
    owner CONSTANT text := (SELECT pg_get_userbyid(nspowner) FROM pg_namespace
                            WHERE nspname = 'syncd');
    dblink CONSTANT text := (SELECT quote_ident(n.nspname) FROM pg_extension AS e
                             JOIN pg_namespace AS n ON n.oid = e.extnamespace
                             WHERE e.extname = 'dblink');
    options text;
    secrets text;
    connection text;
    role text;
    function regprocedure;
BEGIN
    IF NOT pg_has_role(current_user, owner, 'USAGE') THEN
        RAISE EXCEPTION 'only the owner of schema syncd connects searches: role %', owner
            USING ERRCODE = 'insufficient_privilege', HINT = format('SET ROLE %I;', owner);
    ELSIF dblink IS NULL
          OR NOT has_foreign_data_wrapper_privilege(owner, 'dblink_fdw', 'USAGE') THEN
        RAISE EXCEPTION 'searches from SQL need the extension dblink, and the right to use it'
            USING ERRCODE = 'object_not_in_prerequisite_state',
                  HINT = syncd.how_to_connect_search();
    END IF;
    SELECT string_agg(format('%I %L', o.name, o.value), ', ')
           FILTER (WHERE o.name NOT IN ('user', 'password')),
           string_agg(format('%I %L', o.name, o.value), ', ')
           FILTER (WHERE o.name IN ('user', 'password'))
    INTO options, secrets
    FROM (SELECT DISTINCT ON (a.name) a.name, a.value
          FROM (SELECT d.name, d.value, d.place
                FROM (VALUES ('connect_timeout', '6', 0), ('dbname', 'syncd', 0),
                             ('user', 'syncd', 0), ('gssencmode', 'disable', 0),
                             -- From PostgreSQL 16 on, dblink does not obey connect_timeout.
                             ('tcp_user_timeout', '6000', 0),
                             ('fallback_application_name', 'syncd.search', 0))
                     AS d (name, value, place)
                UNION ALL
                SELECT c.name, c.value, c.place
                FROM syncd.connection_options(conninfo) WITH ORDINALITY AS c (name, value, place))
               AS a
          ORDER BY a.name, a.place DESC) AS o;
    IF secrets NOT LIKE '%password %' THEN
        RAISE EXCEPTION 'the connection string has no password'
            USING ERRCODE = 'invalid_parameter_value', HINT = 'Add password=TOKEN: SYNCD_TOKEN.';
    END IF;
    IF EXISTS (SELECT FROM pg_foreign_server WHERE srvname = 'syncd_search') THEN
        DROP SERVER syncd_search CASCADE;
    END IF;
    EXECUTE format('CREATE SERVER syncd_search FOREIGN DATA WRAPPER dblink_fdw OPTIONS (%s)',
                   options);
    IF current_user <> owner THEN
        EXECUTE format('ALTER SERVER syncd_search OWNER TO %I', owner);
    END IF;
    EXECUTE format('CREATE USER MAPPING FOR %I SERVER syncd_search OPTIONS (%s)', owner, secrets);

    -- A new name, so that no session goes on with a connection to the previous service.
    connection := format('syncd_search_%s',
                         (SELECT oid FROM pg_foreign_server WHERE srvname = 'syncd_search'));
    EXECUTE replace(replace(syncd.text_of_ask(), '{dblink}', dblink), '{connection}', connection);
    PERFORM syncd.add_search_of_pgvector();
    PERFORM syncd.close_search();
    FOREACH role IN ARRAY coalesce(roles, ARRAY[current_user::text]) LOOP
        EXECUTE format('GRANT USAGE ON SCHEMA syncd TO %I', role);
        FOR function IN SELECT syncd.search_functions() LOOP
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO %I', function, role);
        END LOOP;
    END LOOP;
END
$connect$;
REVOKE EXECUTE ON FUNCTION syncd.connect_search(text, text[]) FROM PUBLIC;

-- The definition of syncd.ask once searches are connected. It names dblink's schema.
--
-- From PostgreSQL 17 on, dblink_get_result can be cancelled. So if the statement's time is limited,
-- it waits: the session sleeps until the answer comes, and statement_timeout ends the wait for a
-- service that is frozen. (dblink() itself would not end: after a cancellation it waits for the
-- answer once more.) Measured with a join and 128 dimensions, one client and busy cores: 0.34 ms a
-- search instead of 0.44, and 0.15 ms of the session's processor time instead of 0.24.
--
-- Otherwise syncd.ask sends the statement and looks whether the answer has come. A sleep
-- between two looks takes 1 ms at least, and most answers come sooner, so it first looks without
-- sleeping.
-- With busy cores that would take the cores from the service: after a look in vain the session's
-- next searches, up to 16, sleep at once (measured with 8 clients and 2 cores: 3,150 searches a
-- second; 1,200 if each looks without sleeping; with one client 0.55 ms a search instead of 1.25).
--
-- A statement that is cancelled takes its connection with it: that cancels the search, and a cancel
-- request to a frozen service would wait as well. If the service does not answer in time, the
-- connection is kept: before PostgreSQL 16 a new one would take seconds to fail, and from then on
-- nothing but statement_timeout would end the attempt. The next search first waits for that answer.
--
-- A statement with a search has no parallel workers: it sets a setting and handles errors, which
-- PostgreSQL does not do beside them.
CREATE FUNCTION syncd.text_of_ask() RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog
AS $text$ SELECT $definition$
CREATE OR REPLACE FUNCTION syncd.ask(dataset text, by text, query text, k integer, filter jsonb,
                                     recall real, max_distance double precision, fresh boolean)
RETURNS TABLE (key text, distance double precision)
LANGUAGE plpgsql STABLE SECURITY DEFINER PARALLEL UNSAFE COST 1000 ROWS 10
SET search_path = pg_catalog, pg_temp
SET client_min_messages = 'error'
AS $function$
DECLARE
    most_ms CONSTANT integer := 5000;  -- the service answers by then, if it can
    grace_ms CONSTANT integer := 1000;
    -- What is left out need not be read by the service.
    statement CONSTANT text := concat(
        format('SELECT key, distance FROM %s(dataset => %L, %s => %L, k => %L',
               CASE WHEN by = 'key' THEN 'search_key' ELSE 'search' END, dataset,
               CASE WHEN by IN ('key', 'query_array') THEN by ELSE 'query' END, query, k),
        ', filter => ' || quote_literal(filter), ', recall => ' || quote_literal(recall),
        ', max_distance => ' || quote_literal(max_distance),
        CASE WHEN fresh THEN ', fresh => true' END, ', timeout_ms => ', most_ms, ')');
    dblink_waits CONSTANT boolean := current_setting('server_version_num')::integer >= 170000
        AND current_setting('statement_timeout')::interval
            BETWEEN interval '1 ms' AND interval '1 min';
    is_new boolean;
    is_sent boolean;
    has_given_up boolean := false;
    since timestamptz;
    waited double precision;  -- seconds
    pace integer;  -- 100 times how many searches do not look without sleeping, plus how many still
    detail text;
BEGIN
    IF query IS NULL THEN
        RETURN;  -- nothing is near it
    END IF;
    FOR attempt IN 1..2 LOOP
        BEGIN
            is_new := '{connection}' = ANY ({dblink}.dblink_get_connections()) IS NOT TRUE;
            IF is_new THEN
                -- Connections to services that syncd.connect_search named before.
                PERFORM {dblink}.dblink_disconnect(c)
                FROM unnest({dblink}.dblink_get_connections()) AS c
                WHERE starts_with(c, 'syncd_search_');
                PERFORM {dblink}.dblink_connect('{connection}'::text, 'syncd_search'::text);
            END IF;
            since := clock_timestamp();
            is_sent := {dblink}.dblink_send_query('{connection}'::text, statement) = 1;
            IF NOT dblink_waits THEN
                pace := coalesce(nullif(current_setting('syncd.pace', true), ''), '0')::integer;
                IF pace % 100 > 0 THEN
                    PERFORM set_config('syncd.pace', (pace - 1)::text, false);
                ELSIF {dblink}.dblink_is_busy('{connection}'::text) = 1 THEN
                    WHILE {dblink}.dblink_is_busy('{connection}'::text) = 1
                          AND clock_timestamp() - since < interval '1 ms' LOOP
                    END LOOP;
                    IF {dblink}.dblink_is_busy('{connection}'::text) = 1 THEN
                        pace := least(greatest(pace / 100 * 2, 1), 16);
                        PERFORM set_config('syncd.pace', (pace * 101)::text, false);
                    ELSIF pace > 0 THEN
                        PERFORM set_config('syncd.pace', '0', false);
                    END IF;
                END IF;
            END IF;
            LOOP
                WHILE NOT dblink_waits
                      AND {dblink}.dblink_is_busy('{connection}'::text) = 1 LOOP
                    waited := extract(epoch FROM clock_timestamp() - since);
                    IF waited * 1000 > most_ms + grace_ms THEN
                        has_given_up := true;
                        RAISE EXCEPTION 'the search service has not answered for % s',
                                        (most_ms + grace_ms) / 1000
                            USING ERRCODE = 'lock_not_available', DETAIL = 'timeout',
                                  HINT = 'See: syncd status; and: syncd check';
                    END IF;
                    PERFORM pg_sleep(least(waited / 4 + 0.0001, 0.02));
                END LOOP;
                EXIT WHEN is_sent;
                -- The answer of a statement that has not waited for it.
                PERFORM FROM {dblink}.dblink_get_result('{connection}'::text, false)
                             AS r (key text, distance double precision);
                PERFORM FROM {dblink}.dblink_get_result('{connection}'::text, false)
                             AS r (key text, distance double precision);
                is_sent := {dblink}.dblink_send_query('{connection}'::text, statement) = 1;
                IF NOT is_sent THEN
                    RAISE EXCEPTION 'the connection to the search service is lost'
                        USING ERRCODE = 'connection_failure';
                END IF;
            END LOOP;
            RETURN QUERY SELECT r.key, r.distance
                         FROM {dblink}.dblink_get_result('{connection}'::text)
                              AS r (key text, distance double precision);
            -- Until it says that there are no more, the connection takes no statement.
            PERFORM FROM {dblink}.dblink_get_result('{connection}'::text)
                         AS r (key text, distance double precision);
            RETURN;
        EXCEPTION
            WHEN query_canceled THEN
                PERFORM {dblink}.dblink_disconnect('{connection}'::text)
                FROM unnest({dblink}.dblink_get_connections()) AS c WHERE c = '{connection}';
                RAISE;
            WHEN sqlclient_unable_to_establish_sqlconnection THEN
                GET STACKED DIAGNOSTICS detail = PG_EXCEPTION_DETAIL;
                RAISE EXCEPTION 'the search service cannot be reached: %',
                                coalesce(nullif(detail, ''), SQLERRM)
                    USING ERRCODE = 'sqlclient_unable_to_establish_sqlconnection',
                          DETAIL = 'service_unavailable',
                          HINT = 'Start it: SYNCD_SQL_LISTEN=HOST:PORT syncd serve; if its address '
                                 'or its password is another one, call syncd.connect_search again.';
            WHEN undefined_function OR invalid_schema_name THEN
                RAISE EXCEPTION 'the extension dblink is gone, or is in another schema'
                    USING ERRCODE = 'object_not_in_prerequisite_state', DETAIL = 'not_ready',
                          HINT = syncd.how_to_connect_search();
            WHEN OTHERS THEN
                GET STACKED DIAGNOSTICS detail = PG_EXCEPTION_DETAIL;
                IF has_given_up THEN
                    RAISE;
                ELSIF '{connection}' = ANY ({dblink}.dblink_get_connections()) IS NOT TRUE THEN
                    RAISE EXCEPTION 'the connection to the search service is not complete: %',
                                    SQLERRM
                        USING ERRCODE = 'object_not_in_prerequisite_state', DETAIL = 'not_ready',
                              HINT = syncd.how_to_connect_search();
                ELSIF SQLSTATE LIKE '08%' OR SQLSTATE IN ('57P01', '57P03')
                      OR SQLSTATE = 'XX000' AND detail = '' THEN
                    -- The connection is lost; dblink's own errors of sending are XX000.
                    PERFORM {dblink}.dblink_disconnect('{connection}'::text);
                    IF is_new OR attempt = 2 THEN
                        RAISE;
                    END IF;
                ELSE
                    IF {dblink}.dblink_is_busy('{connection}'::text) = 0 THEN
                        PERFORM FROM {dblink}.dblink_get_result('{connection}'::text, false)
                                     AS r (key text, distance double precision);
                    END IF;
                    RAISE;
                END IF;
        END;
    END LOOP;
END
$function$ $definition$ $text$;
