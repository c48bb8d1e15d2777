"""One dataset's index: rows by key and by distance. It knows no database and no event loop.

Ground first: `storage` (bytes on disk and in memory), `rows` (vectors and keys), `filter` and
`codes`, `view` (one pass, as a reader sees it), `search`, `build` (what makes searches fast),
`generation` (a dataset's files from first row to last), and `dataset`, which owns the state and is
what other packages use.
"""
