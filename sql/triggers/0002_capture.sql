-- Capture that no other session can stop: it handles a locked or damaged outbox, a table that is
-- not the source, and keys with times.
--
-- A trigger takes the outbox's lock without waiting. If it cannot get the lock, it waits for a
-- moment and leaves a marker. If that fails too, it advances the sequence syncd.doubts, which needs
-- no lock on the outbox. Each consumer that sees another value compares its sources with their
-- tables, and again after each transaction that advanced it has ended.

-- Advanced by writers that could not write to the outbox. nextval is visible at once, before the
-- writer commits. Its lock on the sequence lasts until the writer's transaction has ended, so
-- pg_locks shows the open writers. A writer takes its transaction id first, so that pg_locks shows
-- the id as well.
CREATE SEQUENCE syncd.doubts MINVALUE 0 START 0 CACHE 1;
SELECT setval('syncd.doubts', 0);

-- SQL text of a row's key in the outbox's form: the text of a single column, a JSON array for
-- several.
CREATE FUNCTION syncd.capture_key(key text[], types text[], alias text) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog
AS $function$
    SELECT CASE WHEN cardinality(key) = 1
                THEN syncd.key_element(types[1], format('%s.%I', alias, key[1]))
                     || '::pg_catalog.text'
                ELSE format('pg_catalog.json_build_array(%s)::pg_catalog.text',
                            (SELECT string_agg(
                                 syncd.key_element(k.type, format('%s.%I', alias, k.name)),
                                 ', ' ORDER BY k.place)
                             FROM unnest(key, types) WITH ORDINALITY AS k (name, type, place)))
           END
$function$;
DROP FUNCTION syncd.capture_key(text[], text);

-- Time in ms that a writer waits for a lock on syncd's tables: at most 20, and at most a quarter of
-- the time that its own time-outs leave.
CREATE FUNCTION syncd.moment() RETURNS text
LANGUAGE sql VOLATILE SET search_path = pg_catalog
AS $function$
    SELECT greatest(
        1, least(20, round(min(extract(epoch FROM t.allowed::interval - t.spent)) * 250)))::text
    FROM (VALUES (current_setting('statement_timeout'), clock_timestamp() - statement_timestamp()),
                 (current_setting('transaction_timeout', true),
                  clock_timestamp() - transaction_timestamp()),
                 ('80ms', interval '0')) AS t (allowed, spent)
    WHERE t.allowed <> '0'
$function$;

-- Whether a table is a source's own, or a partition of it. A trigger asks if it fires on another
-- table than it was created for: a table restored from a dump has its triggers, and so has a
-- detached partition. A transaction that is older than the attachment does not see its row: then
-- the answer is yes, so that no change is lost. The answer is also yes if another session keeps
-- syncd.attachments locked: a superfluous key is harmless. It is in plpgsql, which keeps the plan:
-- planning would cost ten times as much as the rest of a trigger.
CREATE FUNCTION syncd.is_source_of(source_id integer, relation oid) RETURNS boolean
LANGUAGE plpgsql VOLATILE SET search_path = pg_catalog, syncd SET lock_timeout = '20ms'
AS $function$
BEGIN
    PERFORM set_config('lock_timeout', syncd.moment(), true);
    RETURN NOT EXISTS (SELECT FROM syncd.attachments AS a
                       WHERE a.id = source_id AND a.source <> relation
                         AND a.source NOT IN (
                             SELECT p.relid FROM pg_partition_ancestors(relation) AS p (relid)));
EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
    RETURN true;
END
$function$;

-- Create or replace the trigger functions of one source. register calls it with the rights of
-- syncd's owner, who then owns them. The triggers themselves are created by attach's caller, who
-- must own the table.
CREATE OR REPLACE FUNCTION syncd.make_capture(source_id integer, key text[]) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, syncd
AS $function$
DECLARE
    source oid;
    types text[];
    event text;
    changed_rows text;
    probes text;
    inserts text;
