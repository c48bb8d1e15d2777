-- The table of `syncd quickstart`: colours; the vectors are their red, green and blue.

-- name: create_table
CREATE TABLE IF NOT EXISTS public.colours (name text PRIMARY KEY, rgb real[] NOT NULL);

-- name: empty_table
TRUNCATE public.colours;

-- name: insert_rows
INSERT INTO public.colours VALUES
    ('red', '{255,0,0}'), ('crimson', '{220,20,60}'), ('firebrick', '{178,34,34}'),
    ('tomato', '{255,99,71}'), ('coral', '{255,127,80}'), ('orange', '{255,165,0}'),
    ('gold', '{255,215,0}'), ('yellow', '{255,255,0}'), ('olive', '{128,128,0}'),
    ('green', '{0,128,0}'), ('lime', '{0,255,0}'), ('teal', '{0,128,128}'),
    ('aqua', '{0,255,255}'), ('navy', '{0,0,128}'), ('blue', '{0,0,255}'), ('indigo', '{75,0,130}'),
    ('purple', '{128,0,128}'), ('orchid', '{218,112,214}'), ('pink', '{255,192,203}'),
    ('white', '{255,255,255}'), ('silver', '{192,192,192}'), ('grey', '{128,128,128}'),
    ('black', '{0,0,0}'), ('brown', '{165,42,42}');

-- name: attach
SELECT * FROM syncd.attach('public.colours', vector => 'rgb', metric => 'l2');

-- name: update_row
UPDATE public.colours SET rgb = '{221,21,61}' WHERE name = 'navy';

-- name: delete_row
DELETE FROM public.colours WHERE name = 'firebrick';

-- name: token
SELECT syncd.token();
