-- Capture: triggers that write the keys of changed rows to the outbox, and nothing else.
--
-- A table has statement triggers where they see every write, one for each event: they cost a bulk write 2 µs a row. Where they do not, it has
-- one row trigger, which costs 7 µs, and one for truncation: on a partitioned table (a write to a partition fires no statement trigger of its root, and
-- partitions take no transition tables), on a table that inherits (a write to its parent fires none of its own), and on one that a
-- logical-replication subscription fills (its apply fires none at all).
--
-- Each source has functions of its own, generated from its column names. They evaluate no expression of the user's and compare no
-- values. They belong to the owner of schema syncd and run with that owner's rights, so a role that may write only its own table can
-- go on writing it. A renamed key column becomes a marker that has the source read again, a dropped outbox a WARNING: they fail no write.

-- SQL that lists a row's key as the outbox holds it: the text of a single column, a JSON array for several.
CREATE FUNCTION syncd.capture_key(key text[], alias text) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog
AS $function$
    SELECT CASE WHEN cardinality(key) = 1 THEN format('%s.%I::pg_catalog.text', alias, key[1])
                ELSE format('pg_catalog.json_build_array(%s)::pg_catalog.text',
                            (SELECT string_agg(format('%s.%I', alias, name), ', ' ORDER BY place)
                             FROM unnest(key) WITH ORDINALITY AS k (name, place)))
           END
$function$;

-- One element of each of several composite keys, as capture_key writes them. Immutable, so that the planner knows the values.
CREATE FUNCTION syncd.key_elements(keys json[], place integer) RETURNS text[]
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog
AS $function$ SELECT array_agg(k.key ->> place) FROM unnest(keys) AS k (key) $function$;

-- Wake the consumer: only the transaction that wins the guard notifies, since NOTIFY serialises every commit in the database.
-- The numbers are notify_mode's. Called after a write to the outbox, by functions that have pinned the search path. The guard is asked for in
-- a plain expression, which costs a loser nothing; a query would cost it a fifth of the whole trigger.
CREATE FUNCTION syncd.wake() RETURNS void
LANGUAGE plpgsql
AS $function$
BEGIN
    IF pg_try_advisory_xact_lock(8317708086) THEN
        PERFORM pg_notify('syncd', '')
        FROM syncd.notify_mode AS m
        WHERE m.last_value = 2 OR m.last_value = 1 AND current_setting('max_prepared_transactions') = '0';
    END IF;
END
$function$;

-- Make the trigger functions of one source. register calls it with the rights of syncd's owner, to whom they belong then. Creating the
-- triggers themselves is left to attach's caller, who must own the table for that.
CREATE FUNCTION syncd.make_capture(source_id integer, key text[]) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, syncd
AS $function$
DECLARE
    event text;
    changed_rows text;
    probes text;
    inserts text;
