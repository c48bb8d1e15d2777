-- Shards: what syncd route needs to find them.

-- Of each consumer that is a shard: its number, from 0, the number of shards of its layout, its
-- replica's name, and the address at which it answers.
ALTER TABLE syncd.consumers
    ADD COLUMN shard integer,
    ADD COLUMN layout integer,
    ADD COLUMN replica text,
    ADD COLUMN address text;

-- The number of shards of the layout that answers. It has no row until the first shard registers.
-- A layout of another size may read meanwhile: this row alone says which layout is asked.
CREATE TABLE syncd.layout (
    one_row boolean PRIMARY KEY DEFAULT true CHECK (one_row),
    shards integer NOT NULL CHECK (shards > 0),
    changed_at timestamptz NOT NULL DEFAULT now()
);