BEGIN
    SELECT a.source, a.key_types INTO STRICT source, types FROM syncd.attachments AS a
    WHERE a.id = source_id;
    FOREACH event IN ARRAY ARRAY['insert', 'update', 'delete', 'truncate'] LOOP
        changed_rows := CASE event
            WHEN 'insert' THEN format('SELECT %s FROM syncd_new AS syncd_n',
                                      syncd.capture_key(key, types, 'syncd_n'))
            WHEN 'delete' THEN format('SELECT %s FROM syncd_old AS syncd_o',
                                      syncd.capture_key(key, types, 'syncd_o'))
            -- UNION on text: one outbox row for an update that keeps its key, two for one that
            -- changes it.
            WHEN 'update' THEN format('SELECT %s COLLATE pg_catalog."C" FROM syncd_old AS syncd_o '
                                      'UNION '
                                      'SELECT %s COLLATE pg_catalog."C" FROM syncd_new AS syncd_n',
                                      syncd.capture_key(key, types, 'syncd_o'),
                                      syncd.capture_key(key, types, 'syncd_n'))
            ELSE 'SELECT NULL::pg_catalog.text'
        END;
        -- Into the current slot's own table: routing to the partition would cost a third more. No
        -- other slot's table is used: even a weak lock on it would keep it from being freed.
        SELECT string_agg(
            format('%3$s syncd_slot OPERATOR(pg_catalog.=) %1$s THEN '
                   'LOCK TABLE syncd.outbox_%1$s IN ROW EXCLUSIVE MODE NOWAIT; '
                   'PERFORM syncd_k.syncd_key FROM (%2$s) AS syncd_k (syncd_key) LIMIT 0;',
                   slot, changed_rows, CASE slot WHEN 0 THEN 'IF' ELSE 'ELSIF' END),
            E'\n                    ' ORDER BY slot)
        INTO probes FROM generate_series(0, 2) AS slot;
        SELECT string_agg(
            format('%5$s syncd_slot OPERATOR(pg_catalog.=) %1$s THEN '
                   'INSERT INTO syncd.outbox_%1$s (slot, source, op, key) '
                   'SELECT %1$s, %2$s, %3$L, syncd_k.syncd_key FROM (%4$s) AS syncd_k (syncd_key);',
                   slot, source_id, CASE event WHEN 'truncate' THEN 't' ELSE 'k' END, changed_rows,
                   CASE slot WHEN 0 THEN 'IF' ELSE 'ELSIF' END),
            E'\n                ' ORDER BY slot)
        INTO inserts FROM generate_series(0, 2) AS slot;
        -- The steps that can fail come first, in a block that does not write: a block that writes
        -- takes its own transaction id, and would cost as much as the outbox row. Setting
        -- search_path would cost a third of that, so names and operators have their schema.
        EXECUTE format($template$
            CREATE OR REPLACE FUNCTION syncd.%1$I() RETURNS trigger
            LANGUAGE plpgsql SECURITY DEFINER
            AS $capture$
            #variable_conflict use_column
            DECLARE
                syncd_slot pg_catalog.int8;
            BEGIN
                BEGIN
                    IF TG_RELID OPERATOR(pg_catalog.<>) %5$s::pg_catalog.oid
                       AND NOT syncd.is_source_of(%3$s, TG_RELID) THEN
                        RETURN NULL;
                    END IF;
                    syncd_slot := pg_catalog.pg_sequence_last_value(
                        'syncd.outbox_slot'::pg_catalog.regclass);
                    %2$s
                    END IF;
                EXCEPTION WHEN OTHERS THEN
                    -- A key column was renamed, or the outbox is locked: the write continues, and
                    -- the source is read again.
                    PERFORM syncd.note_resync(%3$s, TG_RELID);
                    RETURN NULL;
                END;
                %4$s
                END IF;
                -- As in syncd.wake(); a call would cost as much as the function's own work.
                IF FOUND AND pg_catalog.pg_try_advisory_xact_lock(8317708086) THEN
                    BEGIN
                        PERFORM pg_catalog.pg_notify('syncd', '')
                        FROM syncd.notify_mode AS syncd_m
                        WHERE (syncd_m.last_value OPERATOR(pg_catalog.=) 2
                               OR syncd_m.last_value OPERATOR(pg_catalog.=) 1
                              AND pg_catalog.current_setting('max_prepared_transactions')
                                  OPERATOR(pg_catalog.=) '0'::pg_catalog.text)
                          AND pg_catalog.pg_notification_queue_usage()
                              OPERATOR(pg_catalog.<) 0.5::pg_catalog.float8;
                    EXCEPTION WHEN OTHERS THEN
                        RETURN NULL;  -- no wake-up: the consumer looks after its poll interval
                    END;
                END IF;
                RETURN NULL;
            END
            $capture$
            $template$,
            format('capture_%s_%s', source_id, event), probes, source_id, inserts, source);
    END LOOP;
    PERFORM syncd.make_row_capture(source_id, key);
