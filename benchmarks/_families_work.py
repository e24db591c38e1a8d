"""What every side of ``families.py`` computes, a prompt and then tokens with a cache, and how far results differ."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

EAGER, GROUPED, BATCHED = "eager", "grouped_mm", "batched_mm"
TRANSFORMERS = (EAGER, BATCHED, GROUPED)
REGISTERED, OPTIMIZE = "moe_opt", "optimize"
SIDES = (*TRANSFORMERS, REGISTERED, OPTIMIZE)
PREFILL, DECODE = PHASES = ("prefill", "decode")
MOST_COPIED = 2**29
"""Bytes; ``batched_mm`` copies a chosen expert's weights for every row, and is left out where that is more."""


@dataclass(frozen=True)
class Side:
    """One way to run a model.

    Attributes:
        name: in the table.
        model: another one over the same parameters for every kind of way.
        way: what the experts are computed by, a name of Transformers' registry; None leaves the model as it is.
        in_prefill: whether it computes prompts too; else ``grouped_mm`` does, and is not timed.
    """

    name: str
    model: Any
    way: str | None = None
    in_prefill: bool = True

    def use(self, phase: str) -> None:
        """Make the model compute ``phase`` in this way."""
        if self.way is not None:
            self.model.set_experts_implementation(self.way if self.in_prefill or phase == DECODE else GROUPED)


@dataclass(frozen=True)
class Case:
    """(B, T) prompts, and (B, N) tokens that follow: the same for all sides, so that all do the same work."""

    prompts: Tensor
    tokens: Tensor

    @property
    def batch(self) -> int:
        """B."""
        return len(self.prompts)

    def counts(self) -> dict[str, int]:
        """Tokens that each phase computes."""
        return {PREFILL: self.prompts.numel(), DECODE: self.tokens[:, 1:].numel()}


@dataclass(frozen=True)
class Turn:
    """Seconds of one run by phase, and the logits (B, N, V) that the tokens were to be chosen by."""

    seconds: dict[str, float]
    logits: Tensor


def copied_bytes(rows: int, model: Any) -> int:
    """What ``batched_mm`` copies in a layer for so many routed rows."""
    stacks = [p for name, p in model.named_parameters() if ".experts." in name and p.dim() == 3]
    layers = len({p.shape for p in stacks})  # the first and second matrices, the same in all layers
    return sum(rows * one[0].numel() * one.element_size() for one in stacks[:layers])


def greedy(side: Side, prompts: Tensor, count: int) -> Tensor:
    """(B, N) tokens, through ``generate``."""
    side.use(PREFILL)
    length = {"max_new_tokens": count, "min_new_tokens": count, "max_length": None}
    found: Tensor = side.model.generate(
        input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=False, num_beams=1, **length
    )
    return found[:, -count:]


def run(side: Side, case: Case) -> Turn:
    """One run of both phases; a translation model's prefill is its encoder and the first step of its decoder."""
    side.use(PREFILL)
    start = time.perf_counter()
    first, past, more = _prefill(side.model, case.prompts)
    middle = time.perf_counter()
    side.use(DECODE)
    logits, before = [first], time.perf_counter()
    for one in _steps(side.model, case.tokens, past, more):
        logits.append(one)
    seconds = {PREFILL: middle - start, DECODE: time.perf_counter() - before}
    return Turn(seconds, torch.stack(logits, 1).float())


def _prefill(model: Any, prompts: Tensor) -> tuple[Tensor, Any, dict[str, Any]]:
    """(B, V) logits, the cache, and what later steps need besides."""
    if not model.config.is_encoder_decoder:
        found = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
        return found.logits[:, -1], found.past_key_values, {}
    more = {"encoder_outputs": model.get_encoder()(input_ids=prompts)}
    start = torch.full_like(prompts[:, :1], model.config.decoder_start_token_id)
    found = model(decoder_input_ids=start, use_cache=True, **more)
    return found.logits[:, -1], found.past_key_values, more


def _steps(model: Any, tokens: Tensor, past: Any, more: dict[str, Any]) -> Iterator[Tensor]:
    """(B, V) logits after every token but the last."""
    name = "decoder_input_ids" if more else "input_ids"
    for step in range(tokens.shape[1] - 1):
        found = model(**{name: tokens[:, step : step + 1]}, past_key_values=past, use_cache=True, **more)
        past = found.past_key_values
        yield found.logits[:, -1]


def largest_difference(logits: Tensor, right: Tensor) -> float:
    """Relative to the largest logit."""
    return float((logits - right).abs().max() / right.abs().max())


def norm_difference(logits: Tensor, right: Tensor) -> float:
    """Relative in the norm."""
    return float((logits - right).norm() / right.norm())


def take_turns(sides: Sequence[Side], case: Case, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each side by phase, one entry a round, each of which begins with another side; all ran before."""
    seconds: dict[str, dict[str, list[float]]] = {side.name: {phase: [] for phase in PHASES} for side in sides}
    for step in range(rounds):
        for turn in range(len(sides)):
            side = sides[(turn + step) % len(sides)]
            found = run(side, case).seconds
            for phase in PHASES:
                if phase == DECODE or side.in_prefill:
                    seconds[side.name][phase].append(found[phase])
    return seconds
