"""A dataset's present view in memory that other processes share.

The main process *publishes* a view after each change; a *reader*, another process, takes it up. The
memory is an *arena*: see ``storage.arena``.

- `publication`: the description of a view: which blocks and files hold it.
- `exporting`: the main process's side. `taking`: a reader's side.
- `present`: the main process's state of one index, published as it is replaced.
"""
