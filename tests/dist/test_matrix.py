"""Generation on 2, 3 and 4 processes gives one process' tokens: every strategy, buffered or not, either exchange.

Each start of the processes runs many cases. A difference would be accepted only where the reference could hardly decide
itself, and is counted; there is none.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fairseq_moe_opt.moe.trace import Trace, TraceLayer
from fairseq_moe_opt.parallel import ALL_REDUCE, ALL_TO_ALL, ProcessGroupRanks
from fairseq_moe_opt.placement import Cluster, LoadHistory, Placement, place, strategy_names
from fairseq_moe_opt.placement.strategies import get_strategy
from hf_integration import ExpertParallel, from_pretrained, generate_batches
from hf_integration.families.nllb_moe import expert_pairs, sparse_blocks, trace_layers
from hf_integration.translate import encode_texts, load_tokenizer, pad_rows
from tests.helpers.near_ties import CLOSE, first_gaps
from tests.helpers.nllb import VOCABULARY, tiny_model
from tests.helpers.ranks import start_ranks, values_of
from tests.helpers.text_samples import DEMO, demo_lines

pytestmark = pytest.mark.dist

BATCHES = (28, 12, 24)
"""Sentences of each batch, 64 together."""

SHARDS = {2: (2, 1), 3: (2, 0, 1), 4: (1, 0, 1, 1)}
"""How many of the batches each rank has."""

PATIENCE = {"timeout": 120.0, "deadline": 400.0}


@dataclass(frozen=True)
class Case:
    """A way to spread the experts, and options."""

    placement: Placement | None
    exchange: str = ALL_TO_ALL
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """A folder, 64 sentences in batches, and settings of ``generate``."""

    folder: str
    batches: tuple[dict[str, Tensor], ...]
    settings: dict[str, Any]


@cache
def demo_model() -> Model:
    """The demo's: 16 experts, which 3 ranks cannot share evenly."""
    tokenizer = load_tokenizer(DEMO / "model")
    texts = [line for line in dict.fromkeys(demo_lines()[::2]) if line.strip()][:64]
    rows, forced = encode_texts(tokenizer, texts, {"src_lang": "eng_Latn", "tgt_lang": "fra_Latn"})
    settings = {"num_beams": 1, "max_length": 8, "forced_bos_token_id": forced}
    return Model(str(DEMO / "model"), batches_of(rows, tokenizer.pad_token_id), settings)


