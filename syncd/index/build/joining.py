"""Joins the codes of several parts into one part, without the rows that died.

Codes are moved, which takes 1 µs per row; encoding takes 5 to 15 µs. FAISS keeps the 4-bit codes of
some rows (``bbs``) in one block, in the order of its instructions. Here the codes are taken out of
their blocks, and each list of the new part is written in one call. Adding to a list that already
has rows is avoided: there FAISS's ``add_entries`` can write out of bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from syncd.index.codes.codes import (
    Codebook,
    Part,
    empty_part,
    library,
    list_sizes,
    without_quantizer,
)
from syncd.index.storage.bitmap import Bitmap, Slots, test_bits
from syncd.index.storage.stopping import Cancelled, Stop

PACKED_ROWS = 32
"""Rows that FAISS packs together. Larger blocks are made of these, pair of codes by pair of codes.

FAISS's own ``CodePackerPQ4`` is right only for blocks of this size (1.15.1).
"""
LISTS_AT_ONCE = 64
"""Number of lists between two checks whether the work is still wanted."""

Nibbles = NDArray[np.uint8]
"""4-bit codes, one per element."""


def joined(
    codebook: Codebook, parts: Sequence[Part], live: Bitmap, number: int, cancelled: Stop
) -> Part:
    """The live rows of adjacent ``parts`` as the part ``number``; raises ``Cancelled``."""
    index = empty_part(codebook)
    for each in range(codebook.lists):
        if each % LISTS_AT_ONCE == 0 and cancelled():
            raise Cancelled
        slots, codes = zip(*(_rows(part, each, live) for part in parts), strict=True)
        ids = np.concatenate(slots)
        if ids.size:
            packed = _packed(np.concatenate(codes), int(index.bbs))
            index.invlists.add_entries(
                each, ids.size, library.swig_ptr(ids), library.swig_ptr(packed)
            )
            index.ntotal += ids.size
    rows, sizes = int(index.ntotal), list_sizes(index)
    return Part(
        number, parts[0].start, parts[-1].stop, rows, sizes, without_quantizer(codebook, index)
    )


def _rows(part: Part, number: int, live: Bitmap) -> tuple[Slots, Nibbles]:
    """The live rows of one list: slots (n,) and codes (n, quantizers)."""
    rows, lists, quantizers = int(part.sizes[number]), part.index.invlists, int(part.index.M2)
    if not rows:
        return np.empty(0, dtype=np.int64), np.empty((0, quantizers), dtype=np.uint8)
    slots: Slots = library.rev_swig_ptr(lists.get_ids(number), rows)
    block_rows = int(part.index.bbs)
    blocks = -(-rows // block_rows)
    packed = library.rev_swig_ptr(
        lists.get_codes(number), blocks * block_rows * quantizers // 2
    ).reshape(blocks, -1)
    nibbles = np.empty((blocks, block_rows * quantizers), dtype=np.uint8)
    np.bitwise_and(packed, 15, out=nibbles[:, 0::2])
    np.right_shift(packed, 4, out=nibbles[:, 1::2])
    codes = nibbles[:, _places(quantizers, block_rows)].reshape(-1, quantizers)[:rows]
    alive = test_bits(live, slots)
    return slots[alive], codes[alive]


def _packed(codes: Nibbles, block_rows: int) -> NDArray[np.uint8]:
    """Codes (n, quantizers) packed in blocks; the rest of the last block is zero."""
    rows, quantizers = codes.shape
    blocks = -(-rows // block_rows)
    filled = np.zeros((blocks * block_rows, quantizers), dtype=np.uint8)
    filled[:rows] = codes
    nibbles = np.empty((blocks, block_rows * quantizers), dtype=np.uint8)
    nibbles[:, _places(quantizers, block_rows)] = filled.reshape(blocks, -1)
    packed: NDArray[np.uint8] = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return packed


@cache
def _places(quantizers: int, block_rows: int) -> NDArray[np.int64]:
    """The nibble of a block for each code, row by row, (block_rows * quantizers,).

    Every pair of codes has the nibbles of 32 rows, then those of the next 32.
    """
    together = 2 * PACKED_ROWS
    pair, inner = np.divmod(_packed_places(quantizers), together)
    groups = block_rows // PACKED_ROWS
    return np.concatenate([(pair * groups + group) * together + inner for group in range(groups)])


@cache
def _packed_places(quantizers: int) -> NDArray[np.int64]:
    """``_places`` for blocks of ``PACKED_ROWS`` rows.

    FAISS packs the codes one by one: 10 ms for 192 quantizers, cached.
    """
    dim = 2 * quantizers
    packer: Any = library.IndexIVFPQFastScan(
        library.IndexFlatL2(dim), dim, 1, quantizers, 4
    ).get_CodePacker()
    flat, block = (
        np.zeros(packer.code_size, dtype=np.uint8),
        np.zeros((1, packer.block_size), dtype=np.uint8),
    )
    places = np.empty((PACKED_ROWS, quantizers), dtype=np.int64)
    for row in range(PACKED_ROWS):
        for quantizer in range(quantizers):
            flat[quantizer >> 1] = 15 << (4 * (quantizer & 1))
            packer.pack_1(flat, row, block)
            (at,) = block[0].nonzero()[0]
            places[row, quantizer] = 2 * at + (block[0, at] > 15)
            flat[quantizer >> 1] = block[0, at] = 0
    return places.reshape(-1)
