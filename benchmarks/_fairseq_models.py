"""Random models that fairseq builds and runs, through the plugin: a translator and a language model.

One model serves every side: which gating its sparse layers use is switched between runs, so that all sides have the
same weights in the same memory.
"""

from __future__ import annotations

import math
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from _fairseq_work import ALL, ENCODER, CannotRunError, Outputs, Work, static_bytes
from _machine import available_bytes
from _random_weights import fill
from _sides import Shape
from _worker import source
from fairseq.data import Dictionary
from fairseq.models import ARCH_CONFIG_REGISTRY
from fairseq.sequence_scorer import SequenceScorer
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from torch import Tensor

import fairseq_moe_opt
from fairseq_moe_opt.options import MoEOptions

_MEMORY_SHARE = 0.9
"""Of the memory there is, what static gating's masks and buffers may take before it is not even tried."""


class Translator:
    """An encoder-decoder that translates with fairseq's SequenceGenerator."""

    def __init__(self, shape: Shape, capacity_fraction: float, seed: int) -> None:
        fairseq_moe_opt.register_fairseq()
        self._shape, self._fraction = shape, capacity_fraction
        dictionary = dictionary_of(shape.vocabulary)
        self._task = TranslationTask(TranslationConfig(), dictionary, dictionary)
        arguments = {"_name": "transformer", "share_all_embeddings": True, **_sparse(shape, capacity_fraction)}
        self._model = _filled(self._task, "transformer", arguments | _sizes(shape, "encoder", "decoder"), seed)

    def run(self, work: Work, options: MoEOptions) -> Outputs:
        """Generate ``work.new_tokens`` tokens a hypothesis; CannotRunError where static gating has no room."""
        _prepare(self._model, self._shape, self._fraction, work, options)
        sentences = source(work.batch, work.tokens, self._shape.vocabulary)["input_ids"]
        sentences[:, -1] = self._task.source_dictionary.eos()
        sample = {"net_input": {"src_tokens": sentences, "src_lengths": torch.full((work.batch,), work.tokens)}}
        # As many tokens for every hypothesis: the end token is held back until the maximum, and then it is forced.
        limits = {"max_len_a": 0, "max_len_b": work.new_tokens - 1, "min_len": work.new_tokens - 1}
        generator = self._task.build_generator([self._model], Namespace(beam=work.beam, **limits))
        with _watched(self._model.encoder) as encoder:
            start = time.perf_counter()
            found = self._task.inference_step(generator, [self._model], sample)
            seconds = time.perf_counter() - start
        hypotheses = [hypothesis for sentence in found for hypothesis in sentence]
        return _outputs(self._model, hypotheses, encoder.states, {ENCODER: encoder.seconds, ALL: seconds})


class LanguageModel:
    """A decoder that scores text with fairseq's SequenceScorer, as fairseq-eval-lm does."""

    def __init__(self, shape: Shape, capacity_fraction: float, seed: int) -> None:
        fairseq_moe_opt.register_fairseq()
        self._shape, self._fraction = shape, capacity_fraction
        self._task = LanguageModelingTask(LanguageModelingConfig(), dictionary_of(shape.vocabulary))
        arguments = {"_name": "transformer_lm", "share_decoder_input_output_embed": True, "dropout": 0.0}
        arguments |= {"tokens_per_sample": shape.positions, "max_target_positions": shape.positions}
        arguments |= _sparse(shape, capacity_fraction) | _sizes(shape, "decoder")
        self._model = _filled(self._task, "transformer_lm", arguments, seed)

    def run(self, work: Work, options: MoEOptions) -> Outputs:
        """Score ``work.tokens`` tokens of every sentence; CannotRunError where static gating has no room."""
        _prepare(self._model, self._shape, self._fraction, work, options)
        text = source(work.batch, work.tokens + 1, self._shape.vocabulary)["input_ids"]
        lengths = torch.full((work.batch,), work.tokens)
        sample = {"net_input": {"src_tokens": text[:, :-1], "src_lengths": lengths}, "target": text[:, 1:]}
        scorer = SequenceScorer(self._task.target_dictionary)
        start = time.perf_counter()
        found = scorer.generate([self._model], sample)
        seconds = time.perf_counter() - start
        return _outputs(self._model, [hypothesis for hypothesis, *_ in found], None, {ALL: seconds})


def _prepare(model: Any, shape: Shape, fraction: float, work: Work, options: MoEOptions) -> None:
    """Switch the gating; CannotRunError when static gating's tensors would not fit into memory."""
    model.moe.run_as(options)
    available = available_bytes()
    if options.gating != "static" or available is None:
        return
    rows = work.rows
    needed = static_bytes(shape, rows, rows if options.capacity == "none" else math.ceil(fraction * rows))
    if needed > _MEMORY_SHARE * available:
        raise CannotRunError(f"needs {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free")


def dictionary_of(symbols: int) -> Dictionary:
    """``symbols`` of them, fairseq's own four included."""
    dictionary = Dictionary()
    for number in range(symbols - len(dictionary)):
        dictionary.add_symbol(f"w{number}")
    return dictionary


def _sizes(shape: Shape, *sides: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for side in sides:
        values |= {f"{side}_layers": shape.layers, f"{side}_attention_heads": shape.heads}
        values |= {f"{side}_embed_dim": shape.d_model, f"{side}_ffn_embed_dim": shape.ffn_dim}
        values |= {f"{side}_input_dim": shape.d_model, f"{side}_output_dim": shape.d_model}
        values[f"{side}_normalize_before"] = True
    return values


def _sparse(shape: Shape, capacity_fraction: float) -> dict[str, Any]:
    return {
        "moe_freq": shape.sparse_step,
        "moe_expert_count": shape.experts,
        "moe_second_expert_policy": "all",
        "moe_gating_use_fp32": True,
        "moe_eval_capacity_token_fraction": capacity_fraction,
    }


def _filled(task: Any, architecture: str, arguments: Mapping[str, Any], seed: int) -> Any:
    """The model as fairseq builds it, with random weights from ``seed``."""
    cfg = Namespace(**arguments)
    ARCH_CONFIG_REGISTRY[architecture](cfg)
    model = task.build_model(cfg).eval()
    with torch.no_grad():
        fill(model, seed)
    return model


def _outputs(model: Any, hypotheses: list[dict[str, Any]], states: Tensor | None, seconds: dict[str, float]) -> Outputs:
    layers = model.moe.report().layers
    active: dict[str, list[float]] = {}
    for layer in layers:
        active.setdefault(layer.phase, []).append(layer.active_experts)
    return Outputs(
        tokens=[hypothesis["tokens"].tolist() for hypothesis in hypotheses],
        scores=torch.cat([hypothesis["positional_scores"] for hypothesis in hypotheses]),
        states=states,
        seconds=seconds,
        active_experts={phase: sum(means) / len(means) for phase, means in active.items()},
        dropped=sum(layer.dropped_rows for layer in layers) / max(sum(layer.routed_rows for layer in layers), 1),
    )


@dataclass
class _Watch:
    seconds: float = 0.0
    states: Tensor | None = None


@contextmanager
def _watched(encoder: Any) -> Iterator[_Watch]:
    """Time the encoder within generation; the generator calls this method of it, which runs no hooks."""
    watch, method = _Watch(), encoder.forward_torchscript

    def timed(net_input: dict[str, Tensor]) -> Any:
        start = time.perf_counter()
        encoded = method(net_input)
        watch.seconds += time.perf_counter() - start
        watch.states = encoded["encoder_out"][0]
        return encoded

    encoder.forward_torchscript = timed
    try:
        yield watch
    finally:
        del encoder.forward_torchscript
