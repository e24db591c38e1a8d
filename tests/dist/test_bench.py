"""``launch bench``: ways that give the same tokens are timed, and what each rank did adds up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fairseq_moe_opt.cli import commands
from fairseq_moe_opt.errors import ParallelError
from fairseq_moe_opt.parallel import ALL_REDUCE, ALL_TO_ALL, ProcessGroupRanks
from fairseq_moe_opt.placement import Placement
from hf_integration import rank_bench
from hf_integration.families.nllb_moe import trace_layers
from hf_integration.launch import app
from hf_integration.rank_bench import BenchResult, Way, Work, made_up_rows, text_batches
from hf_integration.synced import SharedDecoding
from tests.helpers.nllb import VOCABULARY, tiny_model
from tests.helpers.ranks import start_ranks, values_of
from tests.helpers.text_samples import DEMO

pytestmark = pytest.mark.dist

CPU = torch.device("cpu")
WIDTH, BYTES = 32, 4
COUNTS = 8
"""Bytes of one count."""

FORWARDS = 2 * (1 + 4)
"""Of both sparse layers on a rank: two calls of ``generate``, the encoder once each and four steps of the decoder."""


def ways() -> list[Way]:
    """Both exchanges in order and with the experts of the two ranks swapped, but one."""
    layers = trace_layers(tiny_model())
    swapped = {layer.name: ((4, 5, 6, 7, 0), (1, 2, 3)) for layer in layers}
    placements = (None, Placement(swapped, 8, 2, "swapped"))
    return [Way(exchange, one) for one in placements for exchange in (ALL_TO_ALL, ALL_REDUCE)]


def work() -> Work:
    """5 sentences in 3 batches; 4 tokens of translation each."""
    batches = text_batches(made_up_rows(5, 6, VOCABULARY), 2, 1, CPU)
    return Work(batches, {"num_beams": 1, "min_new_tokens": 4, "max_new_tokens": 4}, None, 1)


def bench(folder: str) -> BenchResult:
    return rank_bench.measure(folder, {"dtype": "float32"}, work(), ways(), ProcessGroupRanks(), 2)


def bench_wrong_tokens(folder: str) -> str:
    right = rank_bench.generate_batches

    def wrong(model: Any, batches: Any, **settings: Any) -> list[Tensor]:
        outputs = right(model, batches, **settings)
        return [one + isinstance(model.moe.decoding, SharedDecoding) for one in outputs]

    rank_bench.generate_batches = wrong
    try:
        bench(folder)
    except ParallelError as error:
        return str(error)
    return "nothing was raised"


def test_every_way_is_measured(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    first, second = values_of(start_ranks(2, bench, str(tmp_path), timeout=60.0, deadline=120.0))
    # Rates are of the slowest rank; so both know the same.
    assert first == second
    assert (first.sentences, first.source_tokens, first.target_tokens) == (5, 5 * 6, 5 * 4)
    assert [(way.exchange, way.placement) for way in first.ways] == [
        (exchange, name) for name in ("contiguous", "swapped") for exchange in (ALL_TO_ALL, ALL_REDUCE)
    ]
    to_all, reduced, swapped, _ = first.ways
    for way in first.ways:
        assert len(way.encoder_seconds) == len(way.decoder_seconds) == 2
        assert min(*way.encoder_seconds, *way.decoder_seconds) > 0
        # Top-2 of every source token, and of the token that each step of the decoder begins with.
        assert sum(share.rows["encoder"] for share in way.ranks) == 2 * 5 * 6
        assert sum(share.rows["decoder"] for share in way.ranks) == 2 * 5 * 4
        assert sum(way.load(rank, "decoder") for rank in range(2)) == pytest.approx(1)
        assert all(share.exchange_seconds > 0 and share.waiting_seconds > 0 for share in way.ranks)
    assert [one.rows for one in to_all.ranks] == [one.rows for one in reduced.ranks]
    assert [one.rows for one in to_all.ranks] != [one.rows for one in swapped.ranks]
    # An all-reduce hands over every row on every rank.
    assert {share.bytes_leaving for share in reduced.ranks} == {2 * (5 * 6 + 5 * 4) * WIDTH * BYTES}
    # Of an all-to-all only rows of the other rank's experts leave, there and back, and counts of each expert.
    counts = 2 * COUNTS * 4 * FORWARDS
    rows = sum(share.bytes_leaving for share in to_all.ranks) - counts
    assert rows % (2 * WIDTH * BYTES) == 0 and 0 < rows // (2 * WIDTH * BYTES) < 2 * (5 * 6 + 5 * 4)


def test_ways_with_other_tokens_are_not_timed(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    for message in values_of(start_ranks(2, bench_wrong_tokens, str(tmp_path), timeout=60.0, deadline=120.0)):
        assert "all-reduce with the placement contiguous gives other tokens" in message
        assert "5 of 5 sentences, so nothing was timed" in message


def test_the_command_on_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    text, output = tmp_path / "in.txt", tmp_path / "bench.json"
    text.write_text("Open the file.\n\nClose all windows\n", encoding="utf-8")
    model = [str(DEMO / "model"), "--src-lang", "eng_Latn", "--tgt-lang", "fra_Latn", "--device", "cpu"]
    once = ["--rounds", "1", "--num-beams", "1"]
    assert commands.main(["bench", *model[:1], str(text), *model[1:], *once, "-o", str(output)], app) == 0
    shown = capsys.readouterr().out
    assert "2 sentences" in shown and "every way gave the same tokens" in shown and "all-reduce" in shown
    found = json.loads(output.read_text(encoding="utf-8"))
    assert [way["exchange"] for way in found["ways"]] == [ALL_TO_ALL, ALL_REDUCE]
    made_up = ["--sentences", "3", "--length", "5", "--exchange", "all-to-all"]
    assert commands.main(["bench", *model, *once, *made_up], app) == 0
    shown = capsys.readouterr().out
    assert "3 sentences, 15 tokens in, 15 out, 1 ranks" in shown and "all-reduce" not in shown
    assert commands.main(["bench", *model, "--moe-trace", "t.json"], app) == commands.BAD_INPUT
