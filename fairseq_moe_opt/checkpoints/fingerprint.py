"""A short name for a checkpoint's content, for processes to find out whether they read the same one."""

from __future__ import annotations

import hashlib
import os

from fairseq_moe_opt.checkpoints.records import CheckpointIndex, TensorRecord
from fairseq_moe_opt.errors import CheckpointError

_SAMPLES, _SAMPLE_BYTES, _DIGITS = 256, 64, 16


def checkpoint_fingerprint(index: CheckpointIndex) -> str:
    """Hexadecimal digits that two checkpoints share when they have the same tensors.

    Names, dtypes, shapes and, of 256 tensors at most, the first bytes: enough to tell trainings apart, quick for any
    size, and independent of the folder. Raises CheckpointError for a file that cannot be read.
    """
    digest = hashlib.sha256()
    records = [index[name] for name in sorted(index)]
    for record in records:
        digest.update(f"{record.name} {record.dtype} {record.shape}\n".encode())
    for record in records[:: max(1, -(-len(records) // _SAMPLES))]:
        digest.update(_first_bytes(record))
    return digest.hexdigest()[:_DIGITS]


def _first_bytes(record: TensorRecord) -> bytes:
    try:
        with record.path.open("rb") as stream:
            return os.pread(stream.fileno(), min(_SAMPLE_BYTES, record.nbytes), record.offset)
    except OSError as error:
        raise CheckpointError(record.path, f"cannot be opened to read {record.name!r}: {error.strerror}") from error
