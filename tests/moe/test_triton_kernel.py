"""The triton kernel without triton: its plan, its refusals, its counts; and with it, in a process of its own.

``triton_interpreted.py`` beside this file has the tests of the device code. Triton settles when it is imported whether
functions are compiled or interpreted, so they run in a process that has asked for the interpreter.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fairseq_moe_opt.errors import KernelError, OptionError
from fairseq_moe_opt.moe import GShardTop2Router, MoELayer, ResidentExperts
from fairseq_moe_opt.moe.device_counts import DeviceCounts
from fairseq_moe_opt.moe.kernels import available_kernels, choose_kernel
from fairseq_moe_opt.moe.kernels.blocks import most_blocks, plan_choices, plan_segments
from fairseq_moe_opt.moe.report import LayerCounters
from fairseq_moe_opt.moe.types import Segment
from fairseq_moe_opt.options import MoEOptions
from tests.helpers.layers import layer_of, random_experts

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ROOT = Path(__file__).resolve().parents[2]
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (the dev extra, on Linux)")


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, without the interpreter unless it is asked for."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env = {**kept, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_choices_become_blocks() -> None:
    """Experts 0 and 2 have three rows and one; 3 marks a choice that is not computed; blocks are of two rows."""
    plan = plan_choices(torch.tensor([[2, 0], [3, 0], [0, 3]]), 3, 2)
    # Choices by number: 0:e2 1:e0 2:- 3:e0 4:e0 5:-
    assert plan.order.tolist() == [1, 3, 4, 0, 2, 5]
    assert plan.counts.tolist() == [3, 0, 1]
    # At most 3 begun experts and one block more for the 3 rows after their first: the last one here is none.
    assert plan.blocks[0].tolist() == [0, 0, 2, 3]
    assert plan.blocks[1:, :3].tolist() == [[0, 2, 3], [3, 3, 4]]


@pytest.mark.parametrize(
    ("rows", "experts", "block_rows", "expected"),
    [(0, 4, 16, 0), (1, 4, 16, 1), (4, 4, 16, 4), (19, 4, 16, 4), (20, 4, 16, 5), (100, 1, 16, 7), (7, 3, 1, 7)],
)
def test_blocks_of_the_worst_distribution(rows: int, experts: int, block_rows: int, expected: int) -> None:
    assert most_blocks(rows, experts, block_rows) == expected


@given(st.integers(1, 6), st.integers(1, 5), st.data())
def test_every_computed_choice_is_in_one_block_of_its_expert(
    num_experts: int, block_rows: int, data: st.DataObject
) -> None:
    index = torch.tensor(data.draw(st.lists(st.integers(0, num_experts), max_size=30)), dtype=torch.int64)[:, None]
    plan = plan_choices(index, num_experts, block_rows)
    assert plan.blocks.shape[1] == most_blocks(len(index), num_experts, block_rows)
    seen = []
    for expert, start, stop in plan.blocks.t().tolist():
        if expert < num_experts:
            rows = plan.order[start : min(start + block_rows, stop)]
            assert index[rows, 0].tolist() == [expert] * len(rows) != []
            seen += rows.tolist()
    assert seen == [row for row in plan.order.tolist() if index[row, 0] < num_experts]


def test_segments_become_blocks() -> None:
    blocks = plan_segments([Segment(1, 0, 5), Segment(4, 5, 6)], 2, CPU)
    assert blocks.tolist() == [[1, 1, 1, 4], [0, 2, 4, 5], [5, 5, 5, 6]]


def test_the_kernel_refuses_what_it_does_not_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "triton" not in available_kernels()
    for device, dtype, reason in (
        (CPU, torch.float32, "not for cpu"),
        (torch.device("meta"), torch.float32, "runs on cuda, not meta"),
        (CUDA, torch.int8, "not torch.int8"),
        (CUDA, torch.float64, "not torch.float64"),
    ):
        with pytest.raises(KernelError, match=rf"'triton' cannot run here: .*{reason}; use kernel='loop'"):
            choose_kernel("triton", device, dtype)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(KernelError, match="not installed"):
        choose_kernel("triton", CUDA, torch.float32)


@pytest.mark.parametrize(
    ("capability", "dtype", "installed", "chosen"),
    [
        ((9, 0), torch.bfloat16, True, "grouped_mm"),
        ((8, 0), torch.float16, True, "triton"),
        ((8, 0), torch.float32, True, "triton"),
        ((8, 0), torch.float32, False, "loop"),
        ((8, 0), torch.int8, True, "loop"),
        ((7, 5), torch.float32, True, "triton"),
        ((7, 5), torch.float16, True, "loop"),  # no tensor cores in Triton's code for it
        ((7, 5), torch.bfloat16, True, "loop"),
        ((7, 0), torch.float32, True, "loop"),
    ],
)
def test_auto_on_cuda(
    capability: tuple[int, int], dtype: torch.dtype, installed: bool, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    assert choose_kernel("auto", CUDA, dtype).name == chosen
    assert choose_kernel("auto", CUDA, dtype, apart=True).name == "loop"


def test_auto_heeds_the_activation_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    clamped = "swiglu(alpha=1.702,limit=7.0,offset=1.0)"
    assert choose_kernel("auto", CUDA, torch.float16, activation=clamped).name == "loop"


def test_auto_on_cuda_computes_experts_that_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a model that was moved to the device after it had been optimised."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    experts, rows = random_experts(3), cast(Tensor, SimpleNamespace(device=CUDA))
    packed = layer_of(GShardTop2Router(3), experts)
    assert packed._kernel(rows).name == "triton"
    store = ResidentExperts(3, experts.expert)
    apart = MoELayer(torch.relu, packed.router, store, packed.config, packed.counters)
    assert apart._kernel(rows).name == "loop"


def test_buffered_experts_have_no_stack() -> None:
    with pytest.raises(OptionError, match="'triton' computes from one tensor of all experts"):
        MoEOptions(kernel="triton", expert_memory="25%")


def test_counts_of_the_device_join_those_of_the_host() -> None:
    counters = LayerCounters("layer", "encoder", 3)
    for counts, dropped in (([2, 0, 1], 1), ([1, 1, 1], 0)):
        counters.add_later(2, torch.tensor(counts), torch.tensor(dropped), "triton")
    for _ in range(2):  # asking again counts nothing twice
        report = counters.snapshot()
        assert (report.calls, report.tokens, report.dropped_rows) == (2, 4, 1)
        assert (report.routed_rows, report.computed_rows) == (7, 6)
        assert (report.active_experts, report.max_active_experts) == (2.5, 3)
        assert (report.expert_rows, report.kernels) == ((3, 1, 2), ("triton",))
    counters.add_later(1, torch.tensor([0, 0, 2]), None, "triton")
    assert (counters.snapshot().calls, counters.snapshot().expert_rows) == (3, (3, 1, 4))
    counters.reset()
    assert (counters.snapshot().calls, counters.snapshot().kernels) == (0, ())


def test_counts_made_in_inference_mode_go_on_outside() -> None:
    with torch.inference_mode():
        sums = DeviceCounts(2, CPU)
        sums.add(1, torch.tensor([1, 0]), None)
    sums.add(1, torch.tensor([0, 1]), None)
    assert sums.read().rows == (1, 1)


def test_the_engine_does_not_import_triton() -> None:
    script = "import sys, fairseq_moe_opt.moe as m; m.available_kernels(); print('triton' in sys.modules)"
    done = run_python("-c", script)
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr


@needs_triton
def test_the_device_code_in_the_interpreter() -> None:
    file = "tests/moe/triton_interpreted.py"
    done = run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", file, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout and "skipped" not in done.stdout


COMPILE = """
import torch
from tests.helpers.triton_compiling import compiled
for capability, dtype in ((75, torch.float32), (80, torch.bfloat16)):
    print(capability, compiled(capability, dtype, rows=1, gated=True))
"""


@needs_triton
@pytest.mark.slow
def test_the_device_code_compiles_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    done = run_python("-W", "ignore", "-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    shared = dict(line.split() for line in done.stdout.splitlines())
    assert sorted(shared) == ["75", "80"]
    assert 0 < int(shared["75"]) <= 64 * 1024 and 0 < int(shared["80"]) <= 99 * 1024
