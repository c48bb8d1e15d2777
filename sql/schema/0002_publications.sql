-- Publications: a published table accepts UPDATE and DELETE only with a replica identity, and FOR
-- ALL TABLES also publishes syncd's own tables.

DO $encoding$
BEGIN
    IF pg_catalog.current_setting('server_encoding') = 'SQL_ASCII' THEN
        RAISE EXCEPTION 'the database''s encoding is SQL_ASCII, under which PostgreSQL does not '
                        'know which characters a key has'
            USING HINT = 'Move it into a database with an encoding: '
                         'createdb --template=template0 --encoding=UTF8 NEW; '
                         'pg_dump OLD | psql NEW';
    END IF;
END
$encoding$;

-- An upgrade runs alongside writers, and a writer that comes after a waiting lock waits as well. So
-- init takes this lock without waiting, as its last step.
DO $lock$
BEGIN
    FOR attempt IN 1..300 LOOP
        BEGIN
            LOCK TABLE syncd.outbox IN ACCESS EXCLUSIVE MODE NOWAIT;  -- with its slots
            EXIT;
        EXCEPTION WHEN lock_not_available THEN
            IF attempt = 300 THEN
                RAISE EXCEPTION 'a transaction that has written to a source stays open, and keeps '
                                'syncd.outbox from being altered'
                    USING ERRCODE = 'lock_not_available',
                          HINT = 'Find it with: SELECT pid, query FROM pg_stat_activity '
                                 'WHERE pid IN (SELECT pid FROM pg_locks WHERE relation IN '
                                 '(SELECT inhrelid FROM pg_inherits '
                                 'WHERE inhparent = ''syncd.outbox''::regclass)); '
                                 'when it has ended, run: syncd init';
            END IF;
            PERFORM pg_catalog.pg_sleep(0.1);
        END;
    END LOOP;
END
$lock$;

-- The whole row is the identity of a table without a primary key: these tables are small, or their
-- rows are only inserted and truncated. It has a cost only if wal_level is logical, and then only
-- for an update or a delete.
DO $identity$
DECLARE
    relation regclass;
BEGIN
    FOR relation IN SELECT c.oid FROM pg_catalog.pg_class AS c
                    WHERE c.relnamespace = 'syncd'::pg_catalog.regnamespace
                      AND c.relkind IN ('r', 'p') AND c.relreplident = 'd'
                      AND NOT EXISTS (SELECT FROM pg_catalog.pg_index AS i
                                      WHERE i.indrelid = c.oid AND i.indisprimary) LOOP
        EXECUTE pg_catalog.format('ALTER TABLE %s REPLICA IDENTITY FULL', relation);
    END LOOP;
END
$identity$;

-- The subscriptions that apply another server's rows to syncd's own tables: syncd would read the
-- other server's transaction ids as ours, and its truncations would remove our changes. Empty if
-- the role may not see subscriptions.
CREATE FUNCTION syncd.subscriptions_to_syncd() RETURNS text[]
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog
AS $function$
BEGIN
    RETURN ARRAY(SELECT DISTINCT s.subname::text
                 FROM pg_subscription_rel AS r JOIN pg_subscription AS s ON s.oid = r.srsubid
                 JOIN pg_class AS c ON c.oid = r.srrelid
                 WHERE c.relnamespace = 'syncd'::regnamespace AND c.relname <> 'embeddings'
                 ORDER BY 1);
EXCEPTION WHEN insufficient_privilege THEN
    RETURN '{}';
END
$function$;
