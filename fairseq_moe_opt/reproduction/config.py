"""What is measured: the paper's models, and how far they are scaled down. Read from ``configs/reproduce.yaml``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.presets import configs_folder

T = TypeVar("T")

FFN_FACTOR = 4
"""F over D, in both of the paper's models."""
HEAD_WIDTH = 64
LM, ENCODER, DECODER = "lm", "encoder", "decoder"
PHASES = (LM, ENCODER, DECODER)
TITLES: Mapping[str, str] = {LM: "LM", ENCODER: "MT encoder", DECODER: "MT decoder"}


@dataclass(frozen=True)
class PaperModel:
    """One of the paper's models, as it was run there.

    Attributes:
        experts, top_k, capacity, moe_every: E, K, the share of a batch's tokens that each expert computes with static
            gating, and one layer in how many is sparse. Never scaled.
        width, layers, vocabulary: D, layers (of the encoder and of the decoder each), words.
        batch, length: sequences together, tokens in each.
        device_gib, static_gib: memory of one of its devices, and what weights take there.
    """

    experts: int
    top_k: int
    capacity: float
    moe_every: int
    width: int
    layers: int
    vocabulary: int
    batch: int
    length: int
    device_gib: float
    static_gib: float

    @property
    def waste(self) -> float:
        """Rows that static gating computes over rows that are needed: E * C / K."""
        return self.experts * self.capacity / self.top_k

    @property
    def budget_ratio(self) -> float:
        """Memory of a device over what weights take there."""
        return self.device_gib / self.static_gib


@dataclass(frozen=True)
class Size:
    """What a model is scaled down to: D, and layers (of the encoder and of the decoder each)."""

    width: int
    layers: int


@dataclass(frozen=True)
class Scale:
    """How large, and how long, measurements are.

    Attributes:
        lm, mt: the models' sizes.
        most_batches: the largest batch tried, in multiples of the paper's.
        rounds, seconds: turns of every side at each batch, and seconds after which no further turn begins.
        trace_batches, trace_layers: of each synthetic trace.
    """

    lm: Size
    mt: Size
    most_batches: int
    rounds: int
    seconds: float
    trace_batches: int
    trace_layers: int


@dataclass(frozen=True)
class Plan:
    """Everything that decides what is measured.

    Attributes:
        models: ``lm`` and ``mt``.
        scale_name, scale: which scale it is.
        ranks: devices that share the experts, where placement and caches are looked at.
        cache_slots: experts of a layer in each one's cache.
        seed: of weights, tokens and synthetic traces.
        languages: of the recorded trace: source, then targets.
    """

    models: Mapping[str, PaperModel]
    scale_name: str
    scale: Scale
    ranks: int
    cache_slots: int
    seed: int
    languages: tuple[str, ...]

    def paper(self, phase: str) -> PaperModel:
        """The paper's model that has ``phase``."""
        return self.models["lm" if phase == LM else "mt"]

    def size(self, phase: str) -> Size:
        """What that is scaled down to."""
        return self.scale.lm if phase == LM else self.scale.mt


@dataclass(frozen=True)
class Shape:
    """A model as it is run here; letters as in ``moe.types``.

    Attributes:
        phase: ``lm``, ``encoder`` or ``decoder``.
        paper: what it is scaled down from.
        width, layers: D, and layers of this phase.
        vocabulary: words; the same share of the work as in the paper.
        length: tokens of a sequence, scaled with the width. In the decoder those of the source, and as many before
            the current one.
    """

    phase: str
    paper: PaperModel
    width: int
    layers: int
    vocabulary: int
    length: int

    @property
    def ffn(self) -> int:
        """F."""
        return FFN_FACTOR * self.width

    @property
    def heads(self) -> int:
        """Attention heads."""
        return max(1, self.width // HEAD_WIDTH)

    @property
    def sparse_layers(self) -> int:
        """Layers with experts."""
        return self.layers // self.paper.moe_every

    def tokens(self, batch: int) -> int:
        """Rows of one forward of ``batch`` sequences: one a sentence in the decoder, which takes one step."""
        return batch if self.phase == DECODER else batch * self.length

    def is_sparse(self, layer: int) -> bool:
        """Whether layer ``layer`` has experts: the last of every ``moe_every``."""
        return layer % self.paper.moe_every == self.paper.moe_every - 1


def shape_of(phase: str, paper: PaperModel, size: Size) -> Shape:
    """``paper`` scaled down to ``size``.

    Raises OptionError where the layers would not all be in whole groups of ``moe_every``, or heads not whole.
    """
    if size.layers < 1 or size.layers % paper.moe_every:
        raise OptionError("layers", f"{size.layers} is not a multiple of moe_every={paper.moe_every}")
    if size.width < 1 or size.width % min(HEAD_WIDTH, size.width):
        raise OptionError("width", f"{size.width} is not a multiple of {HEAD_WIDTH}")
    scaled = size.width / paper.width
    return Shape(
        phase,
        paper,
        size.width,
        size.layers,
        vocabulary=max(2, round(paper.vocabulary * scaled * size.layers / paper.layers)),
        length=max(1, round(paper.length * scaled)),
    )


def plan_path() -> Path:
    """The file of the plan that comes with the project."""
    return configs_folder() / "reproduce.yaml"


def read_plan(scale: str, path: Path | None = None) -> Plan:
    """The plan in ``path`` (that of the project if not given) at one of its scales.

    Raises OptionError naming the file and the key for anything that is missing, unknown or of the wrong type.
    """
    source = plan_path() if path is None else path
    try:
        content = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OptionError("plan", f"{source} cannot be read: {' '.join(str(error).split())}") from error
    try:
        models = {name: _filled(PaperModel, one, name) for name, one in content["models"].items()}
        scales = content["scales"]
        if scale not in scales:
            raise OptionError("scale", f"{scale!r} is not one of {', '.join(scales)}")
        sizes = {name: _filled(Size, scales[scale][name], name) for name in ("lm", "mt")}
        return Plan(
            models={name: models[name] for name in ("lm", "mt")},
            scale_name=scale,
            scale=_filled(Scale, {**scales[scale], **sizes}, scale),
            ranks=int(content["ranks"]),
            cache_slots=int(content["cache_slots"]),
            seed=int(content["seed"]),
            languages=tuple(map(str, content["languages"])),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise OptionError("plan", f"{source}: {type(error).__name__} {error}") from error


def _filled(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    wrong = sorted(set(known) ^ set(values))
    if wrong:
        state = "is missing" if wrong[0] in known else f"is none of {', '.join(known)}"
        raise OptionError("plan", f"{where}: {wrong[0]} {state}")
    return kind(**values)