END
$function$;

-- The same for row triggers: one function for rows, and one for the truncation of a partition.
CREATE OR REPLACE FUNCTION syncd.make_row_capture(source_id integer, key text[]) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, syncd
AS $function$
DECLARE
    source oid;
    types text[];
    probes text;
    inserts text;
BEGIN
    SELECT a.source, a.key_types INTO STRICT source, types FROM syncd.attachments AS a
    WHERE a.id = source_id;
    SELECT string_agg(format('%3$s syncd_slot OPERATOR(pg_catalog.=) %1$s THEN '
                             'INSERT INTO syncd.outbox_%1$s (slot, source, op, key) '
                             'VALUES (%1$s, %2$s, ''k'', syncd_key); '
                             'IF syncd_key_before IS NOT NULL THEN '
                             'INSERT INTO syncd.outbox_%1$s (slot, source, op, key) '
                             'VALUES (%1$s, %2$s, ''k'', syncd_key_before); END IF;',
                             slot, source_id, CASE slot WHEN 0 THEN 'IF' ELSE 'ELSIF' END),
                      E'\n                ' ORDER BY slot)
    INTO inserts FROM generate_series(0, 2) AS slot;
    SELECT string_agg(
        format('%2$s syncd_slot OPERATOR(pg_catalog.=) %1$s THEN '
               'LOCK TABLE syncd.outbox_%1$s IN ROW EXCLUSIVE MODE NOWAIT;',
               slot, CASE slot WHEN 0 THEN 'IF' ELSE 'ELSIF' END),
        E'\n                    ' ORDER BY slot)
    INTO probes FROM generate_series(0, 2) AS slot;
    -- As the statement form, but per row. So three steps run once per transaction: the try for the
    -- guard until it is won, the slot's lock (a quarter of the cost), the check of a partition.
    -- Local settings remember them. A rollback to a savepoint,
    -- or the transaction's end, undoes the notification or the lock that keeps the outbox from
    -- being dropped; it undoes the setting too.
    EXECUTE format($template$
        CREATE OR REPLACE FUNCTION syncd.%1$I() RETURNS trigger
        LANGUAGE plpgsql SECURITY DEFINER
        AS $capture$
        #variable_conflict use_variable
        DECLARE
            syncd_slot pg_catalog.int8;
            syncd_probed pg_catalog.text;  -- the locked slot, and tables known to be the source's
            syncd_key pg_catalog.text COLLATE pg_catalog."C";
            syncd_key_before pg_catalog.text COLLATE pg_catalog."C";
        BEGIN
            BEGIN
                syncd_slot := pg_catalog.pg_sequence_last_value(
                    'syncd.outbox_slot'::pg_catalog.regclass);
                IF TG_OP OPERATOR(pg_catalog.=) 'DELETE'::pg_catalog.text THEN
                    syncd_key := %2$s;
                ELSE
                    syncd_key := %3$s;
                    IF TG_OP OPERATOR(pg_catalog.=) 'UPDATE'::pg_catalog.text THEN
                        syncd_key_before := %2$s;
                        IF syncd_key_before OPERATOR(pg_catalog.=) syncd_key THEN
                            syncd_key_before := NULL;
                        END IF;
                    END IF;
                END IF;
                syncd_probed := COALESCE(pg_catalog.current_setting('syncd.probed_%4$s', true), '');
                IF pg_catalog.strpos(syncd_probed, pg_catalog.concat(syncd_slot, ' '))
                       OPERATOR(pg_catalog.<>) 1
                   OR pg_catalog.strpos(syncd_probed, pg_catalog.concat(' ', TG_RELID, ' '))
                       OPERATOR(pg_catalog.=) 0 THEN
                    IF TG_RELID OPERATOR(pg_catalog.=) %7$s::pg_catalog.oid
                       OR pg_catalog.pg_partition_root(TG_RELID)
                           OPERATOR(pg_catalog.=) %7$s::pg_catalog.oid THEN
                        NULL;  -- the usual case, without a query
                    ELSIF NOT syncd.is_source_of(%4$s, TG_RELID) THEN
                        RETURN NULL;
                    END IF;
                    %6$s
                    END IF;
                    IF pg_catalog.strpos(syncd_probed, pg_catalog.concat(syncd_slot, ' '))
                           OPERATOR(pg_catalog.<>) 1
                       OR pg_catalog.length(syncd_probed) OPERATOR(pg_catalog.>) 500 THEN
                        syncd_probed := pg_catalog.concat(syncd_slot, ' ');
                    END IF;
                    PERFORM pg_catalog.set_config('syncd.probed_%4$s',
                                                  pg_catalog.concat(syncd_probed, TG_RELID, ' '),
                                                  true);
                END IF;
            EXCEPTION WHEN OTHERS THEN
                PERFORM syncd.note_resync(%4$s, TG_RELID);
                RETURN NULL;
            END;
            %5$s
            END IF;
            IF COALESCE(pg_catalog.current_setting('syncd.woken', true), '')
                   OPERATOR(pg_catalog.<>) 'yes'::pg_catalog.text
               AND pg_catalog.pg_try_advisory_xact_lock(8317708086) THEN
                BEGIN
                    PERFORM pg_catalog.set_config('syncd.woken', 'yes', true);
                    PERFORM pg_catalog.pg_notify('syncd', '')
                    FROM syncd.notify_mode AS syncd_m
                    WHERE (syncd_m.last_value OPERATOR(pg_catalog.=) 2
                           OR syncd_m.last_value OPERATOR(pg_catalog.=) 1
                          AND pg_catalog.current_setting('max_prepared_transactions')
                              OPERATOR(pg_catalog.=) '0'::pg_catalog.text)
                      AND pg_catalog.pg_notification_queue_usage()
                          OPERATOR(pg_catalog.<) 0.5::pg_catalog.float8;
                EXCEPTION WHEN OTHERS THEN
                    RETURN NULL;
                END;
            END IF;
            RETURN NULL;
        END
        $capture$
        $template$,
        format('capture_%s_row', source_id), syncd.capture_key(key, types, 'OLD'),
        syncd.capture_key(key, types, 'NEW'), source_id, inserts, probes, source);
    -- Other partitions keep their rows, so the source is read again. TRUNCATE of the root fires
    -- this for each leaf, after the root's own trigger.
    EXECUTE format($template$
        CREATE OR REPLACE FUNCTION syncd.%I() RETURNS trigger
        LANGUAGE plpgsql SECURITY DEFINER
        AS $capture$
        BEGIN
            PERFORM syncd.note_resync(%s, TG_RELID);
            RETURN NULL;
        END
        $capture$
        $template$,
        format('capture_%s_leaf', source_id), source_id);