BEGIN
    FOREACH event IN ARRAY ARRAY['insert', 'update', 'delete', 'truncate'] LOOP
        changed_rows := CASE event
            WHEN 'insert' THEN format('SELECT %s FROM syncd_new AS syncd_n', syncd.capture_key(key, 'syncd_n'))
            WHEN 'delete' THEN format('SELECT %s FROM syncd_old AS syncd_o', syncd.capture_key(key, 'syncd_o'))
            -- UNION on text: one outbox row for an update that keeps its key, two for one that changes it.
            WHEN 'update' THEN format('SELECT %s COLLATE pg_catalog."C" FROM syncd_old AS syncd_o UNION SELECT %s COLLATE pg_catalog."C" FROM syncd_new AS syncd_n',
                                      syncd.capture_key(key, 'syncd_o'), syncd.capture_key(key, 'syncd_n'))
            ELSE 'SELECT NULL::pg_catalog.text'
        END;
        -- Into the current slot's own table: finding it among the partitions would cost a third as much again. No other slot's table is
        -- touched: a lock on it, however weak, would keep it from being freed.
        SELECT string_agg(format('%3$s syncd_slot OPERATOR(pg_catalog.=) %1$s THEN PERFORM syncd_b.slot, syncd_b.source, syncd_b.op, syncd_b.key, '
                                 'syncd_k.syncd_key FROM syncd.outbox_%1$s AS syncd_b CROSS JOIN (%2$s) AS syncd_k (syncd_key) LIMIT 0;',
                                 slot, changed_rows, CASE slot WHEN 0 THEN 'IF' ELSE 'ELSIF' END), E'\n                    ' ORDER BY slot)
        INTO probes FROM generate_series(0, 2) AS slot;
        SELECT string_agg(format('%5$s syncd_slot OPERATOR(pg_catalog.=) %1$s THEN INSERT INTO syncd.outbox_%1$s (slot, source, op, key) '
                                 'SELECT %1$s, %2$s, %3$L, syncd_k.syncd_key FROM (%4$s) AS syncd_k (syncd_key);',
                                 slot, source_id, CASE event WHEN 'truncate' THEN 't' ELSE 'k' END, changed_rows,
                                 CASE slot WHEN 0 THEN 'IF' ELSE 'ELSIF' END), E'\n                ' ORDER BY slot)
        INTO inserts FROM generate_series(0, 2) AS slot;
        -- What can go wrong is tried first, in a block that writes nothing: a block that writes takes a transaction id of its own, and
        -- would cost as much as the outbox row. Setting search_path would cost a third of that, so names and operators have their schema.
        EXECUTE format($template$
            CREATE FUNCTION syncd.%I() RETURNS trigger
            LANGUAGE plpgsql SECURITY DEFINER
            AS $capture$
            #variable_conflict use_column
            DECLARE
                syncd_slot pg_catalog.int8;
            BEGIN
                BEGIN
                    syncd_slot := pg_catalog.pg_sequence_last_value('syncd.outbox_slot'::pg_catalog.regclass);
                    %s
                    END IF;
                EXCEPTION WHEN OTHERS THEN
                    -- A key column was renamed or dropped: the application goes on, and the source is read again.
                    BEGIN
                        INSERT INTO syncd.outbox (slot, source, op)
                        SELECT syncd_s.last_value, %s, 'r' FROM syncd.outbox_slot AS syncd_s;
                    EXCEPTION WHEN OTHERS THEN
                        RAISE WARNING 'syncd could not note a change of %%: %%', TG_RELID::pg_catalog.regclass, SQLERRM
                            USING HINT = 'The schema syncd is damaged: run syncd uninstall and syncd init, then attach again.';
                    END;
                    RETURN NULL;
                END;
                %s
                END IF;
                -- As syncd.wake() does; a call would cost as much as what it calls.
                IF FOUND AND pg_catalog.pg_try_advisory_xact_lock(8317708086) THEN
                    BEGIN
                        PERFORM pg_catalog.pg_notify('syncd', '')
                        FROM syncd.notify_mode AS syncd_m
                        WHERE syncd_m.last_value OPERATOR(pg_catalog.=) 2
                           OR syncd_m.last_value OPERATOR(pg_catalog.=) 1
                          AND pg_catalog.current_setting('max_prepared_transactions') OPERATOR(pg_catalog.=) '0'::pg_catalog.text;
                    EXCEPTION WHEN OTHERS THEN
                        RETURN NULL;  -- nobody is woken; the consumer looks by itself within its poll interval
                    END;
                END IF;
                RETURN NULL;
            END
            $capture$
            $template$,
            format('capture_%s_%s', source_id, event), probes, source_id, inserts);
    END LOOP;
    PERFORM syncd.make_row_capture(source_id, key);
END
$function$;

-- The same for the row form: one function for rows, and one for the truncation of a single partition.
CREATE FUNCTION syncd.make_row_capture(source_id integer, key text[]) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, syncd
AS $function$
DECLARE
    probes text;
    inserts text;
