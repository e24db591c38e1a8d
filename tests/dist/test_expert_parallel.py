"""The demo model with its experts spread over ranks: the tokens of one process, whoever holds what and has how much."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fairseq_moe_opt.errors import MoEError, OptionError, ParallelError, PlacementError
from fairseq_moe_opt.moe.trace import Trace, TraceLayer
from fairseq_moe_opt.parallel import ALL_REDUCE, ProcessGroupRanks, run_ranks
from fairseq_moe_opt.placement import Cluster, LoadHistory, Placement, place
from hf_integration import ExpertParallel, from_pretrained, generate_batches
from hf_integration.translate import load_tokenizer, pad_rows, translate_lines
from tests.helpers.ranks import start_ranks, values_of, without_content

pytestmark = pytest.mark.dist

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
MODEL = DEMO / "model"
NUM_EXPERTS = 16
LAYERS = tuple(f"model.{stack}.layers.{place}.ffn" for stack in ("encoder", "decoder") for place in (1, 3))
FINGERPRINT = Trace(tuple(TraceLayer(name, name.split(".")[1], NUM_EXPERTS) for name in LAYERS), ()).fingerprint
GREEDY = {"num_beams": 1, "max_new_tokens": 16}
PATIENCE = {"timeout": 120.0, "deadline": 240.0}


@cache
def sentences() -> tuple[str, ...]:
    """64 different ones, of many lengths."""
    with gzip.open(DEMO / "demo.tsv.gz", "rt", encoding="utf-8") as stream:
        return tuple(dict.fromkeys(line.split("\t")[1] for line in stream))[:64]


def placed(strategy: str, slots: Sequence[int], fingerprint: str = FINGERPRINT) -> Placement:
    """By made-up loads, some experts far hotter than others."""
    generator = np.random.default_rng(5)
    heat = generator.pareto(1.0, NUM_EXPERTS) + 1
    loads = {name: generator.poisson(20 * heat, (30, NUM_EXPERTS)) for name in LAYERS}
    return place(LoadHistory(loads), Cluster(tuple(slots)), strategy, fingerprint=fingerprint)


def translated(placement: Placement | None, parallel: bool, **options: Any) -> list[str]:
    model = load(placement, parallel, **options)
    lines = translate_lines(
        model, load_tokenizer(MODEL), sentences(), "eng_Latn", "fra_Latn", batch_size=12, generation=GREEDY
    )
    return list(lines)


def load(placement: Placement | None = None, parallel: bool = True, **options: Any) -> Any:
    spread = ExpertParallel(ProcessGroupRanks(), placement) if parallel else None
    return from_pretrained(MODEL, dtype="float32", parallel=spread, **options)


@cache
def alone(expert_dtype: str = "checkpoint") -> list[str]:
    return translated(None, parallel=False, expert_dtype=expert_dtype)


def translate_with(cases: dict[str, tuple[Placement | None, dict[str, Any]]]) -> dict[str, list[str]]:
    """Every case in one start of the processes."""
    return {name: translated(placement, parallel=True, **options) for name, (placement, options) in cases.items()}


def test_tokens_are_those_of_one_process_whatever_the_options(tmp_path: Path) -> None:
    cases: dict[str, tuple[Placement | None, dict[str, Any]]] = {
        "contiguous": (None, {"report": str(tmp_path / "report.json"), "trace": str(tmp_path / "trace.json")}),
        "greedy, uneven": (placed("greedy", (14, 2)), {}),
        "balanced, one replica": (placed("balanced", (9, 8)), {}),
        "greedy, int8": (placed("greedy", (8, 8)), {"expert_dtype": "int8"}),
    }
    for results in values_of(start_ranks(2, translate_with, cases, **PATIENCE)):
        for name, (_, options) in cases.items():
            assert results[name] == alone(options.get("expert_dtype", "checkpoint")), name
    files = [f"{kind}.rank-{rank}.json" for kind in ("report", "trace") for rank in range(2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == files


def batches_of(rank: int) -> list[dict[str, torch.Tensor]]:
    """Three batches for rank 0, none for rank 1, one for rank 2; sentences of one batch end at different times."""
    tokenizer = load_tokenizer(MODEL)
    tokenizer.src_lang = "eng_Latn"
    parts = {0: (slice(0, 4), slice(4, 6), slice(6, 11)), 1: (), 2: (slice(11, 14),)}[rank]
    padded = [pad_rows(tokenizer(list(sentences()[part]))["input_ids"], tokenizer.pad_token_id) for part in parts]
    return [{"input_ids": ids, "attention_mask": mask} for ids, mask in padded]


def settings(num_beams: int) -> dict[str, Any]:
    """Into French, and long enough for short sentences to end before the others of their batch."""
    forced = load_tokenizer(MODEL).convert_tokens_to_ids("fra_Latn")
    return {"num_beams": num_beams, "max_length": 24, "forced_bos_token_id": forced}


def routed_rows(model: Any) -> dict[str, int]:
    return {layer.name: layer.routed_rows for layer in model.moe.report().layers}


def generate_unequal_shares(num_beams: int) -> tuple[list[list[int]], dict[str, int]]:
    ranks = ProcessGroupRanks()
    model = load()
    outputs = generate_batches(model, batches_of(ranks.rank), **settings(num_beams))
    return [output.tolist() for output in outputs], routed_rows(model)


@pytest.mark.parametrize("num_beams", [1, 2, 4])
def test_ranks_with_more_and_fewer_batches_and_none(num_beams: int) -> None:
    results = values_of(start_ranks(3, generate_unequal_shares, num_beams, **PATIENCE))
    model = load(parallel=False)
    for rank, (tokens, rows) in enumerate(results):
        model.moe.reset()
        expected = generate_batches(model, batches_of(rank), **settings(num_beams))
        assert tokens == [output.tolist() for output in expected]
        # Dummy batches and finished sentences cost nothing; one process routes the latter as well.
        own = routed_rows(model)
        assert all(rows[name] == own[name] for name in LAYERS[:2])
        assert all(rows[name] <= own[name] for name in LAYERS[2:])
        if rank == 1:
            assert set(rows.values()) == {0}
    assert results[0][1][LAYERS[3]] < _routed_alone(model, 0, num_beams)


def _routed_alone(model: Any, rank: int, num_beams: int) -> int:
    model.moe.reset()
    generate_batches(model, batches_of(rank), **settings(num_beams))
    return routed_rows(model)[LAYERS[3]]


def share_batches() -> tuple[list[str], list[list[list[int]]], list[str], dict[str, int]]:
    """Translations, tokens with beams and drawn ones of ranks that share each batch; and what they refuse."""
    ranks = ProcessGroupRanks()
    spread = ExpertParallel(ranks, placed("balanced", (8, 8)), exchange=ALL_REDUCE)
    model = from_pretrained(MODEL, dtype="float32", parallel=spread)
    tokenizer = load_tokenizer(MODEL)
    lines = list(
        translate_lines(
            model, tokenizer, sentences()[:20], "eng_Latn", "fra_Latn", batch_size=12, generation=GREEDY
        )
    )
    model.moe.reset()
    tokens = [one.tolist() for one in generate_batches(model, batches_of(0), **settings(2))]
    rows = routed_rows(model)
    torch.manual_seed(ranks.rank)
    tokens.append(model.generate(**batches_of(0)[0], **settings(1), do_sample=True).tolist())
    messages = []
    for refused in (
        lambda: model.generate(**batches_of(2 * ranks.rank)[0], **settings(1)),
        lambda: model.generate(**batches_of(0)[0], **settings(1 + ranks.rank)),
        lambda: generate_batches(model, batches_of(0)[ranks.rank :], **settings(1)),
        lambda: model.generate(**batches_of(0)[0], synced_gpus=True),
        lambda: ExpertParallel(ranks, exchange="all-gather"),
    ):
        try:
            refused()
        except MoEError as error:
            messages.append(str(error))
    return lines, tokens, messages, rows


def test_ranks_that_share_their_batches() -> None:
    first, second = values_of(start_ranks(2, share_batches, **PATIENCE))
    assert first == second
    lines, (*beams, drawn), messages, rows = first
    model = load(parallel=False)
    tokenizer = load_tokenizer(MODEL)
    assert lines == list(
        translate_lines(model, tokenizer, sentences()[:20], "eng_Latn", "fra_Latn", batch_size=12, generation=GREEDY)
    )
    model.moe.reset()
    assert beams == [one.tolist() for one in generate_batches(model, batches_of(0), **settings(2))]
    assert rows[LAYERS[3]] < routed_rows(model)[LAYERS[3]]
    torch.manual_seed(0)
    assert drawn == model.generate(**batches_of(0)[0], **settings(1), do_sample=True).tolist()
    for message, text in zip(
        messages, ("batch: rank 1 has", "settings: rank 1 has", "number of batches: rank 1 has 2", "synced_gpus", "all-gather"), strict=True
    ):
        assert text in message


def what_a_rank_cannot_do_alone() -> tuple[list[str], dict[str, torch.Tensor], int]:
    model = load()
    here = sum(parameter.numel() for parameter in model.parameters() if parameter.device.type != "meta")
    messages = []
    for ask in (model.state_dict, model.half, lambda: model.generate(torch.ones(1, 1).long(), synced_gpus=False)):
        try:
            ask()
        except MoEError as error:
            messages.append(str(error))
    model.moe.undo()
    return messages, dict(model.state_dict()), here


def test_each_rank_reads_its_own_experts_and_undo_reads_the_others() -> None:
    model = load(parallel=False)
    model.moe.undo()
    whole = model.state_dict()
    experts = sum(value.numel() for name, value in whole.items() if ".experts." in name)
    total = sum(parameter.numel() for parameter in model.parameters())
    for messages, state, here in values_of(start_ranks(2, what_a_rank_cannot_do_alone, **PATIENCE)):
        assert here == total - experts // 2
        assert [message.split(",")[0] for message in messages[:1]] == [
            "the experts of this model are spread over 2 ranks"
        ]
        assert "device and dtype" in messages[1] and "synced_gpus" in messages[2]
        assert state.keys() == whole.keys()
        assert all(torch.equal(state[name], whole[name]) for name in whole)


def load_in_wrong_ways() -> list[Exception]:
    """Each way is tried by all ranks; what was raised."""
    rank = ProcessGroupRanks().rank
    ways: list[tuple[Placement | None, dict[str, Any]]] = [
        (placed("greedy", (8, 8), "another model"), {}),
        (placed("greedy", (6, 5, 5)), {}),
        (placed("greedy", (16, 0)), {}),
        (placed("greedy" if rank else "contiguous", (8, 8)), {}),
        (None, {"capacity": "checkpoint" if rank else "none"}),
        (None, {"gating": "static"}),
    ]
    raised: list[Exception] = []
    for placement, options in ways:
        try:
            load(placement, **options)
        except MoEError as error:
            raised.append(error)
    return [without_content(error) for error in raised]


def test_what_does_not_fit_is_refused_by_all_ranks_alike() -> None:
    first, second = values_of(start_ranks(2, load_in_wrong_ways, **PATIENCE))
    assert list(map(str, first)) == list(map(str, second))
    assert [type(error) for error in first] == [PlacementError] * 3 + [ParallelError] * 2 + [MoEError]
    for error, text in zip(
        first,
        (
            "made for the model another model",
            "made for 3 ranks; this job has 2",
            "rank 1 holds no expert",
            "placement: rank 1 has greedy",
            "option capacity: rank 1 has checkpoint, rank 0 has none",
            "option 'gating'",
        ),
        strict=True,
    ):
        assert text in str(error)


@pytest.mark.parametrize(("option", "value"), [("warm_start", "a.json"), ("prefetch", "router")])
def test_options_that_know_one_rank_only_are_refused(option: str, value: str) -> None:
    with pytest.raises(OptionError, match=option):
        run_ranks(
            1,
            lambda ranks: from_pretrained(
                MODEL, parallel=ExpertParallel(ranks), expert_memory="50%", **{option: value}
            ),
        )
