-- Event triggers that forbid DDL: the error of syncd names the event trigger.

-- The event trigger whose function raised an error with this context; NULL if none did.
CREATE FUNCTION syncd.event_trigger_of(context text) RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog
AS $function$
    SELECT e.evtname::text FROM pg_event_trigger AS e JOIN pg_proc AS p ON p.oid = e.evtfoid
    WHERE e.evtenabled <> 'D' AND strpos(context, quote_ident(p.proname) || '() line ') > 0
    ORDER BY e.evtname LIMIT 1
$function$;

-- Raise an event trigger's error again, with the trigger's name and the next step; return if no
-- event trigger raised it.
CREATE FUNCTION syncd.blame_event_trigger(message text, context text) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, syncd
AS $function$
DECLARE
    name constant text := syncd.event_trigger_of(context);
BEGIN
    IF name IS NOT NULL AND message NOT LIKE 'event trigger %' THEN
        RAISE EXCEPTION 'event trigger % does not allow the DDL of syncd: %',
            quote_ident(name), message
            USING ERRCODE = 'insufficient_privilege',
                  HINT = format('As a superuser: ALTER EVENT TRIGGER %1$I DISABLE; then try again, '
                                'and ALTER EVENT TRIGGER %1$I ENABLE;', name);
    END IF;
END
$function$;

-- Repair a source's triggers, and request that it is read again if changes may have been missed.
-- Returns whether a trigger was changed. Runs with its caller's rights; the caller owns the table.
CREATE OR REPLACE FUNCTION syncd.mend(source text) RETURNS boolean
LANGUAGE plpgsql
AS $function$
DECLARE
    relation pg_catalog.regclass := source::pg_catalog.regclass;
    source_id integer := (SELECT a.id FROM syncd.attachment(relation) AS a);
    mended record;
    message text;
    context text;
BEGIN
    IF source_id IS NULL THEN
        RAISE EXCEPTION 'table % is not attached', relation
            USING ERRCODE = 'invalid_parameter_value',
            HINT = pg_catalog.format('SELECT * FROM syncd.attach(%L);', relation::text);
    END IF;
    IF NOT EXISTS (SELECT FROM syncd.missing_triggers(source_id)) THEN
        RETURN false;
    END IF;
    PERFORM syncd.check_owner(relation);
    SELECT * INTO mended FROM syncd.mend_triggers(relation, source_id);
    IF mended.changed AND mended.missed THEN
        PERFORM syncd.note_missed(source_id);
    END IF;
    RETURN mended.changed;
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS message = MESSAGE_TEXT, context = PG_EXCEPTION_CONTEXT;
    PERFORM syncd.blame_event_trigger(message, context);
    RAISE;
END
$function$;
