"""The compiled kernel against the oracle, at every instruction set this machine has; and installations without it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fairseq_moe_opt.errors import KernelError
from fairseq_moe_opt.moe import LayerConfig, LayerCounters, MoELayer, ResidentExperts, SoftmaxTopKRouter
from fairseq_moe_opt.moe.activations import ClampedSwiglu
from fairseq_moe_opt.moe.experts import expert_ffn
from fairseq_moe_opt.moe.kernels import available_kernels, choose_kernel, extension, get_kernel, limits
from fairseq_moe_opt.moe.quantization import quantize_into
from fairseq_moe_opt.moe.stacked_experts import StackLayout, Stacks
from fairseq_moe_opt.moe.types import ExpertWave, ExpertWeights, Segment

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "fairseq_moe_opt" / "moe" / "kernels"
EXTENSION = extension.load()
LEVELS = () if isinstance(EXTENSION, str) else extension.LEVELS[: EXTENSION.level + 1]
needs_extension = pytest.mark.skipif(isinstance(EXTENSION, str), reason=f"no fused kernel here: {EXTENSION}")
DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.int8, torch.float32),
    (torch.int8, torch.bfloat16),
)

CLAMPED = ClampedSwiglu(1.702, 1.5, 1.0).name


@pytest.fixture
def always_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled code takes any number of rows."""
    for name in ("row_limit", "transposed_limit"):
        monkeypatch.setattr(f"fairseq_moe_opt.moe.kernels.fused.{name}", lambda *_: limits.ALWAYS)


@pytest.fixture(params=range(len(LEVELS)), ids=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, always_fused: None) -> Iterator[str]:
    """Each instruction set in turn."""
    monkeypatch.setattr(EXTENSION, "level", request.param)
    yield LEVELS[request.param]


