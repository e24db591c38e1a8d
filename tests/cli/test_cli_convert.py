"""``moe-opt convert``: from fairseq's files to a folder that translates."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Run

GOLDENS = Path(__file__).resolve().parents[1] / "data" / "goldens"


def test_a_converted_checkpoint_verifies(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "hf"
    done = run("convert", GOLDENS / "A_top2_eom" / "checkpoint_last.pt", target, "--dtype", "float32")
    assert done.code == 0, done.err
    assert str(target) in done.out
    assert "no tokenizer" in done.out
    checked = run("verify", target)
    assert checked.code == 0, checked.err + checked.out
    assert "random tokens" in checked.out


def test_a_bin_folder_becomes_safetensors(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    source = tmp_path / "bin"
    source.mkdir()
    torch.save(load_file(checkpoint / "model.safetensors"), source / "pytorch_model.bin")
    (source / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    assert run("convert", source, tmp_path / "out").code == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_wrong_conversions_are_one_line_and_leave_nothing(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    source, target = GOLDENS / "A_top2_eom" / "checkpoint_last.pt", tmp_path / "out"
    cases = {
        "no such file": ("convert", tmp_path / "nothing.pt", target),
        "'gguf'": ("convert", source, target, "--to", "gguf"),
        "--dtype": ("convert", source, target, "--dtype", "int4"),
        "exists already": ("convert", source, checkpoint),
        "cannot express": ("convert", GOLDENS / "C_top1" / "checkpoint_last.pt", target),
        "conditional MoE routing": ("convert", GOLDENS / "D_cmr" / "checkpoint_last.pt", target),
        "nothing.model": ("convert", source, target, "--spm", tmp_path / "nothing.model", "--dict", tmp_path / "d"),
    }
    for words, arguments in cases.items():
        done = run(*arguments)
        assert done.code == 2, done.err
        assert words in done.error_line
    assert list(tmp_path.iterdir()) == []
