"""Writes safetensors tensor by tensor, so that memory holds one tensor however large the checkpoint is."""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, final

import torch

from fairseq_moe_opt.checkpoints.records import TensorRecord, read_tensor
from fairseq_moe_opt.checkpoints.safetensors import DTYPES, INDEX_NAME, SINGLE_NAME
from fairseq_moe_opt.errors import CheckpointError
from fairseq_moe_opt.moe.quantization import quantize_rows

SHARD_BYTES = 4_000_000_000
_CODES: Mapping[torch.dtype, str] = {dtype: code for code, dtype in DTYPES.items()}


class Part(enum.Enum):
    """What of a tensor is written: all of it, or, of a matrix to quantise, its int8 codes or its scales."""

    WHOLE = enum.auto()
    CODES = enum.auto()
    SCALE = enum.auto()


class Storable(Protocol):
    """A tensor that a file is to hold: its entry in the header, and its numbers when their turn comes."""

    @property
    def name(self) -> str:
        """In the file."""

    @property
    def dtype(self) -> torch.dtype:
        """In the file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """In the file."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""

    def read(self) -> torch.Tensor:
        """The contiguous CPU tensor of this dtype and shape."""


_AnyStorable = TypeVar("_AnyStorable", bound=Storable)


@final
@dataclass(frozen=True)
class Output:
    """One tensor to write: its new name, where to read it, the dtype to store, and what of it."""

    name: str
    record: TensorRecord
    dtype: torch.dtype
    part: Part = Part.WHOLE

    @property
    def shape(self) -> tuple[int, ...]:
        """In the file."""
        return self.record.shape[:1] if self.part is Part.SCALE else self.record.shape

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """The contiguous tensor to write."""
        tensor = read_tensor(self.record)
        if self.part is Part.WHOLE:
            return tensor.to(self.dtype).contiguous()
        codes, scale = quantize_rows(tensor)
        return codes if self.part is Part.CODES else scale


def float_dtype(record: TensorRecord, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype to store: only floating tensors are ever converted."""
    return wanted if wanted is not None and record.dtype.is_floating_point else record.dtype


def write_safetensors(
    folder: Path,
    outputs: Sequence[Output],
    shard_bytes: int = SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Writes ``outputs`` into ``folder`` as Transformers names them: one file, or shards with an index.

    ``metadata`` goes into every file's header.
    """
    shards = plan_shards(outputs, shard_bytes)
    metadata = {"format": "pt", **(metadata or {})}
    if len(shards) == 1:
        write_file(folder / SINGLE_NAME, shards[0], metadata)
        return [folder / SINGLE_NAME]
    paths = [folder / name for name in shard_names(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        write_file(path, shard, metadata)
    write_index(folder, shards)
    return paths


def shard_names(count: int) -> list[str]:
    """What Transformers calls the files of a checkpoint in ``count`` shards."""
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_index(folder: Path, shards: Sequence[Sequence[Storable]]) -> None:
    """Writes the file that says which of the ``shards`` of ``folder`` holds which tensor."""
    named = list(zip(shard_names(len(shards)), shards, strict=True))
    total = sum(output.nbytes for shard in shards for output in shard)
    weight_map = {output.name: name for name, shard in named for output in shard}
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def plan_shards(outputs: Sequence[_AnyStorable], shard_bytes: int) -> list[list[_AnyStorable]]:
    """Cuts the list, in its order, into runs of at most ``shard_bytes`` (a larger tensor stands alone)."""
    shards: list[list[_AnyStorable]] = [[]]
    size = 0
    for output in outputs:
        if shards[-1] and size + output.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(output)
        size += output.nbytes
    return shards


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file that people can read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_file(path: Path, outputs: Sequence[Storable], metadata: Mapping[str, str]) -> None:
    """One safetensors file: header length, header padded to 8 bytes, then the tensors without gaps."""
    with path.open("wb") as stream:
        header = _header(path, outputs, metadata)
        stream.write(len(header).to_bytes(8, "little") + header)
        for output in outputs:
            stream.write(bytes_of(output.read()))


def _header(path: Path, outputs: Sequence[Storable], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for output in outputs:
        if output.dtype not in _CODES:
            raise CheckpointError(path, f"safetensors cannot store {output.name!r} as {output.dtype}")
        end = begin + output.nbytes
        shape = list(output.shape)
        entries[output.name] = {"dtype": _CODES[output.dtype], "shape": shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    return text + b" " * (-len(text) % 8)


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's memory, whatever its dtype (numpy has no bfloat16); the view keeps it alive."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data
