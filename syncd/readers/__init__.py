"""Reader processes: they accept clients' connections and answer what they can themselves.

The main process follows the database and owns every state. A *reader* is a process that it starts.
All readers accept on the main process's listening sockets, which they inherit. A request that a
reader does not answer itself is *handed over*: sent on to the main process, by the same protocol.

- `board`: the numbers that the processes share.
- `link`, `handing_over`: a reader's requests to the main process.
- `sql`: its PostgreSQL clients, and cancel requests between processes.
- `process`: a reader; `python -m syncd.readers` is its command.
- `pool`: the main process's side: what it answers for readers, and when there are none.
- `seats`: their processes, started, watched and started again. `running`: one of them.
- `reports`: counts and queries, from all readers.
"""
