-- Name of this history of transactions: the first part of the database's identity, and the
-- database's number, since CREATE DATABASE with a template copies the identity. NULL in a restored
-- copy, until the first syncd that connects gives it its own identity.
CREATE FUNCTION syncd.history() RETURNS text
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path = pg_catalog, syncd
AS $function$
SELECT pg_catalog.left(m.incarnation::text, 8) || '.' || d.oid
FROM syncd.meta AS m CROSS JOIN pg_catalog.pg_database AS d
WHERE m.xmin::text::bigint = m.xid::text::bigint % 4294967296
  AND d.datname = pg_catalog.current_database()
$function$;

-- The token of this transaction, for a reader that must see its writes:
-- '<transaction id>.<history>'. The history shows a reader of another database that it need not
-- wait. A token without a history means the present one.
CREATE OR REPLACE FUNCTION syncd.token() RETURNS text
LANGUAGE sql VOLATILE
AS $function$
    SELECT pg_catalog.concat_ws('.', pg_catalog.pg_current_xact_id()::text, syncd.history())
$function$;