END
$function$;

-- Whether a source's trigger functions write keys of these types correctly: if the type of a key
-- column has changed, attach may have to create them again.
CREATE FUNCTION syncd.writes_keys_as(source_id integer, types text[]) RETURNS boolean
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, syncd
AS $function$
    SELECT syncd.capture_key(a.key, a.key_types, 'r') = syncd.capture_key(a.key, types, 'r')
    FROM syncd.attachments AS a WHERE a.id = source_id
$function$;

-- Request that the source is read again: a trigger calls it if it cannot record the changed keys.
-- It does nothing if this transaction has requested it before or has truncated the source. If it
-- cannot write to the outbox, it records a doubt, which needs no lock. It runs with the rights of
-- syncd's owner, sets its own search path, and fails no write.
CREATE OR REPLACE FUNCTION syncd.note_resync(source_id integer, relation oid) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, syncd SET lock_timeout = '20ms'
AS $function$
DECLARE
    current_slot bigint;
    noted boolean;
    state text;
    cause text;
BEGIN
    IF coalesce(current_setting('syncd.doubted', true), '') = 'yes' THEN
        RETURN;  -- all rows are compared after the end of this transaction
    END IF;
    BEGIN
        PERFORM set_config('lock_timeout', syncd.moment(), true);
        IF NOT syncd.is_source_of(source_id, relation) THEN
            RETURN;
        END IF;
        current_slot := pg_sequence_last_value('syncd.outbox_slot'::regclass);
        EXECUTE format('LOCK TABLE syncd.%I IN ROW EXCLUSIVE MODE', 'outbox_' || current_slot);
        -- Only in the current slot; a second marker after a switch is harmless.
        EXECUTE format(
            'SELECT EXISTS (SELECT FROM syncd.%I AS o '
            '               WHERE o.xid = pg_current_xact_id() AND o.op <> ''k'' '
            '               AND o.op IN (''r'', ''t'') AND o.source = $1)',
            'outbox_' || current_slot) INTO noted USING source_id;
        IF noted THEN
            RETURN;
        END IF;
        EXECUTE format('INSERT INTO syncd.%I (slot, source, op) VALUES ($1, $2, ''r'')',
                       'outbox_' || current_slot) USING current_slot, source_id;
    EXCEPTION WHEN OTHERS THEN
        state := SQLSTATE;
        cause := SQLERRM;
    END;
    IF state IS NOT NULL THEN
        BEGIN
            PERFORM pg_current_xact_id();
            PERFORM nextval('syncd.doubts');
            PERFORM set_config('syncd.doubted', 'yes', true);
        EXCEPTION WHEN OTHERS THEN
            state := SQLSTATE;
            cause := SQLERRM;
        END;
    END IF;
    IF state NOT IN ('55P03', '40P01')
       OR state IS NOT NULL AND coalesce(current_setting('syncd.doubted', true), '') <> 'yes' THEN
        -- Once per transaction.
        IF coalesce(current_setting('syncd.warned', true), '') <> 'yes' THEN
            PERFORM set_config('syncd.warned', 'yes', true);
            RAISE WARNING 'syncd could not note a change of %: %', relation::regclass, cause
                USING HINT = 'The schema syncd is damaged: '
                             'run syncd uninstall and syncd init, then attach again.';
        END IF;
    END IF;
    BEGIN
        PERFORM syncd.wake();
    EXCEPTION WHEN OTHERS THEN
        RETURN;
    END;
