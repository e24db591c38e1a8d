"""The profile of what surrounds the experts: a tiny run, whose time each component's is, and how pieces are joined."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from hf_integration import optimize
from tests.helpers.benchmark_modules import ROOT, benchmark_modules
from tests.helpers.nllb import batch, tiny_model


@dataclass(frozen=True)
class Modules:
    """The benchmark's own modules, which are scripts beside each other rather than a package."""

    around: ModuleType
    components: ModuleType


@pytest.fixture(scope="module")
def modules() -> Iterator[Modules]:
    with benchmark_modules("around", "_components") as found:
        yield Modules(*found)


@pytest.mark.slow
def test_a_tiny_run_writes_every_component_of_both_phases(modules: Modules, tmp_path: Path) -> None:
    target = tmp_path / "around.json"
    arguments = ["--quick", "--dtype", "float32", "--rounds", "2", "--threads", "1", "--json", str(target)]
    done = subprocess.run(
        [sys.executable, "benchmarks/around.py", *arguments, "--before", str(ROOT), "--reference", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(target.read_text(encoding="utf-8"))["rows"]
    sides = ("this project before", "this project")
    assert [(row["phase"], row["side"]) for row in rows] == [
        (phase, side) for side in sides for phase in ("encoder", "decoder")
    ]
    for row in rows:
        spent = row["seconds"]
        assert tuple(spent) == modules.components.COMPONENTS and row["tokens_equal"]
        assert all(spent[name] > 0 for name in ("router", "experts", "dense FFN", "attention", "layer norm"))
        assert (spent["lm_head"] > 0) == (row["phase"] == "decoder")


def test_components_add_up_to_the_whole_and_leave_no_hooks(modules: Modules) -> None:
    model, inputs = tiny_model(), batch()
    optimize(model, profile=True)
    before = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    with torch.no_grad():
        seconds, output = modules.components.seconds_of(model, lambda: model(**inputs))
    assert output.logits.shape == (3, 5, 96)
    assert seconds["around the forward"] > 0 and seconds["experts"] > 0
    assert seconds["router"] == pytest.approx(model.moe.report().step_seconds["routing"])
    assert [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()] == before


def test_modules_belong_to_the_component_of_their_class(modules: Modules) -> None:
    model = tiny_model()
    found = {name: modules.components.component_of(name, module) for name, module in model.named_modules()}
    assert found["lm_head"] == "lm_head"
    layer = "model.decoder.layers"
    assert found[f"{layer}.0.ffn"] == "dense FFN" and found[f"{layer}.1.ffn"] == "experts"
    assert found[f"{layer}.1.ffn.router"] == "router"
    assert found[f"{layer}.1.cross_attention"] == "attention"
    assert found[f"{layer}.1.ff_layer_norm"] == "layer norm"
    assert found["model.decoder.embed_positions"] == "embedding"
    assert found[f"{layer}.1.ffn.experts.expert_0"] is None and found[f"{layer}.0.ffn.fc1"] is None


def test_pieces_of_one_measurement_are_joined_and_others_refused(modules: Modules, tmp_path: Path) -> None:
    def row(dtype: str, size: int, whole: float) -> dict[str, Any]:
        return {"dtype": dtype, "batch": size, "whole": whole}

    path, arguments = tmp_path / "around.json", {"seed": 1}
    assert modules.around.merged(path, arguments, [row("float32", 1, 5.0)]) == [row("float32", 1, 5.0)]
    content = {"arguments": arguments, "rows": [row("float32", 1, 5.0), row("float32", 32, 9.0)]}
    path.write_text(json.dumps(content), encoding="utf-8")
    joined = modules.around.merged(path, arguments, [row("float32", 32, 8.0), row("bfloat16", 1, 3.0)])
    assert joined == [row("float32", 1, 5.0), row("float32", 32, 8.0), row("bfloat16", 1, 3.0)]
    with pytest.raises(SystemExit, match="other arguments"):
        modules.around.merged(path, {"seed": 2}, [])
