"""The NLLB-MoE-54B benchmark: a tiny run from the command line, and the checkpoint that it makes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

import hf_integration
from fairseq_moe_opt.checkpoints import open_index, read_tensor
from tests.helpers.benchmark_modules import benchmark_modules, run_benchmark


def silent(_: str) -> None:
    """Progress that nobody watches."""


class Modules(NamedTuple):
    """The benchmark's own modules, scripts beside each other rather than a package."""

    weights: ModuleType
    run: ModuleType
    sides: ModuleType


@pytest.fixture(scope="module")
def modules() -> Iterator[Modules]:
    with benchmark_modules("_nllb54b_weights", "_nllb54b_run", "_sides") as found:
        yield Modules(*found)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a tiny run writes."""
    target = tmp_path_factory.mktemp("nllb54b") / "out" / "quick.json"
    sizes = ["--threads", "1", "--batch", "2", "--new-tokens", "4"]
    done = run_benchmark("nllb54b", "--quick", *sizes, "--json", str(target))
    assert done.exit_code == 0, done.output
    assert "peak RSS" in done.output
    return dict(json.loads(target.read_text()))


def test_rows_are_a_round_and_phase_each(content: dict[str, Any]) -> None:
    rows = content["rows"]
    assert [(row["round"], row["phase"]) for row in rows] == [(n, p) for n in (1, 2) for p in ("encoder", "decoder")]
    assert [row["tokens"] for row in rows] == [48, 8, 48, 8]
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert row["miss_rate"] == pytest.approx(row["misses"] / (row["hits"] + row["misses"]))
    assert rows[0]["hits"] == 0
    assert [len(line) for line in content["run"]["tokens"]] == [4, 4]


def test_every_miss_is_read_and_the_arena_is_within_the_budget(content: dict[str, Any]) -> None:
    buffer, rows = content["run"]["buffer"], content["rows"]
    assert buffer["slots"] < buffer["experts"] == 32
    assert buffer["arena_bytes"] <= content["run"]["expert_bytes"] / 4
    # Stored experts have no padding, and some reads were started ahead and are not waited for.
    expert = content["run"]["expert_bytes"] // 32
    assert all(row["bytes_read"] >= (row["misses"] - row["fetched_ahead_used"]) * expert for row in rows)
    assert sum(row["bytes_read"] for row in rows) >= 16 * expert


def test_the_tokens_are_those_of_the_resident_model(modules: Modules, content: dict[str, Any], tmp_path: Path) -> None:
    shape = replace(modules.sides.QUICK, layers=4)
    checkpoint = modules.weights.Checkpoint.of(shape, content["arguments"]["seed"])
    modules.weights.write_checkpoint(tmp_path / "model", checkpoint, silent)
    spec = {"folder": str(tmp_path / "model"), "options": {}, "new_tokens": 4, "batch": 2, "source_tokens": 24}
    with torch.inference_mode():
        _, tokens = modules.run.Run({**spec, "threads": torch.get_num_threads()}, tmp_path / "trace.json").round(1)
    assert tokens.tolist() == content["run"]["tokens"]


def test_a_killed_writer_goes_on_with_the_missing_shards(modules: Modules, tmp_path: Path) -> None:
    weights = modules.weights
    checkpoint = weights.Checkpoint.of(modules.sides.QUICK, 1)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    written = weights.write_checkpoint(whole, checkpoint, silent, shard_bytes=50_000)
    assert (written.kept, written.shards > 3) == (0, True)

    def die(_: str) -> None:
        if len(list(killed.glob("*.safetensors"))) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weights.write_checkpoint(killed, checkpoint, die, shard_bytes=50_000)
    (killed / "model-00003.safetensors.part").write_bytes(b"half a shard")
    assert weights.write_checkpoint(killed, checkpoint, silent, shard_bytes=50_000).kept == 2
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == {
        path.name: path.read_bytes() for path in killed.iterdir()
    }


def test_experts_differ_and_are_stored_as_int8(modules: Modules, tmp_path: Path) -> None:
    modules.weights.write_checkpoint(tmp_path / "model", modules.weights.Checkpoint.of(modules.sides.QUICK, 1), silent)
    index = open_index(tmp_path / "model")
    matrices = [read_tensor(record) for name, record in index.items() if record.dtype == torch.int8]
    assert len(matrices) == 2 * 8 * 2
    assert not any(torch.equal(a.flatten(), b.flatten()) for a, b in combinations(matrices, 2))
    model = hf_integration.from_pretrained(tmp_path / "model")
    assert next(model.parameters()).dtype == torch.bfloat16


def test_another_shape_or_a_foreign_folder_is_refused(modules: Modules, tmp_path: Path) -> None:
    shape, weights = modules.sides.QUICK, modules.weights
    mine, other = (weights.Checkpoint.of(one, 1) for one in (shape, replace(shape, experts=4)))
    weights.write_checkpoint(tmp_path / "mine", mine, silent)
    with pytest.raises(weights.FolderError, match=r"'experts': 8.*'experts': 4"):
        weights.write_checkpoint(tmp_path / "mine", other, silent)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    with pytest.raises(weights.FolderError, match="not empty"):
        weights.write_checkpoint(tmp_path / "foreign", mine, silent)


def test_a_full_disk_is_told_before_anything_is_written(
    modules: Modules, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(modules.weights.shutil, "disk_usage", lambda _: Usage(2**20))
    with pytest.raises(modules.weights.FolderError, match=r"needs \S+ MiB more in .*, where 1.0 MiB is free"):
        modules.weights.write_checkpoint(
            tmp_path / "model", modules.weights.Checkpoint.of(modules.sides.QUICK, 1), silent
        )
    assert not list((tmp_path / "model").glob("*.safetensors"))


def test_the_whole_model_has_54_billion_parameters(modules: Modules) -> None:
    with torch.device("meta"):
        tensors = list(modules.weights.tensors_of(modules.weights.NLLB_54B, noise=None))
    elements = sum(one.nbytes // one.dtype.itemsize for one in tensors if not one.name.endswith("_scale"))
    assert round(elements / 1e9, 1) == 54.5


def test_files_are_cold_only_if_the_disk_gave_them(modules: Modules) -> None:
    assert [modules.run.tier_of(100, disk) for disk in (100, 95, 94, 0, None)] == [
        "cold",
        "cold",
        "warm",
        "warm",
        "unknown",
    ]


def test_a_budget_without_room_is_one_line(tmp_path: Path) -> None:
    done = run_benchmark("nllb54b", "--quick", "--budget", "1 fortnight", "--folder", str(tmp_path / "model"))
    assert done.exit_code == 2
    assert "fortnight" in done.output