def cast(expert: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    """A floating-point expert in another dtype."""
    tensors = {field.name: getattr(expert, field.name) for field in fields(expert)}
    return replace(expert, **{name: tensor.to(dtype) for name, tensor in tensors.items() if tensor is not None})


def make_expert(
    width: int, hidden: int, weights: torch.dtype, rows: torch.dtype, *, bias: bool = True, gated: bool = False
) -> ExpertWeights:
    """A random expert, scaled so that results are about 1."""
    expert = ExpertWeights.empty(width, hidden, dtype=torch.float32, bias=bias, gated=gated)
    for tensor in expert.tensors():
        tensor.normal_().mul_(tensor.shape[-1] ** -0.5)
    if weights != torch.int8:
        return cast(expert, weights)
    codes = ExpertWeights.empty(width, hidden, dtype=torch.int8, bias_dtype=rows, bias=bias, gated=gated)
    quantize_into(expert, codes)
    return codes


def make_transposed(width: int, hidden: int, dtype: torch.dtype, *, interleaved: bool) -> ExpertWeights:
    """The second of two random experts in transposed stacks, gated and with biases."""
    layout = StackLayout(transposed=True, interleaved=interleaved)
    first, second = torch.randn(2, width, 2 * hidden), torch.randn(2, hidden, width) * hidden**-0.5
    stacks = Stacks((first * 2 * width**-0.5).to(dtype), second.to(dtype))
    biases = torch.randn(2, 2 * hidden).to(dtype), torch.randn(2, width).to(dtype)
    parts = layout.views(replace(stacks, first_bias=biases[0], second_bias=biases[1]))
    return ExpertWeights(**{name: part[1] for name, part in parts.items()})


def run(kernel: str, rows: Tensor, sizes: list[int], experts: list[ExpertWeights], activation: str) -> Tensor:
    """Rows through their experts; those with no rows take no part."""
    stops = list(accumulate(sizes))
    segments = [Segment(e, stop - size, stop) for e, (size, stop) in enumerate(zip(sizes, stops, strict=True)) if size]
    there = tuple(segment.expert for segment in segments)
    out = torch.full_like(rows, float("nan"))
    with torch.inference_mode():
        wave = ExpertWave(there, tuple(experts[e] for e in there))
        get_kernel(kernel).run(rows, segments, wave, activation, out)
    return out


def distance(one: Tensor, other: Tensor) -> float:
    """Relative, in the norm."""
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 7, 65])
def test_each_instruction_set_agrees_with_naive(
    level: str, dtypes: tuple[torch.dtype, torch.dtype], num_rows: int
) -> None:
    """Widths that no vector divides; 1100 takes more than one block of the cache."""
    torch.manual_seed(num_rows)
    shapes = ((37, 101, False, "relu"), (70, 1100, True, "silu"), (64, 50, False, "gelu"))
    for width, hidden, gated, activation in shapes:
        expert = make_expert(width, hidden, *dtypes, gated=gated)
        rows = torch.randn(num_rows, width).to(dtypes[1])
        fused, naive = (run(name, rows, [num_rows], [expert], activation) for name in ("fused", "naive"))
        if dtypes[1] == torch.float32:
            assert distance(fused, naive) < 1e-5
        elif dtypes[0] == torch.bfloat16:
            exact = expert_ffn(rows.double(), cast(expert, torch.float64), activation)
            assert distance(fused, exact) <= 1.05 * distance(naive, exact)
        else:  # naive computes int8 experts in float32 and rounds once
            assert distance(fused, naive) < 4e-3


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transposed_matrices_agree_with_naive(level: str, dtype: torch.dtype, interleaved: bool) -> None:
    """Widths on both sides of a tile and of a slice of outputs, odd ones, and fewer than a vector has lanes."""
    torch.manual_seed(0)
    for width, hidden, num_rows in ((37, 101, 1), (200, 333, 2), (96, 64, 5), (3, 5, 9), (130, 40, 70)):
        expert = make_transposed(width, hidden, dtype, interleaved=interleaved)
        rows = torch.randn(num_rows, width).to(dtype)
        for activation in ("silu", CLAMPED):
            fused, naive = (run(name, rows, [num_rows], [expert], activation) for name in ("fused", "naive"))
            if dtype == torch.float32:
                assert distance(fused, naive) < 1e-5
                continue
            exact = expert_ffn(rows.double(), cast(expert, torch.float64), activation)
            assert distance(fused, exact) <= 1.05 * distance(naive, exact) + 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_transposed_matrices_have_the_same_bits_in_whatever_company(level: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    experts = [make_transposed(75, 300, dtype, interleaved=True) for _ in range(2)]
    rows = torch.randn(80, 75).to(dtype)
    together = run("fused", rows, [70, 10], experts, CLAMPED)
    alone = [run("fused", rows[i : i + 1], [1], experts[:1], CLAMPED) for i in range(70)]
    assert torch.equal(torch.cat(alone), together[:70])
    assert torch.equal(run("fused", rows[70:], [10], experts[1:], CLAMPED), together[70:])


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_clamped_swiglu_of_rows_along_k(level: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Numbers on both sides of the limit; what is not a number stays so."""
    torch.manual_seed(0)
    expert = make_expert(64, 50, *dtypes, gated=True)
    rows = torch.randn(6, 64).to(dtypes[1])
    fused, naive = (run(name, rows, [6], [expert], CLAMPED) for name in ("fused", "naive"))
    assert distance(fused, naive) < (1e-5 if dtypes[1] == torch.float32 else 2e-2)
    rows[2, 3] = float("nan")
    broken = run("fused", rows, [6], [expert], CLAMPED)
    assert torch.isnan(broken[2]).all()
    assert torch.equal(broken[3:], fused[3:])


@needs_extension
@pytest.mark.usefixtures("always_fused")
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any),
    width=st.integers(1, 80),
    hidden=st.integers(1, 80),
    dtype=st.sampled_from([torch.float32, torch.int8]),
    activation=st.sampled_from(["relu", "gelu", "silu"]),
    bias=st.booleans(),
    gated=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_agrees_with_naive(
    sizes: list[int], width: int, hidden: int, dtype: torch.dtype, activation: str, bias: bool, gated: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    experts = [make_expert(width, hidden, dtype, torch.float32, bias=bias, gated=gated) for _ in sizes]
    rows = torch.randn(sum(sizes), width)
    fused, naive = (run(name, rows, sizes, experts, activation) for name in ("fused", "naive"))
    torch.testing.assert_close(fused, naive, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_a_row_has_the_same_bits_in_whatever_company(level: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Alone, with other rows, with other experts, and on more threads."""
    torch.manual_seed(0)
    experts = [make_expert(72, 300, *dtypes, gated=True) for _ in range(3)]
    sizes = [5, 3, 8]
    rows = torch.randn(sum(sizes), 72).to(dtypes[1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together = run("fused", rows, sizes, experts, "silu")
        torch.set_num_threads(3)
        assert torch.equal(run("fused", rows, sizes, experts, "silu"), together)
    finally:
        torch.set_num_threads(threads)
    alone = [run("fused", rows[i : i + 1], [1], [experts[0]], "silu") for i in range(5)]
    assert torch.equal(torch.cat(alone), together[:5])
    assert torch.equal(run("fused", rows[5:8], [3], [experts[1]], "silu"), together[5:8])


@needs_extension
def test_crowded_and_thin_experts_meet_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fairseq_moe_opt.moe.kernels.fused.row_limit", lambda *_: 4)
    torch.manual_seed(0)
    experts = [make_expert(32, 64, torch.float32, torch.float32) for _ in range(3)]
    sizes = [4, 5, 1]
    rows = torch.randn(10, 32)
    torch.testing.assert_close(run("fused", rows, sizes, experts, "relu"), run("naive", rows, sizes, experts, "relu"))


@needs_extension
@pytest.mark.usefixtures("always_fused")
def test_rows_that_are_not_finite_stay_their_own() -> None:
    experts = [make_expert(64, 64, torch.int8, torch.float32)]
    rows = torch.randn(3, 64)
    rows[1, 5] = float("inf")
    out = run("fused", rows, [3], experts, "relu")
    assert torch.isfinite(out[[0, 2]]).all()
    assert torch.isnan(out[1]).all()


def bfloat16_rows(num_rows: int, width: int, *, ratio: float) -> Tensor:
    """Rows of ones and minus ones, each with one number ``ratio`` times larger."""
    rows = torch.where(torch.rand(num_rows, width) < 0.5, -1.0, 1.0)
    rows[:, 3] = ratio
    return rows.bfloat16()


@pytest.mark.parametrize("ratio", [1, 20, 30, 3000])
def test_large_numbers_in_bfloat16_rows_cost_int8_experts_nothing(level: str, ratio: float) -> None:
    """Rows as two bytes or as three, each alone and beside the other kind: the same bits, as exact as bfloat16 is."""
    torch.manual_seed(0)
    expert = make_expert(1500, 256, torch.int8, torch.bfloat16)
    rows = torch.cat([bfloat16_rows(2, 1500, ratio=ratio), torch.randn(3, 1500).bfloat16()])
    fused, naive = (run(name, rows, [5], [expert], "relu") for name in ("fused", "naive"))
    wide = {field.name: getattr(expert, field.name) for field in fields(expert)}
    wide = {name: None if tensor is None else tensor.double() for name, tensor in wide.items()}
    for matrix in ("fc1", "fc2"):
        wide[f"{matrix}_weight"] = wide[f"{matrix}_weight"] * wide.pop(f"{matrix}_scale")[:, None]
    exact = expert_ffn(rows.double(), ExpertWeights(**wide), "relu")
    for i in range(5):
        assert distance(fused[i], exact[i]) <= 1.05 * distance(naive[i], exact[i])
    assert torch.equal(torch.cat([run("fused", row[None], [1], [expert], "relu") for row in rows]), fused)


@needs_extension
def test_what_it_cannot_compute_is_refused_by_name_and_left_alone_by_auto() -> None:
    """Never computed by another kernel under this one's name."""
    expert = make_expert(8, 16, torch.float32, torch.float32)
    spread = torch.empty(16, 16)[:, ::2].copy_(expert.fc1_weight)
    reasons = {
        "not the activation 'gelu_tanh'; use kernel='loop'": ([expert], "gelu_tanh"),
        "lie so in memory; use kernel='loop'": ([replace(expert, fc1_weight=spread)], "relu"),
    }
    for reason, (experts, activation) in reasons.items():
        rows = torch.randn(1, 8)
        with pytest.raises(KernelError, match=reason):
            run("fused", rows, [1], experts, activation)
        layers = {}
        for kernel in ("auto", "fused", "naive"):
            config = LayerConfig(kernel=kernel, activation=activation)
            counters = LayerCounters("layer", "decoder", 1, False)
            store, router = ResidentExperts(1, experts.__getitem__), SoftmaxTopKRouter(1, 1)
            layers[kernel] = MoELayer(lambda x: x[:, :1], router, store, config, counters)
        with torch.inference_mode():
            with pytest.raises(KernelError, match=reason):
                layers["fused"](rows)
            torch.testing.assert_close(layers["auto"](rows).output, layers["naive"](rows).output)
        assert layers["auto"].counters.snapshot().kernels == ("loop",)


def test_the_compiled_code_knows_every_part_of_an_expert() -> None:
    """Another one has to be told to it, or experts that have it left to the loop."""
    parts = {f"{matrix}_{part}" for matrix in ("fc1", "gate", "fc2") for part in ("weight", "scale", "bias")}
    assert {field.name for field in fields(ExpertWeights)} == parts


@needs_extension
def test_auto_takes_it_where_it_computes_the_experts() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        for activation in (None, "silu", CLAMPED):
            assert choose_kernel("auto", CPU, dtype, activation=activation).name == "fused"
    assert choose_kernel("auto", CPU, torch.float64).name == "loop"
    assert choose_kernel("auto", CPU, torch.float32, activation="another").name == "grouped_mm"
    assert choose_kernel("auto", CPU, torch.float32, activation="another", apart=True).name == "loop"
    with pytest.raises(KernelError, match=r"float32, bfloat16 and int8 experts, not .*float16; use kernel='loop'"):
        choose_kernel("fused", CPU, torch.float16)


def test_without_the_extension_the_loop_runs_and_is_what_reports_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fairseq_moe_opt.moe.kernels.fused.load", lambda: "its extension was not built")
    assert "fused" not in available_kernels()
    assert choose_kernel("auto", CPU, torch.float32).name == "loop"
    with pytest.raises(KernelError, match="'fused' cannot run here: its extension was not built; use kernel='loop'"):
        choose_kernel("fused", CPU, torch.float32)
    expert = make_expert(8, 8, torch.float32, torch.float32)
    with pytest.raises(KernelError, match="was not built"):
        run("fused", torch.randn(1, 8), [1], [expert], "relu")


ASK = """
from fairseq_moe_opt.moe.kernels import choose_kernel, extension
import torch
found = extension.load()
print(choose_kernel("auto", torch.device("cpu"), torch.float32).name)
print(found if isinstance(found, str) else extension.LEVELS[found.level])
"""


def ask(**environment: str) -> list[str]:
    """What a fresh process chooses, and the instruction set or why there is none."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run([sys.executable, "-c", ASK], env=env, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_it_can_be_switched_off() -> None:
    assert ask(MOE_OPT_FUSED="0") == ["loop", "it is switched off by MOE_OPT_FUSED=0"]


@needs_extension
def test_one_built_from_older_sources_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "_VERSION", 99)
    assert "it was built from older sources; install the project again" in str(extension.load.__wrapped__())


@needs_extension
@pytest.mark.parametrize(("out", "into", "rows"), [(1, 1, 1), (97, 33, 70), (512, 20, 3)])
def test_a_linear_layer_at_every_level(level: str, out: int, into: int, rows: int) -> None:
    weight, bias, x = torch.randn(out, into), torch.randn(out), torch.randn(rows, into)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2**-8)):
        given = [one.to(dtype) for one in (x, weight, bias)]
        found = get_kernel("fused").linear(*given)
        exact = torch.nn.functional.linear(*(one.double() for one in given))
        assert float(((found.double() - exact).abs() / exact.abs().clamp(min=1)).max()) <= tolerance


@needs_extension
def test_it_keeps_to_the_instructions_that_torch_is_allowed() -> None:
    assert ask(ATEN_CPU_CAPABILITY="default") == ["fused", "generic"]


def test_the_project_builds_without_a_compiler(tmp_path: Path) -> None:
    """As ``pip install`` does, only faster: the extension alone, with a compiler that always fails."""
    tree = tmp_path / "tree"
    shutil.copytree(KERNELS / "native", tree / KERNELS.relative_to(ROOT) / "native")
    shutil.copytree(ROOT / "configs", tree / "configs")
    shutil.copy(ROOT / "setup.py", tree)
    (tree / "fairseq_moe_opt" / "__init__.py").write_text('__version__ = "0"\n', encoding="utf-8")
    env = {**os.environ, "CC": "/bin/false", "CXX": "/bin/false"}
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "built")]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "the fused kernel is left out" in done.stdout + done.stderr
    assert not list((tmp_path / "built").rglob("*.so"))


def test_a_measured_limit_goes_before_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shape = ("float32", "float32", 16, 48, 2)
    assert limits.shipped_limit("float32", "float32", 2) == limits.ALWAYS
    assert limits.shipped_limit("float16", "float16", 2) == 0
    path = limits.save_limits({limits.shape_key(*shape): 7})
    assert path.is_relative_to(tmp_path)
    limits._measured.cache_clear()
    limits.row_limit.cache_clear()
    try:
        assert limits.row_limit(torch.float32, torch.float32, 16, 48, 2) == 7
        assert limits.row_limit(torch.float32, torch.float32, 16, 49, 2) == limits.ALWAYS
        path.write_text("not JSON", encoding="utf-8")
        limits._measured.cache_clear()
        limits.row_limit.cache_clear()
        assert limits.row_limit(torch.float32, torch.float32, 16, 48, 2) == limits.ALWAYS
    finally:
        limits._measured.cache_clear()
        limits.row_limit.cache_clear()
