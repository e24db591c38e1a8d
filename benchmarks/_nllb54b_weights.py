"""A checkpoint of NLLB-MoE-54B's shape with random weights and int8 experts, written shard by shard.

Weights are pieces of one block of normal numbers, each tensor's from a place of its own: drawing 54 billion numbers
would take longer than writing them, and a tensor depends on its place in the list alone, so that a shard can be made
without those before it. Spreads are those of ``_random_weights``, under which tokens are told apart. As in trained
models some experts are more popular than others: the layer norm before a router has a random bias, which gives every
expert's logit a constant part with a standard deviation of ``SKEW`` beside the token's own, with one of 1.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _page_cache import forget
from _random_weights import spread_of
from _sides import Shape
from _weights import configuration
from transformers import NllbMoeForConditionalGeneration

from fairseq_moe_opt.checkpoints.expert_dtypes import NOTE, SCALE_SUFFIX
from fairseq_moe_opt.checkpoints.writers import plan_shards, shard_names, write_file, write_index, write_json
from fairseq_moe_opt.moe.quantization import MAX_CODE
from fairseq_moe_opt.sizes import readable

NLLB_54B = Shape(
    d_model=2048, ffn_dim=8192, layers=24, heads=16, experts=128, sparse_step=4, vocabulary=256_206, positions=1024
)
"""Of facebook/nllb-moe-54b: 12 of its 48 layers have experts."""

SKEW = 0.5
SHARD_BYTES = 2**30
FINGERPRINT = "nllb54b.json"
"""The file in a folder that says what is being written there."""

_LAYOUT = 1
"""Goes up with every change of what a shape and a seed give."""

# A prime: pieces that start at multiples of the stride are all different, and rows never begin at the same places.
_BLOCK = 33_554_393
_STRIDE = 20_737_757
_CODE_SPREAD = 32.0
"""Standard deviation of int8 codes: four of them reach the largest code."""

_SLACK_BYTES = 64 * 2**20
"""Disk space left free."""


class FolderError(Exception):
    """The folder is of something else, or too small."""


class Noise:
    """The block that all weights are cut from: standard normal numbers in bfloat16, and the same as int8 codes.

    Both twice over, so that a piece that reaches past the end of the block needs no copy.
    """

    def __init__(self, seed: int) -> None:
        normal = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(seed))
        self.floats = normal.bfloat16().repeat(2)
        self.codes = normal.mul_(_CODE_SPREAD).round_().clamp_(-MAX_CODE, MAX_CODE).to(torch.int8).repeat(2)

    @staticmethod
    def cut(block: torch.Tensor, piece: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Piece number ``piece`` of ``block``, to be read only; a longer one has the block again and again."""
        start = piece * _STRIDE % _BLOCK
        end = start + math.prod(shape)
        whole = block if end <= len(block) else block[:_BLOCK].repeat(-(-end // _BLOCK))
        return whole[start:end].view(shape)


@dataclass(frozen=True)
class RandomTensor:
    """One tensor of the checkpoint.

    Attributes:
        name, dtype, shape: in the file.
        piece: its number.
        noise: what it is cut from.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    piece: int
    noise: Noise

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """Its numbers."""
        if self.dtype == torch.int8:
            return self.noise.cut(self.noise.codes, self.piece, self.shape)
        floats = self.noise.cut(self.noise.floats, self.piece, self.shape)
        if len(self.shape) > 1:
            return floats * spread_of(self.name, self.shape[-1])
        if self.name.endswith("decoder.layer_norm.weight"):
            # Random signs: with tied embeddings a positive gain makes every token predict itself.
            return torch.where(floats >= 0, 1.0, -1.0).to(self.dtype)
        if self.name.endswith("layer_norm.weight"):
            return torch.ones_like(floats)
        return floats * (SKEW if self.name.endswith("ff_layer_norm.bias") else 0.1)


@dataclass(frozen=True)
class RowScales:
    """Scales of the int8 matrix ``matrix`` (out, in): ``dtype`` float32, ``shape`` (out,)."""

    matrix: RandomTensor
    dtype = torch.float32

    @property
    def name(self) -> str:
        """In the file."""
        return f"{self.matrix.name}{SCALE_SUFFIX}"

    @property
    def shape(self) -> tuple[int, ...]:
        """In the file."""
        return self.matrix.shape[:1]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> torch.Tensor:
        """Such that codes times scales have the spread of the floats they stand for."""
        spread = spread_of(self.matrix.name, self.matrix.shape[-1])
        return torch.full(self.shape, spread / _CODE_SPREAD, dtype=self.dtype)


AnyTensor = RandomTensor | RowScales


def tensors_of(shape: Shape, noise: Noise) -> Iterator[AnyTensor]:
    """Everything in the checkpoint, in the model's order; an expert's tensors lie side by side."""
    with torch.device("meta"):
        model = NllbMoeForConditionalGeneration(configuration(shape.to_dict()))
    for piece, (name, parameter) in enumerate(model.named_parameters()):
        is_codes = ".experts." in name and parameter.dim() == 2
        tensor = RandomTensor(name, torch.int8 if is_codes else torch.bfloat16, tuple(parameter.shape), piece, noise)
        yield tensor
        if is_codes:
            yield RowScales(tensor)


@dataclass(frozen=True)
class Checkpoint:
    """What is to be written: a model of ``shape``, weights from ``seed``."""

    shape: Shape
    seed: int
    tensors: tuple[AnyTensor, ...]

    @classmethod
    def of(cls, shape: Shape, seed: int) -> Checkpoint:
        """Nothing of it is made before it is written, but the block of random numbers."""
        return cls(shape, seed, tuple(tensors_of(shape, Noise(seed))))

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def expert_bytes(self) -> int:
        """Of the experts' tensors, scales included."""
        return sum(tensor.nbytes for tensor in self.tensors if ".experts." in tensor.name)


@dataclass(frozen=True)
class Written:
    """How many shards the checkpoint has, and how many of them were there already."""

    shards: int
    kept: int


def write_checkpoint(
    folder: Path, checkpoint: Checkpoint, progress: Callable[[str], None], shard_bytes: int = SHARD_BYTES
) -> Written:
    """Write what is missing of ``checkpoint`` in ``folder``; FolderError when it is another's or too small."""
    _claim(folder, checkpoint)
    shards = plan_shards(checkpoint.tensors, shard_bytes)
    paths = [folder / name for name in shard_names(len(shards))]
    missing = [(path, shard) for path, shard in zip(paths, shards, strict=True) if not path.exists()]
    _require_space(folder, sum(tensor.nbytes for _, shard in missing for tensor in shard))
    for number, (path, shard) in enumerate(missing, start=1):
        progress(f"writing shard {number} of {len(missing)}")
        _write_shard(path, shard)
    write_index(folder, shards)
    _write_config(folder, checkpoint.shape)
    return Written(len(shards), len(shards) - len(missing))


def _write_config(folder: Path, shape: Shape) -> None:
    config = configuration(shape.to_dict())
    setattr(config, NOTE, "int8")
    config.dtype = torch.bfloat16
    config.architectures = [NllbMoeForConditionalGeneration.__name__]
    config.save_pretrained(folder)


def _claim(folder: Path, checkpoint: Checkpoint) -> None:
    """Note in ``folder`` what it is for; FolderError when it is for something else already."""
    wanted = {"layout": _LAYOUT, "seed": checkpoint.seed, "shape": checkpoint.shape.to_dict()}
    note = folder / FINGERPRINT
    if note.exists():
        found = json.loads(note.read_text(encoding="utf-8"))
        if found != wanted:
            raise FolderError(f"{folder} holds another checkpoint: {found}, wanted is {wanted}; give another --folder")
        return
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FolderError(f"{folder} holds something else: it is not empty and has no {FINGERPRINT}")
    write_json(note, wanted)


def _require_space(folder: Path, wanted: int) -> None:
    for partial in folder.glob("*.part"):
        partial.unlink()
    free = shutil.disk_usage(folder).free
    if wanted and wanted + _SLACK_BYTES > free:
        raise FolderError(
            f"the checkpoint needs {readable(wanted + _SLACK_BYTES)} more in {folder}, where {readable(free)} is free: "
            "give fewer --experts or another --folder"
        )


def _write_shard(path: Path, shard: Sequence[AnyTensor]) -> None:
    """All of it or nothing: written under another name, and not kept in the page cache."""
    partial = path.with_name(f"{path.name}.part")
    write_file(partial, shard, {"format": "pt", NOTE: "int8"})
    forget(partial)
    partial.replace(path)