BEGIN
    SELECT string_agg(format('%3$s syncd_slot OPERATOR(pg_catalog.=) %1$s THEN '
                             'INSERT INTO syncd.outbox_%1$s (slot, source, op, key) VALUES (%1$s, %2$s, ''k'', syncd_key); '
                             'IF syncd_key_before IS NOT NULL THEN '
                             'INSERT INTO syncd.outbox_%1$s (slot, source, op, key) VALUES (%1$s, %2$s, ''k'', syncd_key_before); END IF;',
                             slot, source_id, CASE slot WHEN 0 THEN 'IF' ELSE 'ELSIF' END), E'\n                ' ORDER BY slot)
    INTO inserts FROM generate_series(0, 2) AS slot;
    SELECT string_agg(format('%2$s syncd_slot OPERATOR(pg_catalog.=) %1$s THEN '
                             'PERFORM syncd_b.slot, syncd_b.source, syncd_b.op, syncd_b.key FROM syncd.outbox_%1$s AS syncd_b LIMIT 0;',
                             slot, CASE slot WHEN 0 THEN 'IF' ELSE 'ELSIF' END), E'\n                    ' ORDER BY slot)
    INTO probes FROM generate_series(0, 2) AS slot;
    -- As the statement form, a row at a time, so what can be done once a transaction is: asking for the guard until it has been won, and trying
    -- the slot, a quarter of the whole. Local settings remember it: what undoes the notification, or lets go of the lock by which nobody can
    -- drop the outbox, undoes the setting too: a rollback to a savepoint, or the transaction's end.
    EXECUTE format($template$
        CREATE FUNCTION syncd.%1$I() RETURNS trigger
        LANGUAGE plpgsql SECURITY DEFINER
        AS $capture$
        #variable_conflict use_variable
        DECLARE
            syncd_slot pg_catalog.int8;
            syncd_key pg_catalog.text COLLATE pg_catalog."C";
            syncd_key_before pg_catalog.text COLLATE pg_catalog."C";
        BEGIN
            BEGIN
                syncd_slot := pg_catalog.pg_sequence_last_value('syncd.outbox_slot'::pg_catalog.regclass);
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
                IF COALESCE(pg_catalog.current_setting('syncd.probed', true), '') OPERATOR(pg_catalog.<>) syncd_slot::pg_catalog.text THEN
                    %6$s
                    END IF;
                    PERFORM pg_catalog.set_config('syncd.probed', syncd_slot::pg_catalog.text, true);
                END IF;
            EXCEPTION WHEN OTHERS THEN
                PERFORM syncd.note_resync(%4$s, TG_RELID);
                RETURN NULL;
            END;
            %5$s
            END IF;
            IF COALESCE(pg_catalog.current_setting('syncd.woken', true), '') OPERATOR(pg_catalog.<>) 'yes'::pg_catalog.text
               AND pg_catalog.pg_try_advisory_xact_lock(8317708086) THEN
                BEGIN
                    PERFORM pg_catalog.set_config('syncd.woken', 'yes', true);
                    PERFORM pg_catalog.pg_notify('syncd', '')
                    FROM syncd.notify_mode AS syncd_m
                    WHERE syncd_m.last_value OPERATOR(pg_catalog.=) 2
                       OR syncd_m.last_value OPERATOR(pg_catalog.=) 1
                      AND pg_catalog.current_setting('max_prepared_transactions') OPERATOR(pg_catalog.=) '0'::pg_catalog.text;
                EXCEPTION WHEN OTHERS THEN
                    RETURN NULL;
                END;
            END IF;
            RETURN NULL;
        END
        $capture$
        $template$,
        format('capture_%s_row', source_id), syncd.capture_key(key, 'OLD'), syncd.capture_key(key, 'NEW'), source_id, inserts, probes);
    -- Other partitions keep their rows, so the source is read again. TRUNCATE of the root fires this for each leaf, after the root's own.
    EXECUTE format($template$
        CREATE FUNCTION syncd.%I() RETURNS trigger
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

-- What a trigger does that cannot say which keys changed: have the source read again, unless this transaction has said so before or has
-- truncated the source. Its caller's rights are those of syncd's owner; it pins the search path itself and fails no write.
CREATE FUNCTION syncd.note_resync(source_id integer, relation oid) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, syncd
AS $function$
DECLARE
    current_slot bigint;
    noted boolean;
BEGIN
    BEGIN
        current_slot := pg_sequence_last_value('syncd.outbox_slot'::regclass);
        -- Only in the current slot, of which the insert takes a lock as well; once more after a switch does no harm.
        EXECUTE format('SELECT EXISTS (SELECT FROM syncd.%I AS o WHERE o.xid = pg_current_xact_id() AND o.op <> ''k'' '
                       '               AND o.op IN (''r'', ''t'') AND o.source = $1)', 'outbox_' || current_slot) INTO noted USING source_id;
        IF noted THEN
            RETURN;
        END IF;
    EXCEPTION WHEN OTHERS THEN
        NULL;  -- the slot was switched and is being freed, and the caller's lock_timeout is short: once more does no harm
    END;
    BEGIN
        INSERT INTO syncd.outbox (slot, source, op) SELECT s.last_value, source_id, 'r' FROM syncd.outbox_slot AS s;
    EXCEPTION WHEN OTHERS THEN
        IF coalesce(current_setting('syncd.warned', true), '') <> 'yes' THEN  -- once a transaction, not once a row
            PERFORM set_config('syncd.warned', 'yes', true);
            RAISE WARNING 'syncd could not note a change of %: %', relation::regclass, SQLERRM
                USING HINT = 'The schema syncd is damaged: run syncd uninstall and syncd init, then attach again.';
        END IF;
        RETURN;
    END;
    BEGIN
        PERFORM syncd.wake();
    EXCEPTION WHEN OTHERS THEN
        RETURN;
    END;
END
$function$;

-- Remove a source's trigger functions. Its triggers are gone by now, but for those on a table that was its partition once and is another's.
CREATE FUNCTION syncd.drop_capture(source_id integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, syncd SET client_min_messages = warning SET lock_timeout = '2s'
AS $function$
DECLARE
    event text;
BEGIN
    FOREACH event IN ARRAY ARRAY['insert', 'update', 'delete', 'truncate', 'row', 'leaf'] LOOP
        EXECUTE format('DROP FUNCTION IF EXISTS syncd.%I() CASCADE', format('capture_%s_%s', source_id, event));
    END LOOP;
END
$function$;

-- Whether a table's writes can pass its statement triggers by, so that it needs the row form. Where the server does not let subscriptions
-- be seen, the answer is yes: the row form is right for every table, only slower.
CREATE FUNCTION syncd.fires_per_row(source regclass) RETURNS boolean
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog
AS $function$
BEGIN
    RETURN EXISTS (SELECT FROM pg_class AS c WHERE c.oid = source AND c.relkind = 'p')
        OR EXISTS (SELECT FROM pg_inherits AS i WHERE i.inhrelid = source)
        OR EXISTS (SELECT FROM pg_subscription_rel AS s WHERE s.srrelid = source);
EXCEPTION WHEN insufficient_privilege THEN
    RETURN true;
END
$function$;

-- A table and its partitions at every level. pg_partition_tree would lock them all.
CREATE FUNCTION syncd.tables_of(source regclass, OUT relation regclass, OUT is_root boolean, OUT kind "char") RETURNS SETOF record
LANGUAGE sql STABLE SET search_path = pg_catalog
AS $function$
    WITH RECURSIVE tree AS (
        SELECT c.oid, c.relkind, true AS is_root FROM pg_class AS c WHERE c.oid = source
        UNION ALL
        SELECT c.oid, c.relkind, false FROM tree JOIN pg_inherits AS i ON i.inhparent = tree.oid JOIN pg_class AS c ON c.oid = i.inhrelid
        WHERE tree.relkind = 'p')
    SELECT oid::regclass, is_root, relkind FROM tree
$function$;

-- What is wrong with a source's triggers: missing; altered (it calls another function, or not for every row); disabled; not always (it does
-- not fire under session_replication_role = replica); unwanted. No row: nothing is. syncd.mend puts it right.
CREATE FUNCTION syncd.missing_triggers(source_id integer, OUT relation regclass, OUT trigger text, OUT problem text) RETURNS SETOF record
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, syncd
AS $function$
    WITH source AS (
        SELECT a.source, syncd.fires_per_row(a.source) AS per_row
        FROM syncd.attachments AS a JOIN pg_class AS c ON c.oid = a.source WHERE a.id = source_id
    ), kinds (event, type, old_table, new_table) AS (  -- type: 1 for each row, 4 insert, 8 delete, 16 update, 32 truncate
        VALUES ('insert', 4, NULL, 'syncd_new'), ('update', 16, 'syncd_old', 'syncd_new'), ('delete', 8, 'syncd_old', NULL),
               ('truncate', 32, NULL, NULL), ('row', 29, NULL, NULL), ('leaf', 32, NULL, NULL)
    ), wanted AS (
        SELECT t.relation, format('syncd_%s_%s', source_id, k.event) AS name, to_regproc(format('syncd.capture_%s_%s', source_id, k.event)) AS function,
               k.type, k.old_table, k.new_table
        FROM source AS s CROSS JOIN LATERAL syncd.tables_of(s.source) AS t CROSS JOIN kinds AS k
        WHERE CASE k.event WHEN 'truncate' THEN t.is_root WHEN 'row' THEN s.per_row WHEN 'leaf' THEN NOT t.is_root AND t.kind = 'r'
                           ELSE NOT s.per_row END
    ), found AS (
        SELECT t.* FROM pg_trigger AS t JOIN pg_proc AS p ON p.oid = t.tgfoid CROSS JOIN kinds AS k
        WHERE p.pronamespace = 'syncd'::regnamespace AND p.proname = format('capture_%s_%s', source_id, k.event)
    )
    SELECT w.relation, w.name,
           CASE WHEN f.oid IS NULL THEN 'missing' WHEN f.tgenabled = 'D' THEN 'disabled' WHEN f.tgenabled <> 'A' THEN 'not always'
                ELSE 'altered' END
    FROM wanted AS w LEFT JOIN found AS f ON f.tgrelid = w.relation AND f.tgname = w.name AND f.tgfoid = w.function
    WHERE f.oid IS NULL OR f.tgenabled <> 'A' OR f.tgtype <> w.type OR f.tgqual IS NOT NULL OR f.tgattr::text <> ''
       OR f.tgoldtable IS DISTINCT FROM w.old_table OR f.tgnewtable IS DISTINCT FROM w.new_table
    UNION ALL
    SELECT f.tgrelid::regclass, f.tgname::text, 'unwanted'
    FROM found AS f WHERE NOT EXISTS (SELECT FROM wanted AS w WHERE w.relation = f.tgrelid AND w.name = f.tgname)
    ORDER BY 3, 1, 2
$function$;

-- A marker in the outbox, by the same road as keys: it is seen in the order of commits and wakes the consumer.
CREATE FUNCTION syncd.mark(source_id integer, op "char") RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, syncd
AS $function$
BEGIN
    INSERT INTO syncd.outbox (slot, source, op) SELECT s.last_value, source_id, mark.op FROM syncd.outbox_slot AS s;
    PERFORM syncd.wake();
END
$function$;
