#!/usr/bin/env bash
# One would guess: IndexIVFPQFastScan takes the number of rows in a block (bbs), so reading rows back gives the rows that
# were added, whatever bbs is. With the default, 32, it does.
# What is so: with bbs 64, 96 and 128 searches are right, but reconstruct_n and the index's own code packer give wrong codes
# for every row of a block but some: a half, two thirds and three quarters of all rows. Nothing raises.
# Version: faiss-cpu 1.15.1.
# Why it matters: bbs 64 is faster to search. A program that reads codes back, to move rows between indexes or to look at
# them, gets other vectors than it added. Unpack larger blocks as groups of 32 rows, and compare with freshly encoded rows.
set -euo pipefail
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
python3 -m venv "$T/venv"
"$T/venv/bin/pip" install -q --disable-pip-version-check faiss-cpu==1.15.1 numpy==2.2.6
OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 "$T/venv/bin/python" - <<'PYTHON'
import faiss
import numpy as np

rows = np.random.default_rng(1).standard_normal((1152, 16), dtype=np.float32)
print("faiss", faiss.__version__)
right = {}
for block in (32, 64, 96, 128):
    index = faiss.IndexIVFPQFastScan(faiss.IndexFlatL2(16), 16, 1, 8, 4, faiss.METRIC_L2, block)
    index.by_residual = False
    index.train(rows)
    index.add(rows)
    coded = index.pq.decode(index.pq.compute_codes(rows))
    _, found = index.search(coded, 40)
    searched = (found == np.arange(len(rows))[:, None]).any(axis=1).mean()
    index.make_direct_map()
    same = np.isclose(index.reconstruct_n(0, len(rows)), coded).all(axis=1)
    right[block] = float(same.mean())
    print(f"bbs {block}: own row among the 40 nearest {searched:.3f}, rows that reconstruct_n gives back right {right[block]:.3f}")
    assert searched > 0.95
raise SystemExit(not (right[32] == 1.0 and right[64] < 0.6 and right[96] < 0.5 and right[128] < 0.4))
PYTHON
