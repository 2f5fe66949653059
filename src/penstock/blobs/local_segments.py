"""Segments as files of the local disk: `<batch>/<index>.<attempt>`.

An attempt starts its file with what earlier attempts kept, syncs it, and only then deletes
theirs.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from penstock.blobs.segments import WHOLE_BYTES, SegmentReader, SegmentWriter, SliceReplies
from penstock.model import BatchId


class LocalWriter(SegmentWriter):
    """Appends to one file, which its first flush makes."""

    def __init__(self, path: Path, requests: int = 0) -> None:
        super().__init__(requests)
        self._path = path
        self._file = -1
        self._is_named = False
        """Whether its name would survive a loss of power."""
        self._is_folder_named = True

    def flush(self) -> None:
        """Make durable what was prepared.

        Raises:
            OSError: The disk is full or fails; all that is not durable stays remembered.
        """
        data = self.encode()
        if not data:
            return
        if self._file < 0:
            try:
                self._path.parent.mkdir()
                self._is_folder_named = False
            except FileExistsError:
                pass
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not self._is_named:
            _sync_folder(self._path.parent)
            self._is_named = True
        if not self._is_folder_named:
            _sync_folder(self._path.parent.parent)
            self._is_folder_named = True
        # What a failure leaves behind is torn, so nobody reads it, and is written over.
        _write_all(self._file, data, self.size)
        os.fdatasync(self._file)
        self.keep(len(data))

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class FileSource:
    """A file as the source of a segment."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    @property
    def size(self) -> int:
        return os.fstat(self._file).st_size

    def read(self, offset: int, length: int) -> bytes:
        pieces: list[bytes] = []
        while length > 0:
            piece = os.pread(self._file, length, offset)
            if not piece:
                break
            pieces.append(piece)
            offset += len(piece)
            length -= len(piece)
        return b"".join(pieces) if len(pieces) != 1 else pieces[0]

    def close(self) -> None:
        os.close(self._file)


class LocalSegments:
    """Segments below `root`, which is made if it is not there."""

    flush_interval_s = 0.0
    flush_bytes = 0

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        _sync_folder(root)  # a process may have ended before it could
        self._root = root

    def open(
        self, batch_id: BatchId, index: int, attempt: int, *, requests: int
    ) -> LocalWriter:
        path = self._path(batch_id, index, attempt)
        if attempt == 1:
            return LocalWriter(path, requests)  # nothing can be there yet
        path.unlink(missing_ok=True)
        # By name: an attempt that opens late must not take what a newer one has.
        earlier = [each for each in self._attempts(batch_id, index) if each.name < path.name]
        writer = LocalWriter(path, requests)
        if earlier:
            try:
                with _read(earlier) as replies:
                    for record, payload in replies.iter_records():
                        writer.append(record.line, record.kind, payload, record.tokens)
                        if writer.waiting_bytes > WHOLE_BYTES:
                            _flush(writer)
                _flush(writer)
            except BaseException:
                writer.close()
                raise
            for path in earlier:
                path.unlink(missing_ok=True)
        return writer

    def flush(self, writers: Sequence[SegmentWriter]) -> None:
        for writer in writers:
            assert isinstance(writer, LocalWriter)  # noqa: S101
            writer.flush()

    def read(
        self, batch_id: BatchId, index: int, *, attempt: int | None = None
    ) -> SliceReplies:
        if attempt is not None:
            return _read([self._path(batch_id, index, attempt)])
        return _read(self._attempts(batch_id, index))

    def delete(self, batch_id: BatchId) -> None:
        shutil.rmtree(self._root / batch_id, ignore_errors=True)

    def batches(self) -> list[BatchId]:
        return [BatchId(path.name) for path in self._root.iterdir() if path.is_dir()]

    def _path(self, batch_id: BatchId, index: int, attempt: int) -> Path:
        return self._root / batch_id / f"{index:08d}.{attempt:06d}"

    def _attempts(self, batch_id: BatchId, index: int) -> list[Path]:
        """The segments of a slice, oldest attempt first."""
        folder, start = self._root / batch_id, f"{index:08d}."
        try:  # `glob` would take a folder that cannot be read for an empty one
            names = [path.name for path in folder.iterdir()]
        except FileNotFoundError:
            return []
        return [folder / name for name in sorted(names) if name.startswith(start)]


def _read(paths: list[Path]) -> SliceReplies:
    readers: list[SegmentReader] = []
    for path in paths:
        try:
            readers.append(SegmentReader(FileSource(path)))
        except FileNotFoundError:
            continue  # a newer attempt has taken it over meanwhile and holds the same
    return SliceReplies(readers)


def _flush(writer: LocalWriter) -> None:
    writer.prepare()
    writer.flush()


def _sync_folder(path: Path) -> None:
    """Make the names in a folder survive a loss of power, as `fdatasync` makes the bytes."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _write_all(file: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, offset)
        view = view[written:]
        offset += written
