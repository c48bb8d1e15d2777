-- Capture: statement triggers that write the keys of changed rows to the outbox, and nothing else.
--
-- Each source has functions of its own, generated from its column names. They evaluate no expression of the user's and compare no
-- values. They belong to the owner of schema syncd and run with that owner's rights, so a role that may write only its own table can
-- go on writing it. A renamed key column becomes a marker that has the source read again, a dropped outbox a WARNING: they fail no write.

-- SQL that lists a row's key as the outbox holds it: the text of a single column, a JSON array for several.
CREATE FUNCTION syncd.capture_key(key text[], alias text) RETURNS text
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog
AS $function$
    SELECT CASE WHEN cardinality(key) = 1 THEN format('%I.%I::pg_catalog.text', alias, key[1])
                ELSE format('pg_catalog.json_build_array(%s)::pg_catalog.text',
                            (SELECT string_agg(format('%I.%I', alias, name), ', ' ORDER BY place)
                             FROM unnest(key) WITH ORDINALITY AS k (name, place)))
           END
$function$;

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
END
$function$;

-- Remove a source's trigger functions; its triggers must be gone.
CREATE FUNCTION syncd.drop_capture(source_id integer) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, syncd
AS $function$
DECLARE
    event text;
BEGIN
    FOREACH event IN ARRAY ARRAY['insert', 'update', 'delete', 'truncate'] LOOP
        EXECUTE format('DROP FUNCTION IF EXISTS syncd.%I()', format('capture_%s_%s', source_id, event));
    END LOOP;
END
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
