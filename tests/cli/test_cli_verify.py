"""``moe-opt verify``: agreement where there is, and a failure where one way of computing is wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from fairseq_moe_opt.moe.kernels import available_kernels
from fairseq_moe_opt.moe.kernels.loop import LoopKernel
from hf_integration import from_pretrained
from hf_integration.verify import Comparison, compare, random_batches
from tests.cli.conftest import LANGUAGES, Run
from tests.helpers.releases import NLLB_SEEN_WRONG, RELEASE


def test_every_way_agrees(run: Run, checkpoint: Path) -> None:
    done = run("verify", checkpoint)
    assert done.code == 0, done.err
    assert "6 built-in sentences from eng_Latn to fra_Latn, float32 on cpu" in done.out
    ways = [line.split()[0] for line in done.out.splitlines() if "agrees" in line]
    assert ways == ["static", *(name for name in available_kernels() if name != "naive")]
    assert "DIFFERS" not in done.out


def test_own_text_and_languages(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a cat\n\nthe dog sat.\n" + "dog " * 100 + "\n", encoding="utf-8")
    done = run("verify", checkpoint, "--text", text, "--src-lang", "deu_Latn", "--tgt-lang", "eng_Latn")
    assert done.code == 0, done.err
    assert "3 sentences from deu_Latn to eng_Latn" in done.out


def test_random_tokens_without_a_tokenizer(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*")))
    done = run("verify", bare, "--dtype", "bfloat16", "--tolerance", "0.1")
    assert "random tokens" in done.out
    assert "bfloat16 on cpu" in done.out
    refused = run("verify", bare, "--text", __file__)
    assert (refused.code, "needs a tokenizer" in refused.error_line) == (2, True)


def test_a_wrong_kernel_is_caught(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = LoopKernel.run

    def wrong(self: LoopKernel, *arguments: object) -> None:
        right(self, *arguments)  # type: ignore[arg-type]
        arguments[-1].mul_(1.01)  # type: ignore[attr-defined]

    monkeypatch.setattr(LoopKernel, "run", wrong)
    done = run("verify", checkpoint)
    assert done.code == 1
    assert "differ from the naive loop" in done.error_line
    # The compiled kernel leaves experts with many rows to the loop: with old instruction sets, these are some already.
    assert {line.split()[0] for line in done.out.splitlines() if "DIFFERS" in line} - {"fused"} == {"loop"}


def test_the_tolerance_is_the_users(run: Run, checkpoint: Path) -> None:
    assert run("verify", checkpoint, "--tolerance", "0").code == 1


@pytest.mark.skipif(str(RELEASE) not in NLLB_SEEN_WRONG, reason=f"Transformers {RELEASE} was not seen to be wrong")
def test_the_installed_layers_are_shown_and_do_not_count(run: Run, checkpoint: Path) -> None:
    done = run("verify", checkpoint, "--stock")
    assert done.code == 0
    assert [line.split()[0] for line in done.out.splitlines() if "DIFFERS" in line] == ["transformers"]


def test_not_a_number_never_agrees() -> None:
    nan = float("nan")
    assert not Comparison("x", nan, nan, True).agrees(1.0)
    assert not Comparison("x", 0.0, 0.0, False).agrees(1.0)
    assert Comparison("x", 0.0, 1e-5, True).agrees(1e-4)


def test_the_model_comes_back_as_it_was(checkpoint: Path) -> None:
    model = from_pretrained(checkpoint, kernel="naive", capacity="checkpoint")
    batches = random_batches(model.config)
    found = compare(model, batches)
    assert {one.name for one in found} >= {"static", "loop"}
    assert (model.moe.options.kernel, model.moe.options.capacity) == ("naive", "checkpoint")
    assert torch.equal(batches[0].ids, random_batches(model.config)[0].ids)
    model.moe.undo()
    compare(model, batches)
    assert not hasattr(model, "moe")


def test_wrong_requests_are_one_line(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    blank = tmp_path / "blank.txt"
    blank.write_text("\n\n", encoding="utf-8")
    assert "no line with text" in run("verify", checkpoint, "--text", blank).error_line
    assert "no such file" in run("verify", checkpoint, "--text", tmp_path / "nothing").error_line
    assert "'xyz_Latn'" in run("verify", checkpoint, *LANGUAGES[:2], "--tgt-lang", "xyz_Latn").error_line
    assert "no such folder" in run("verify", tmp_path / "nothing").error_line
