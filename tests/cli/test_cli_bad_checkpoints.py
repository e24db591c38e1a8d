"""Bad checkpoints, through ``info`` and both ways of ``convert``: one line that names the file, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fairseq_moe_opt.checkpoints import convert
from tests.cli.conftest import Run
from tests.helpers.goldens import FAIRSEQ_GOLDENS

GOLDEN = FAIRSEQ_GOLDENS / "A_top2_eom"


def shards(folder: Path) -> Path:
    for part in ("shared", "rank-0", "rank-1"):
        shutil.copy(GOLDEN / f"checkpoint_last-{part}.pt", folder / f"x-{part}.pt")
    return folder / "x.pt"


def cut(path: Path, share: float = 0.6) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def truncated(part: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = shards(folder)
        cut(folder / f"x-{part}.pt")
        return path

    return make


def truncated_single(folder: Path) -> Path:
    shutil.copy(GOLDEN / "checkpoint_single.pt", folder / "x.pt")
    cut(folder / "x.pt")
    return folder / "x.pt"


def missing(part: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = shards(folder)
        (folder / f"x-{part}.pt").unlink()
        return path

    return make


def of_another_moment(folder: Path) -> Path:
    path = shards(folder)
    content = torch.load(folder / "x-rank-1.pt", weights_only=False)
    content["optimizer_history"][-1]["num_updates"] = 900
    torch.save(content, folder / "x-rank-1.pt")
    return path


def of_another_run(folder: Path) -> Path:
    """Same shapes, same number of updates: only the options tell."""
    path = shards(folder)
    content = torch.load(folder / "x-rank-1.pt", weights_only=False)
    content["cfg"]["model"].moe_eom = 0.5
    torch.save(content, folder / "x-rank-1.pt")
    return path


class Foreign:
    """A class that no checkpoint may hold."""


def foreign(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = shards(folder)
        if name == "x.pt":
            shutil.copy(GOLDEN / "checkpoint_single.pt", path)
        content = torch.load(folder / name, weights_only=False)
        content["extra_state"]["surprise"] = Foreign()
        torch.save(content, folder / name)
        return path

    return make


def old_format_rank(folder: Path) -> Path:
    """Written by an old torch and cut short besides."""
    path = shards(folder)
    content = torch.load(folder / "x-rank-1.pt", weights_only=False)
    torch.save(content, folder / "x-rank-1.pt", _use_new_zipfile_serialization=False)
    cut(folder / "x-rank-1.pt")
    return path


def fully_sharded(folder: Path) -> Path:
    shutil.copy(GOLDEN / "checkpoint_last-shared.pt", folder / "x-rank-0-shard1.pt")
    return folder / "x-rank-0-shard1.pt"


def truncated_safetensors(folder: Path) -> Path:
    convert(GOLDEN / "checkpoint_single.pt", folder / "hf")
    cut(folder / "hf" / "model.safetensors")
    return folder / "hf"


def missing_shard(folder: Path) -> Path:
    convert(GOLDEN / "checkpoint_single.pt", folder / "hf", shard_bytes=400_000)
    next(iter(sorted((folder / "hf").glob("*.safetensors")))).unlink()
    return folder / "hf"


BAD: Mapping[str, tuple[Callable[[Path], Path], str]] = {
    "truncated single file": (truncated_single, "x.pt: is truncated"),
    "truncated shared file": (truncated("shared"), "x-shared.pt: is truncated"),
    "truncated rank file": (truncated("rank-1"), "x-rank-1.pt: is truncated"),
    "missing shared file": (missing("shared"), "x-shared.pt is missing"),
    "missing first rank file": (missing("rank-0"), "x-rank-0.pt is missing"),
    "missing last rank file": (missing("rank-1"), "a rank file is missing"),
    "rank file of another moment": (of_another_moment, "x-rank-1.pt: is of another checkpoint: 900 updates"),
    "rank file of another run": (of_another_run, "x-rank-1.pt: is of another checkpoint than x-shared.pt: moe_eom"),
    "foreign class in a single file": (foreign("x.pt"), "x.pt: its pickle refers to"),
    "foreign class in the shared file": (foreign("x-shared.pt"), "x-shared.pt: its pickle refers to"),
    "foreign class in a rank file": (foreign("x-rank-1.pt"), "x-rank-1.pt: its pickle refers to"),
    "old format, truncated": (old_format_rank, "x-rank-1.pt"),
    "shard of a fully sharded run": (fully_sharded, "is one shard of a fully sharded run"),
    "truncated safetensors": (truncated_safetensors, "model.safetensors: is truncated"),
    "missing safetensors shard": (missing_shard, "is missing"),
}


@pytest.mark.parametrize("how", ["info", "convert --to hf", "convert --to fairseq", "convert --to fairseq --ranks 2"])
@pytest.mark.parametrize("case", BAD)
def test_one_line_and_nothing_written(run: Run, tmp_path: Path, case: str, how: str) -> None:
    make, said = BAD[case]
    (tmp_path / "source").mkdir()
    (tmp_path / "out").mkdir()
    command, *options = how.split()
    target = tmp_path / "out" / ("x.pt" if "fairseq" in options else "hf")
    path = make(tmp_path / "source")
    done = run(command, path, *options) if command == "info" else run(command, path, target, *options)
    assert done.code == 2, done.err
    assert said in done.error_line
    assert list((tmp_path / "out").iterdir()) == []


def test_wrong_options_are_one_line_and_leave_nothing(run: Run, tmp_path: Path) -> None:
    convert(GOLDEN / "checkpoint_single.pt", tmp_path / "hf")
    (tmp_path / "dict.txt").write_text("a 1\nb 1\n", encoding="utf-8")
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "x.pt"
    cases: dict[str, tuple[Any, ...]] = {
        "3 does not divide the 8 experts of a layer; these do: 1, 2, 4, 8": (target, "--to", "fairseq", "--ranks", "3"),
        "--ranks": (target, "--to", "fairseq", "--ranks", "-1"),
        "only fairseq has rank files": (tmp_path / "out" / "hf", "--ranks", "2"),
        "'src_lang'": (target, "--to", "fairseq", "--src-lang", "eng_Latn"),
        "dict.txt: gives 6 symbols": (target, "--to", "fairseq", "--dict", tmp_path / "dict.txt"),
        "name it x.pt": (tmp_path / "out" / "folder", "--to", "fairseq"),
        "exists already": (GOLDEN / "checkpoint_last.pt", "--to", "fairseq"),
        "nothing.model": (target, "--to", "fairseq", "--spm", tmp_path / "nothing.model"),
    }
    for words, arguments in cases.items():
        done = run("convert", tmp_path / "hf", *arguments)
        assert done.code == 2, (words, done.err)
        assert words in done.error_line
    assert list((tmp_path / "out").iterdir()) == []


def test_convert_says_what_it_wrote_and_what_it_could_not(run: Run, tmp_path: Path) -> None:
    convert(GOLDEN / "checkpoint_single.pt", tmp_path / "hf")
    done = run("convert", tmp_path / "hf", tmp_path / "out" / "x.pt", "--to", "fairseq", "--ranks", "4")
    assert done.code == 0, done.err
    assert "in 5 files" in done.out
    assert "note: no spm.model" in done.out
    found = run("info", tmp_path / "out" / "x.pt", "--json")
    assert json.loads(found.out)["format"] == "fairseq"
