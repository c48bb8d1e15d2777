"""The command of a reader process, which only the main process runs."""

from __future__ import annotations

import sys

from syncd.imports import without_collections

with without_collections():
    from syncd.readers.process import main

main(sys.argv[1:])
