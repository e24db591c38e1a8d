"""fairseq models over the golden checkpoints, and what tests compare of them. Needs fairseq: import it lazily."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils
from torch import Tensor

import fairseq_moe_opt
from fairseq_moe_opt.moe.types import Dispatch, Routing
from tests.helpers.goldens import FAIRSEQ_GOLDENS, read_arrays, read_json

fairseq_moe_opt.register_fairseq()

BATCHES = ("b0", "b1")
PAD, EOS = 1, 2
LANGUAGE_MODEL = "E_lm_moe_branch"
MODELS = ("A_top2_eom", "C_top1", "D_cmr", LANGUAGE_MODEL)


def golden_names(model: str) -> list[str]:
    """The names of a model's recorded runs."""
    return [path.stem for path in sorted((FAIRSEQ_GOLDENS / model / "tf").glob("*.json"))]


def data_folder(model: str) -> Path:
    """The binarised data of a model."""
    return FAIRSEQ_GOLDENS / "data" / ("binlm" if model == LANGUAGE_MODEL else "bin")


@cache
def record(model: str, name: str) -> dict[str, Any]:
    """Overrides, notes and generated tokens of a recorded run."""
    found: dict[str, Any] = read_json(FAIRSEQ_GOLDENS / model / "tf" / f"{name}.json")
    return found


@cache
def arrays(model: str, name: str) -> dict[str, Tensor]:
    """Its arrays."""
    return dict(read_arrays(FAIRSEQ_GOLDENS / model / "tf" / f"{name}.npz"))


def load(path: Path, data: Path, **overrides: Any) -> tuple[Any, Any]:
    """The model (in evaluation mode) and its task, as fairseq's own function loads them."""
    models, _, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(path)], arg_overrides={"data": str(data), **overrides}
    )
    return models[0].eval(), task


def load_golden(model: str, name: str, file: str = "checkpoint_last.pt", **options: Any) -> tuple[Any, Any]:
    """A golden's model with exactly its overrides; capacity as the checkpoint says unless ``options`` say more."""
    options = {"moe_capacity": "checkpoint", **record(model, name)["overrides"], **options}
    return load(FAIRSEQ_GOLDENS / model / file, data_folder(model), **options)


@dataclass
class Recorder:
    """Keeps the routing of every layer."""

    routings: dict[str, list[Routing]] = field(default_factory=dict)

    def observe(self, layer: str, routing: Routing, dispatch: Dispatch) -> None:
        self.routings.setdefault(layer, []).append(routing)


@dataclass(frozen=True)
class Outputs:
    """What one forced-decoding forward gave; states are (T, B, D), logits (B, T, V)."""

    logits: Tensor
    decoder_states: list[Tensor]
    encoder_out: Tensor | None = None
    encoder_states: list[Tensor] = field(default_factory=list)


def forced(model: Any, golden: dict[str, Tensor], batch: str) -> Outputs:
    """Run a golden's batch through a model."""
    source = golden[f"{batch}.src_tokens"]
    with torch.no_grad():
        if not hasattr(model, "encoder"):
            logits, extra = model(source)
            return Outputs(logits, extra["inner_states"])
        encoded = model.encoder(source, golden[f"{batch}.src_lengths"], return_all_hiddens=True)
        logits, extra = model.decoder(golden[f"{batch}.prev_output_tokens"], encoder_out=encoded)
    return Outputs(logits, extra["inner_states"], encoded["encoder_out"][0], encoded["encoder_states"])


def real_positions(golden: dict[str, Tensor], batch: str, side: str) -> Tensor:
    """(B, T) bool: tokens of ``side`` that are not padding."""
    known = golden.get(f"{batch}.prev_output_tokens") if side == "decoder" else None
    return (golden[f"{batch}.src_tokens"] if known is None else known) != PAD


def generate(model: Any, task: Any, golden: dict[str, Tensor], batch: str, beam: int) -> list[list[dict[str, Any]]]:
    """Hypotheses of every sentence, as the goldens were made: see the README beside them."""
    is_lm = not hasattr(model, "encoder")
    limits = {} if is_lm else {"max_len_a": 1.5, "max_len_b": 10}
    if is_lm:
        limits = {"max_len_b": 20}
    generator = task.build_generator([model], Namespace(beam=beam, **limits))
    source = golden[f"{batch}.src_tokens"]
    if not is_lm:
        net_input = {
            "src_tokens": source,
            "src_lengths": golden[f"{batch}.src_lengths"],
            "prev_output_tokens": golden[f"{batch}.prev_output_tokens"],
        }
        return list(task.inference_step(generator, [model], {"net_input": net_input}))
    prompt = source[:, :4]
    prefix = prompt[:, 1:] if int(source[0, 0]) == EOS else prompt
    sample = {"net_input": {"src_tokens": prompt, "src_lengths": torch.full((len(prompt),), 4)}}
    with torch.no_grad():
        return list(generator.generate([model], sample, prefix_tokens=prefix, bos_token=EOS))


@contextmanager
def recorded(model: Any) -> Iterator[Recorder]:
    """Watch every layer of ``model``."""
    recorder = Recorder()
    for block in model.moe.blocks:
        block.observe(recorder)
    yield recorder


def dense_weights(routing: Routing) -> Tensor:
    """(S, E) combine weights of a routing."""
    weights = routing.weight.new_zeros(routing.weight.shape[0], routing.num_experts + 1)
    return weights.scatter_add(1, routing.expert_index, routing.weight)[:, :-1]
