"""Models behind Transformers' ``ExpertsInterface`` on two gloo processes: the tokens of one. Checked with 5.23.0."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq_moe_opt.cli import main
from fairseq_moe_opt.parallel import EXCHANGES, ProcessGroupRanks
from fairseq_moe_opt.placement import Placement
from hf_integration import ExpertParallel, from_pretrained
from tests.dist.test_launch_generate import launch
from tests.helpers.compare import assert_close_relative
from tests.helpers.language_models import greedy, language_model, letters_tokenizer, logits_of
from tests.helpers.ranks import start_ranks, values_of

pytestmark = pytest.mark.dist

LAYERS = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
UNEVEN = Placement(dict.fromkeys(LAYERS, ((6, 1, 3), (0, 5, 2, 7, 4))), 8, 2, "hand")
SWAPPED = Placement(dict.fromkeys(LAYERS, ((0, 5, 2, 7), (6, 1, 3, 4))), 8, 2, "hand")


def run(folder: str) -> list[Any]:
    results = []
    for exchange in sorted(EXCHANGES):  # all-reduce, then all-to-all, which alone lets experts move
        for placement, way in ((None, {}), (UNEVEN, {}), (UNEVEN, {"expert_memory": "50%"})):
            parallel = ExpertParallel(ProcessGroupRanks(), placement, exchange)
            model = from_pretrained(folder, parallel=parallel, **way)
            model.generation_config.eos_token_id = None
            results.append((logits_of(model), greedy(model), model.moe.report().expert_bytes))
    moved = model.moe.rebalance(SWAPPED)
    assert moved.experts_moved > 0
    results.append((logits_of(model), greedy(model), model.moe.report().expert_bytes))
    return results


def run_undo(folder: str) -> bool:
    model = from_pretrained(folder, parallel=ExpertParallel(ProcessGroupRanks(), UNEVEN))
    model.moe.undo()
    original = language_model("Mixtral").state_dict()
    return all(torch.equal(value, original[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_two_processes_give_the_tokens_of_one(family: str, tmp_path: Path) -> None:
    model = language_model(family)
    model.save_pretrained(tmp_path)
    expected, tokens = logits_of(model), greedy(model)
    whole = from_pretrained(tmp_path).moe.report().expert_bytes
    ranks = values_of(start_ranks(2, run, str(tmp_path), timeout=60.0, deadline=90.0))
    for results in ranks:
        for logits, generated, _ in results:
            assert_close_relative(logits, expected)
            assert torch.equal(generated, tokens)
    for first, second in zip(*ranks, strict=True):
        assert first[2] + second[2] == whole
    # In equal parts, with three experts of eight, and in equal parts again once the others have come.
    assert [one[2] * 8 // whole for one in ranks[0]] == [4, 3, 3, 4, 3, 3, 4]


def test_undo_reads_the_experts_of_the_other_process(tmp_path: Path) -> None:
    language_model("Mixtral").save_pretrained(tmp_path)
    assert values_of(start_ranks(2, run_undo, str(tmp_path), timeout=60.0, deadline=90.0)) == [True, True]


def test_the_launcher_writes_what_one_process_does(tmp_path: Path) -> None:
    folder, prompts = tmp_path / "model", tmp_path / "in.txt"
    language_model("Olmoe").save_pretrained(folder)
    letters_tokenizer().save_pretrained(folder)
    prompts.write_text("a b c\nd e\n\nf g h i\nz\n", encoding="utf-8")
    settings = ("--batch-size", "2", "--max-new-tokens", "6")
    alone, output = tmp_path / "alone.txt", tmp_path / "out.txt"
    assert main(["generate", str(folder), str(prompts), *settings, "-o", str(alone)]) == 0
    launch(folder, prompts, output, settings)
    assert output.read_bytes() == alone.read_bytes()