END
$function$;

-- Write a marker to the outbox, in the same way as keys: it is seen in the order of commits and
-- wakes the consumer. attach and detach call it while they hold a lock on the source, so it does
-- not wait for long either.
CREATE OR REPLACE FUNCTION syncd.mark(source_id integer, op "char") RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, syncd SET lock_timeout = '2s'
AS $function$
BEGIN
    BEGIN
        INSERT INTO syncd.outbox (slot, source, op)
        SELECT s.last_value, source_id, mark.op FROM syncd.outbox_slot AS s;
    EXCEPTION WHEN lock_not_available THEN
        IF mark.op <> 'r' THEN
            RAISE EXCEPTION 'table syncd.outbox is locked by another transaction'
                USING ERRCODE = 'lock_not_available',
                HINT = 'Find it with: SELECT pid, query FROM pg_stat_activity WHERE pid IN '
                       '(SELECT pid FROM pg_locks WHERE relation::regclass::text '
                       'LIKE ''syncd.outbox%''), and try again when it has ended.';
        END IF;
        PERFORM pg_current_xact_id();
        PERFORM nextval('syncd.doubts');
    END;
    PERFORM syncd.wake();
END
$function$;

-- Whether writes to a table can bypass its statement triggers, so that it needs row triggers. It
-- can if the table is partitioned or inherits, if a subscription writes to it, or if attach was
-- told so. An apply worker of pglogical and similar tools fires row triggers only, and no catalogue
-- here lists the tables that the provider sends: with such a subscription it may be any table. If
-- the role may not see subscriptions, the answer is yes: row triggers are correct for each table,
-- only slower.
CREATE OR REPLACE FUNCTION syncd.fires_per_row(source regclass) RETURNS boolean
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog
AS $function$
DECLARE
    tool name;
    subscribed boolean;
BEGIN
    IF EXISTS (SELECT FROM pg_class AS c WHERE c.oid = source AND c.relkind = 'p')
       OR EXISTS (SELECT FROM pg_inherits AS i WHERE i.inhrelid = source)
       OR EXISTS (SELECT FROM syncd.attachments AS a
                  WHERE a.source = fires_per_row.source
                    AND (a.arguments ->> 'row_triggers')::boolean)
       OR EXISTS (SELECT FROM pg_subscription_rel AS s WHERE s.srrelid = source) THEN
        RETURN true;
    END IF;
    FOR tool IN SELECT e.extname FROM pg_extension AS e
        WHERE e.extname IN ('pglogical', 'spock', 'bdr') LOOP
        EXECUTE format('SELECT EXISTS (SELECT FROM %I.subscription)', tool) INTO subscribed;
        IF subscribed THEN
            RETURN true;
        END IF;
    END LOOP;
    RETURN false;
EXCEPTION WHEN insufficient_privilege OR undefined_table OR invalid_schema_name THEN
    RETURN true;
END
$function$;

-- Create the functions of the attached sources again. Their triggers call them by name and stay.
SELECT syncd.make_capture(a.id, a.key) FROM syncd.attachments AS a;
