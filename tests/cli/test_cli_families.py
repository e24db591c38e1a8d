"""``moe-opt`` on folders of models behind Transformers' ``ExpertsInterface``: info, verify and generate."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from fairseq_moe_opt.cli.info import inspect_checkpoint
from fairseq_moe_opt.moe.kernels import available_kernels
from tests.cli.conftest import Run
from tests.helpers.language_models import language_model, letters_tokenizer

Saved = Callable[[str], Path]
# D 32, F 24, gated: numbers of one expert's matrices. GPT-OSS has biases: two of F, one of D.
MATRICES, BIASES = 3 * 32 * 24, 2 * 24 + 32


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A checkpoint of a family with a tokenizer, as Transformers saves it."""

    @cache
    def save(family: str) -> Path:
        folder = tmp_path_factory.mktemp(family)
        language_model(family).save_pretrained(folder)
        letters_tokenizer().save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize(
    ("family", "expert"),
    [("Mixtral", MATRICES), ("Olmoe", MATRICES), ("GptOss", MATRICES + BIASES), ("GraniteMoe", MATRICES)],
)
def test_info_knows_experts_in_every_stored_form(saved: Saved, family: str, expert: int) -> None:
    """One tensor an expert, stacks, and GraniteMoE's stacks, which have names of their own."""
    info = inspect_checkpoint(saved(family))
    assert [(layer.phase, layer.number, layer.num_experts) for layer in info.layers] == [
        ("decoder", 0, 8),
        ("decoder", 1, 8),
    ]
    assert (info.top_k, info.width) == (2, 32)
    assert info.one_expert_bytes == expert * 4
    assert info.expert_bytes == 2 * 8 * expert * 4
    parameters = {id(one): one.numel() for one in language_model(family).parameters()}
    assert info.parameters == sum(parameters.values())


@pytest.mark.parametrize("family", ["Mixtral", "Olmoe", "GptOss"])
def test_verify_compares_kernels_and_transformers_own_code(run: Run, saved: Saved, family: str) -> None:
    done = run("verify", saved(family), "--moe-expert-memory", "50%", "--stock")
    assert done.code == 0, done.err
    ways = [line.split()[0].rstrip(",") for line in done.out.splitlines() if "agrees" in line]
    assert ways == [*(name for name in available_kernels() if name != "naive"), "transformers", "buffered"]
    assert "DIFFERS" not in done.out
    refused = run("verify", saved(family), "--moe-capacity", "checkpoint")
    assert refused.code == 2 and "these models drop nothing" in refused.error_line


def test_generate_continues_lines_resident_and_buffered(run: Run, saved: Saved) -> None:
    text = b"a b c\nd e\n"
    done = run("generate", saved("Olmoe"), "--max-new-tokens", 4, stdin=text)
    assert done.code == 0, done.err
    assert [line[: len(start)] for line, start in zip(done.out.splitlines(), ("a b c", "d e"), strict=True)] == [
        "a b c",
        "d e",
    ]
    assert done.err == ""
    assert run("generate", saved("Olmoe"), "--max-new-tokens", 4, "--moe-expert-memory", "40%", stdin=text) == done
