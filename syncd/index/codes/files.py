"""Codes on disk: one file for the codebook and one per part.

Invariant: a file is written once and never changed. The format is FAISS's own, streamed: saving and
loading hold no second copy of a part, except the bytes that are being checked.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

from syncd.errors import DamagedFile, DataDirectoryError
from syncd.index.codes.codes import Codebook, Codes, Part, library, list_sizes
from syncd.index.codes.saved import SavedCodes, SavedPart
from syncd.index.storage.files import SavedFile, make_durable, read_file, write_at
from syncd.types import Metric

BUFFER_BYTES = 1 << 20


def save_codes(directory: Path, codes: Codes) -> tuple[SavedCodes, list[SavedFile], int]:
    """Make codes durable, except for the directory's entries.

    Returns the record for the checkpoint, the files, and the number of bytes written. Files that
    exist are not written again. Raises ``DataDirectoryError``; it can then be called again.
    """
    book, written, files, parts = codes.codebook, 0, [], []
    prefix = f"{codes.generation:04d}"
    if not _is_there(directory, book.file):
        book.file[:] = [
            _write(directory, f"{prefix}-codebook-{book.number:06d}.ivf", book.template)
        ]
        written += book.file[0].bytes
    files.append(book.file[0])
    for part in codes.parts:
        if not _is_there(directory, part.file):
            part.file[:] = [_write(directory, f"{prefix}-codes-{part.number:06d}.ivf", part.index)]
            written += part.file[0].bytes
        files.append(part.file[0])
        parts.append(SavedPart(part.number, part.start, part.stop, part.rows, part.file[0].name))
    saved = SavedCodes(
        codebook_number=book.number,
        codebook_name=book.file[0].name,
        trained_rows=book.trained_rows,
        trained_slots=book.trained_slots,
        unevenness_trained=codes.unevenness_trained,
        parts=tuple(parts),
        calibration=codes.calibration,
    )
    return saved, files, written


def load_codes(
    directory: Path,
    entry: SavedCodes,
    files: dict[str, SavedFile],
    *,
    metric: Metric,
    dim: int,
    generation: int,
) -> Codes:
    """The codes that ``entry`` records; ``files`` are the files of their dataset.

    Raises ``DamagedFile``.
    """
    template = _read(directory, files, entry.codebook_name)
    codebook = Codebook(
        entry.codebook_number,
        metric,
        dim,
        entry.trained_rows,
        entry.trained_slots,
        template.quantizer,
        template,
        [files[entry.codebook_name]],
    )
    parts = []
    for part in entry.parts:
        index = _read(directory, files, part.name)
        if index.ntotal != part.rows or index.nlist != codebook.lists:
            raise DamagedFile(
                f"{directory / part.name} is damaged: it has {index.ntotal} rows, "
                f"the checkpoint records {part.rows}"
            )
        parts.append(
            Part(
                part.number,
                part.start,
                part.stop,
                part.rows,
                list_sizes(index),
                index,
                [files[part.name]],
            )
        )
    return Codes(generation, codebook, tuple(parts), entry.calibration, entry.unevenness_trained)


def _is_there(directory: Path, files: list[SavedFile]) -> bool:
    """Whether a file was written and still exists."""
    return bool(files) and (directory / files[0].name).exists()


def _write(directory: Path, name: str, index: Any) -> SavedFile:
    path = directory / name
    size, crc32 = 0, 0
    failure: DataDirectoryError | None = None

    def write(content: bytes) -> None:
        nonlocal size, crc32, failure
        if failure is not None:
            return
        try:
            write_at(path, size, memoryview(content), truncate=not size)
        except DataDirectoryError as error:
            # FAISS would report only that a write failed, and nothing from a destructor.
            failure = error
        size, crc32 = size + len(content), zlib.crc32(content, crc32)

    writer = library.PyCallbackIOWriter(write, BUFFER_BYTES)
    buffered = library.BufferedIOWriter(writer, BUFFER_BYTES)
    library.write_index(index, buffered)
    del buffered  # flushes its buffer
    if failure is not None:
        raise failure
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
        return library.read_index(library.PyCallbackIOReader(read, BUFFER_BYTES))
    except RuntimeError as error:
        message = f"{directory / name} is not an index that FAISS can read: {error}"
        raise DamagedFile(message) from error
