"""Codes on disk: one file for the codebook and one for each part, written once and never changed.

FAISS' own format, streamed: neither saving nor loading holds a second copy of a part besides the bytes that are being checked.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import faiss

from syncd.errors import DamagedFile, DataDirectoryError
from syncd.index.codes import Codebook, Codes, Part
from syncd.index.files import make_durable, read_file, write_at
from syncd.index.saved import SavedCodes, SavedFile, SavedIndex, SavedPart

BUFFER_BYTES = 1 << 20


def save_codes(directory: Path, codes: Codes) -> tuple[SavedCodes, list[SavedFile], int]:
    """Make codes durable, except for the directory's names; returns what to record, the files, and the bytes written.

    Only what has not been written before is. Raises ``DataDirectoryError``, and can then be called again.
    """
    book, written, files, parts = codes.codebook, 0, [], []
    prefix = f"{codes.generation:04d}"
    if not book.file:
        book.file.append(_write(directory, f"{prefix}-codebook-{book.number:06d}.ivf", book.template))
        written += book.file[0].bytes
    files.append(book.file[0])
    for part in codes.parts:
        if not part.file:
            part.file.append(_write(directory, f"{prefix}-codes-{part.number:06d}.ivf", part.index))
            written += part.file[0].bytes
        files.append(part.file[0])
        parts.append(SavedPart(part.number, part.start, part.stop, part.rows, part.file[0].name))
    saved = SavedCodes(book.number, book.file[0].name, book.trained_rows, tuple(parts), codes.calibration)
    return saved, files, written


def load_codes(directory: Path, saved: SavedIndex) -> Codes | None:
    """The codes of a saved index, None where it had none; raises ``DamagedFile``."""
    entry = saved.codes
    if entry is None:
        return None
    files = {file.name: file for file in saved.files}
    dim = saved.dim or 0
    template = _read(directory, files, entry.codebook_name)
    codebook = Codebook(
        entry.codebook_number,
        saved.metric,
        dim,
        entry.trained_rows,
        template.quantizer,
        template,
        [files[entry.codebook_name]],
    )
    parts = []
    for part in entry.parts:
        index = _read(directory, files, part.name)
        if index.ntotal != part.rows or index.nlist != codebook.lists:
            raise DamagedFile(f"{directory / part.name} holds {index.ntotal} rows, the checkpoint says {part.rows}")
        parts.append(Part(part.number, part.start, part.stop, part.rows, index, [files[part.name]]))
    return Codes(saved.generation, codebook, tuple(parts), entry.calibration)


def last_number(saved: SavedIndex) -> int:
    """The highest number in the names of the files of codes."""
    if saved.codes is None:
        return 0
    return max([saved.codes.codebook_number, *(part.number for part in saved.codes.parts)])


def _write(directory: Path, name: str, index: Any) -> SavedFile:
    path = directory / name
    size, crc32 = 0, 0
    failure: list[DataDirectoryError] = []

    def write(content: bytes) -> None:
        nonlocal size, crc32
        try:
            write_at(path, size, memoryview(content), truncate=not size)
        except DataDirectoryError as error:
            failure.append(error)
            raise
        size, crc32 = size + len(content), zlib.crc32(content, crc32)

    try:
        writer = faiss.PyCallbackIOWriter(write, BUFFER_BYTES)
        buffered = faiss.BufferedIOWriter(writer, BUFFER_BYTES)
        faiss.write_index(index, buffered)
        del buffered  # writes what it holds
    except Exception:
        if failure:  # FAISS passes on that the callback failed, not how
            raise failure[0] from None
        raise
    if failure:
        raise failure[0]
    make_durable(path)
    return SavedFile(name=name, bytes=size, crc32=crc32)


def _read(directory: Path, files: dict[str, SavedFile], name: str) -> Any:
    if name not in files:
        raise DamagedFile(f"the checkpoint has no entry for {directory / name}")
    content = memoryview(read_file(directory / name, files[name]))
    position = 0

    def read(size: int) -> bytes:
        nonlocal position
        some = bytes(content[position : position + size])
        position += len(some)
        return some

    try:
        return faiss.read_index(faiss.PyCallbackIOReader(read, BUFFER_BYTES))
    except RuntimeError as error:
        raise DamagedFile(f"{directory / name} is no index that FAISS can read: {error}") from error