def tiny(folder: Path) -> Model:
    """7 experts, which no number of ranks here can share evenly."""
    tiny_model(num_experts=7).save_pretrained(folder)
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 12, (64,), generator=generator).tolist()
    rows = [torch.randint(4, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return Model(str(folder), batches_of(rows, 1), {"num_beams": 1, "max_length": 8})


def batches_of(rows: Sequence[Sequence[int]], padding: int) -> tuple[dict[str, Tensor], ...]:
    left = iter(rows)
    padded = [pad_rows(list(islice(left, size)), padding) for size in BATCHES]
    return tuple({"input_ids": ids, "attention_mask": mask} for ids, mask in padded)


def alone(model: Model) -> tuple[Any, list[list[list[int]]]]:
    """One process: the model, and the tokens of every batch."""
    loaded = from_pretrained(model.folder, dtype="float32")
    with torch.no_grad():
        return loaded, [one.tolist() for one in generate_batches(loaded, model.batches, **model.settings)]


def placed(layers: Sequence[TraceLayer], strategy: str, num_ranks: int, spare_slots: int = 0) -> Placement:
    """By made-up loads, some experts far hotter than others; with replicas where the strategy makes them."""
    num_experts = layers[0].num_experts
    generator = np.random.default_rng(5)
    heat = generator.pareto(1.0, num_experts) + 1
    history = LoadHistory({layer.name: generator.poisson(20 * heat, (12, num_experts)) for layer in layers})
    spare = spare_slots if get_strategy(strategy).replicates else 0
    cluster = Cluster.even(num_ranks, num_experts, spare_slots=spare)
    return place(history, cluster, strategy, fingerprint=Trace(tuple(layers), ()).fingerprint)


def run_cases(model: Model, cases: dict[str, Case]) -> dict[str, tuple[list[list[list[int]]], bool]]:
    """Of every case this rank's batches in tokens, and whether it holds its own experts and no others."""
    ranks = ProcessGroupRanks()
    first = sum(SHARDS[ranks.size][: ranks.rank])
    results = {}
    for name, case in cases.items():
        parallel = ExpertParallel(ranks, case.placement, case.exchange)
        loaded = from_pretrained(model.folder, dtype="float32", parallel=parallel, **case.options)
        own = model.batches[first : first + SHARDS[ranks.size][ranks.rank]]
        batches = model.batches if case.exchange == ALL_REDUCE else own
        tokens = [one.tolist() for one in generate_batches(loaded, batches, **model.settings)]
        results[name] = tokens, holds_its_own(loaded, case, ranks)
    return results


def holds_its_own(model: Any, case: Case, ranks: ProcessGroupRanks) -> bool:
    layers = trace_layers(model)
    placement = case.placement or placed(layers, "contiguous", ranks.size)
    wanted = {layer.name: set(placement.layers[layer.name][ranks.rank]) for layer in layers}
    buffer = model.moe.report().buffer
    if buffer is not None:
        return bool(buffer.experts == sum(map(len, wanted.values())))
    return all(
        {number for number, pair in enumerate(expert_pairs(block)) if pair[0].weight.device.type != "meta"}
        == wanted[name]
        for name, block in sparse_blocks(model).items()
    )


def check(model: Model, num_ranks: int, cases: dict[str, Case]) -> None:
    """Run ``cases`` on ``num_ranks`` processes and compare with one."""
    reference, expected = alone(model)
    near_ties = 0
    results = values_of(start_ranks(num_ranks, run_cases, model, cases, **PATIENCE))
    for name, case in cases.items():
        parts = [result[name][0] for result in results]
        assert all(result[name][1] for result in results), f"{name}: other experts than its own on a rank"
        whole = parts if case.exchange == ALL_REDUCE else [[batch for part in parts for batch in part]]
        for found in whole:
            assert len(found) == len(expected)
            for inputs, right, other in zip(model.batches, expected, found, strict=True):
                gaps = first_gaps(reference, inputs, right, other)
                assert all(gap <= CLOSE for gap in gaps), f"{name}: other tokens, {gaps} apart in the reference"
                near_ties += len(gaps)
    if near_ties:
        warnings.warn(f"{near_ties} sentences differ where two logits are within {CLOSE}", stacklevel=2)


@pytest.mark.parametrize("num_ranks", SHARDS)
def test_every_strategy_gives_the_tokens_of_one_process(num_ranks: int) -> None:
    layers = trace_layers(from_pretrained(DEMO / "model", dtype="float32"))
    cases = {"contiguous, all-reduce": Case(None, ALL_REDUCE)}
    buffered = {"expert_memory": "40%"}
    for number, strategy in enumerate(strategy_names()):
        ways = {"resident": {}, "buffered": buffered}
        if num_ranks > 2:  # each strategy one way on 3 ranks, and the other way on 4
            del ways[list(ways)[(number + num_ranks) % 2]]
        for way, options in ways.items():
            spare = num_ranks if way == "resident" else 0
            cases[f"{strategy}, {way}"] = Case(placed(layers, strategy, num_ranks, spare), ALL_TO_ALL, options)
    cases["balanced, all-reduce, buffered"] = Case(placed(layers, "balanced", num_ranks), ALL_REDUCE, buffered)
    check(demo_model(), num_ranks, cases)


@pytest.mark.parametrize("num_ranks", SHARDS)
def test_a_number_of_experts_that_ranks_do_not_divide(num_ranks: int, tmp_path: Path) -> None:
    model = tiny(tmp_path)
    layers = trace_layers(from_pretrained(tmp_path, dtype="float32"))
    greedy = placed(layers, "greedy", num_ranks)
    assert len(set(greedy.slots_per_rank(layers[0].name))) == 2
    cases = {
        "contiguous": Case(None),
        "greedy, buffered": Case(greedy, ALL_TO_ALL, {"expert_memory": "50%"}),
        "contiguous, all-reduce": Case(None, ALL_REDUCE),
        "balanced, replicas": Case(placed(layers, "balanced", num_ranks, 2)),
    }
    check(model, num_ranks, cases)


def test_other_tokens_are_told_from_near_ties(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    reference, expected = alone(model)
    right = expected[0]
    assert first_gaps(reference, model.batches[0], right, right) == []
    assert first_gaps(reference, model.batches[0], right, [[*row, 1] for row in right]) == []
    other = [list(row) for row in right]
    other[2][3] += 1
    (gap,) = first_gaps(reference, model.batches[0], right, other)
    with torch.no_grad():
        inputs = {name: value[2:3] for name, value in model.batches[0].items()}
        logits = reference(**inputs, decoder_input_ids=torch.tensor([right[2][:3]])).logits[0, -1].sort().values
    assert gap == pytest.approx(float(logits[-1] - logits[-2]), abs=1e-6) and gap > CLOSE
