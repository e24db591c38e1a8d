"""``--expert-dtype`` and ``--moe-expert-dtype``: converted, looked at, verified and translated with."""

from __future__ import annotations

from pathlib import Path

import pytest

from fairseq_moe_opt.cli.info import inspect_checkpoint
from tests.cli.conftest import LANGUAGES, Run

# Of the tiny checkpoint: D 32, F 64, 8 experts, two sparse layers, float32.
MATRICES, CHANNELS, LAYERS, EXPERTS = 2 * 32 * 64, 64 + 32, 2, 8


@pytest.fixture
def int8_checkpoint(run: Run, checkpoint: Path, tmp_path: Path) -> Path:
    done = run("convert", checkpoint, tmp_path / "int8", "--expert-dtype", "int8")
    assert done.code == 0, done.err
    return tmp_path / "int8"


def test_info_counts_bytes_and_parameters(run: Run, checkpoint: Path, int8_checkpoint: Path) -> None:
    floats, info = inspect_checkpoint(checkpoint), inspect_checkpoint(int8_checkpoint)
    assert info.parameters == floats.parameters
    assert [layer.parameters for layer in info.layers] == [layer.parameters for layer in floats.layers]
    # One byte a weight; a scale and a bias of four bytes each a channel.
    assert info.one_expert_bytes == MATRICES + 8 * CHANNELS
    assert info.expert_bytes == LAYERS * EXPERTS * info.one_expert_bytes
    assert info.dense_bytes == floats.dense_bytes
    assert info.expert_dtypes == {
        "int8": LAYERS * EXPERTS * MATRICES,
        "float32": LAYERS * EXPERTS * 8 * CHANNELS,
    }
    shown = run("info", int8_checkpoint).out
    assert "their dtype" in shown
    assert "int8 (64.0 KiB)" in shown
    assert "float32 (12.0 KiB)" in shown
    assert "their dtype" not in run("info", checkpoint).out


def test_verify_compares_ways_of_computing_int8(run: Run, int8_checkpoint: Path) -> None:
    done = run("verify", int8_checkpoint)
    assert done.code == 0, done.err + done.out
    assert "float32 with int8 experts on cpu" in done.out
    agreed = [line.split()[0] for line in done.out.splitlines() if "agrees" in line]
    assert [way for way in agreed if way != "fused"] == ["static", "loop"]


def test_translations_are_those_of_the_converted_folder(run: Run, checkpoint: Path, int8_checkpoint: Path) -> None:
    text = b"a cat\nthe dog sat.\n"
    common = (*LANGUAGES, "--num-beams", 1, "--max-new-tokens", 8)
    loaded = run("translate", checkpoint, *common, "--moe-expert-dtype", "int8", stdin=text)
    converted = run("translate", int8_checkpoint, *common, stdin=text)
    assert loaded.code == converted.code == 0, loaded.err + converted.err
    assert loaded.out == converted.out
    assert len(loaded.out.splitlines()) == 2


def test_wrong_requests_are_one_line(run: Run, int8_checkpoint: Path, tmp_path: Path) -> None:
    assert "int8 already" in run("convert", int8_checkpoint, tmp_path / "x", "--expert-dtype", "bf16").error_line
    assert "--expert-dtype" in run("convert", int8_checkpoint, tmp_path / "x", "--expert-dtype", "int4").error_line
    refused = run("translate", int8_checkpoint, *LANGUAGES, "--moe-kernel", "grouped_mm", stdin=b"a\n")
    assert "use kernel='loop'" in refused.error_line
