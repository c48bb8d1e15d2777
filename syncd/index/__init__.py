"""One dataset's index: rows by key and by distance. It knows no database and no event loop.

The packages, each built on the previous ones:

- `storage`: bytes on disk and in memory.
- `rows`: vectors and keys.
- `filter` and `codes`: filters on attached columns; compressed vectors.
- `view`: one pass, as a reader sees it.
- `search` and `build`: answers from a view; the codes that make them fast.
- `generation`: a dataset's files, from its first row to its last.
- `shared`: the present state, for this process and for readers.
- `building`: what is built for one index next, and put in its place.
- `dataset`: rows written and searched; other packages use this.
"""
