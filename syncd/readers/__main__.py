"""The command of a reader process, which only the main process runs."""

from __future__ import annotations

import sys

from syncd.imports import import_numpy, without_collections

with without_collections():
    import_numpy()
    from syncd.readers.process import main

main(sys.argv[1:])
