"""Expert kernels on CPU, shape by shape: decoding against the memory's speed, prefill against one dense FFN.

Every side computes the same rows with the same experts; their outputs are compared with float32 first, then they take
turns for several rounds. Memory's speed changes from one second to the next on a machine that others use too, so it is
measured right before and right after every side (torch's sum of a 512 MiB tensor, on as many threads); a side is
compared with the mean of the two. For prefill, one dense FFN with as many FLOPs of the rows' dtype takes its turn among
the sides. Ratios are medians of ratios within a round. Decoding reads every expert once for 1 to 8 rows each; prefill
has 32 rows an expert, as 512 tokens with two choices have among 32. Random weights, all experts together larger than
the caches. Beside them, Transformers' own functions for experts where they apply.

With ``--add`` the cases are measured in several runs on one machine: those already in the file stay.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from _kernel_results import BenchmarkError, Row, add_to, table_of
from _machine import machine, write_results
from _transformers_experts import BATCHED, transformers_ways
from rich.console import Console
from torch import Tensor

from fairseq_moe_opt.moe.experts import expert_ffn
from fairseq_moe_opt.moe.kernels import available_kernels, extension, get_kernel, limits
from fairseq_moe_opt.moe.kernels.fused import FusedKernel
from fairseq_moe_opt.moe.kernels.loop import LoopKernel
from fairseq_moe_opt.moe.protocols import ExpertKernel
from fairseq_moe_opt.moe.quantization import dequantize, quantize_into
from fairseq_moe_opt.moe.types import ExpertWave, ExpertWeights, PackedExperts, Segment

DENSE = "dense FFN"
PLAIN_NUMBERS = 2**27
"""float32 numbers of the tensor whose sum is the plain read."""
DECODE_ROWS, PREFILL_ROWS = (1, 2, 4, 8), 32
MOST_EXPERTS = 32
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
LONGEST = 1.0
"""Seconds; a side whose first run takes longer is left out of the case."""

TABLE_WIDTH = 140
RESULTS = Path(__file__).resolve().parent / "results" / "kernels.json"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Shape:
    """Experts of one model: D, F, and whether they are gated (SiLU) or not (ReLU with biases)."""

    name: str
    model_width: int
    ffn_width: int
    gated: bool

    @property
    def weights(self) -> int:
        """Numbers in an expert's matrices."""
        return self.model_width * self.ffn_width * (3 if self.gated else 2)


SHAPES = (
    Shape("NLLB-MoE-54B", 2048, 8192, False),
    Shape("Mixtral-8x7B", 4096, 14336, True),
    Shape("Qwen3-30B-A3B", 2048, 768, True),
    Shape("OLMoE-1B-7B", 2048, 1024, True),
    Shape("small", 512, 2048, False),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


@dataclass(frozen=True)
class Case:
    """Experts and their rows."""

    shape: Shape
    experts: Sequence[ExpertWeights]
    packed: PackedExperts | None
    rows: Tensor
    rows_each: int

    @property
    def activation(self) -> str:
        """Of the experts."""
        return "silu" if self.shape.gated else "relu"


def make_experts(
    shape: Shape, dtype: torch.dtype, rows_dtype: torch.dtype, budget: int
) -> tuple[list[ExpertWeights], PackedExperts | None]:
    """As many experts as ``budget`` bytes hold, packed when they are floats; every one differs, cheaply."""
    count = max(2, min(MOST_EXPERTS, budget // (shape.weights * dtype.itemsize)))
    sizes, kind = (shape.model_width, shape.ffn_width), {"gated": shape.gated, "bias": not shape.gated}
    one = ExpertWeights.empty(*sizes, dtype=torch.float32, **kind)
    for tensor in one.tensors():
        tensor.normal_().mul_(tensor.shape[-1] ** -0.5)
    if dtype == torch.int8:
        experts = []
        for _ in range(count):
            codes = ExpertWeights.empty(*sizes, dtype=dtype, bias_dtype=rows_dtype, **kind)
            quantize_into(one, codes)
            experts.append(codes)
        return experts, None

    def stack(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        stacked = torch.empty(count, *tensor.shape, dtype=dtype)
        for index in range(count):
            stacked[index].copy_(tensor.roll(index, 0))
        return stacked

    parts = {field.name: stack(getattr(one, field.name)) for field in fields(PackedExperts)}
    packed = PackedExperts(**parts)  # type: ignore[arg-type]
    return [packed.expert(index) for index in range(count)], packed


def side_of(kernel: ExpertKernel, case: Case) -> Callable[[], Tensor]:
    """The case computed by one kernel."""
    segments = [Segment(e, e * case.rows_each, (e + 1) * case.rows_each) for e in range(len(case.experts))]
    wave = ExpertWave(tuple(range(len(case.experts))), tuple(case.experts), case.packed)
    out = torch.empty_like(case.rows)

    def run() -> Tensor:
        kernel.run(case.rows, segments, wave, case.activation, out)
        return out

    return run


def sides_of(case: Case) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Every way to compute the case; each call gives (R, D)."""
    for name in available_kernels("cpu", case.experts[0].fc1_weight.dtype):
        if name != "naive" or case.rows_each == 1:  # it reads the weights again for every row
            yield name, side_of(get_kernel(name), case)
    if case.packed is not None and case.shape.gated:
        yield from transformers_sides(case, case.packed)


def transformers_sides(case: Case, packed: PackedExperts) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """``MixtralExperts`` of Transformers 5, by each of its functions, each token with one choice."""
    choice = torch.arange(packed.num_experts).repeat_interleave(case.rows_each).unsqueeze(1)
    weight = torch.ones(len(case.rows), 1, dtype=case.rows.dtype)
    for way, run in transformers_ways(packed, choice, weight).items():
        if way != BATCHED or case.rows_each == 1:  # it copies an expert's weights for every row
            yield f"Transformers {way}", lambda run=run: run(case.rows)  # type: ignore[misc]


def expected(case: Case) -> Tensor:
    """In float32, whatever the experts are."""
    parts = []
    for index, expert in enumerate(case.experts):
        rows = case.rows[index * case.rows_each : (index + 1) * case.rows_each].float()
        if expert.is_quantized:
            wide = dequantize(expert, torch.float32)
        else:
            tensors = {field.name: getattr(expert, field.name) for field in fields(expert)}
            wide = replace(expert, **{name: one.float() for name, one in tensors.items() if one is not None})
        parts.append(expert_ffn(rows, wide, case.activation))
    return torch.cat(parts)


def dense_of(case: Case) -> Callable[[], Tensor]:
    """One FFN of the rows' dtype that all rows go through: as many FLOPs, without experts."""
    expert = case.experts[0]
    dense = dequantize(expert, case.rows.dtype) if expert.is_quantized else expert
    return lambda: expert_ffn(case.rows, dense, case.activation)


def measure(case: Case, dtype: str, plain: Tensor, rounds: int) -> list[Row]:
    """Compare the sides' outputs, then time them; BenchmarkError when one differs."""
    right, differences, sides = expected(case), {}, {}
    for name, side in sides_of(case):
        start = time.perf_counter()
        output = side()
        if time.perf_counter() - start > LONGEST:
            continue
        difference = float((output.float() - right).norm() / right.norm())
        if not difference <= TOLERANCE[case.rows.dtype]:
            raise BenchmarkError(f"{case.shape.name}, {dtype}: {name} differs by {difference:.1e}")
        differences[name], sides[name] = difference, side
    prefill = case.rows_each == PREFILL_ROWS
    if prefill:
        sides[DENSE] = dense_of(case)
    seconds, reads = take_turns(sides, rounds, plain.sum)
    bandwidth = {name: [plain.nbytes / one for one in around] for name, around in reads.items()}
    dense = seconds.get(DENSE, [])
    nbytes = case.shape.weights * case.experts[0].fc1_weight.element_size() * len(case.experts)
    return [
        Row(
            case.shape.name,
            dtype,
            str(case.rows.dtype).removeprefix("torch."),
            len(case.experts),
            case.rows_each,
            name,
            differences[name],
            seconds[name],
            bandwidth[name],
            dense,
            nbytes,
            median(nbytes / one / speed for one, speed in zip(seconds[name], bandwidth[name], strict=True)),
            median(theirs / one for one, theirs in zip(seconds[name], dense, strict=True)) if dense else 0.0,
        )
        for name in differences
    ]


def take_turns(
    sides: Mapping[str, Callable[[], Any]], rounds: int, between: Callable[[], Any] = lambda: None
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each side in every round, and of ``between``: the mean of its runs right before and after that side.

    One round goes before those that count; each round begins with another side.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    around: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    before = seconds_of(between)
    for step in range(rounds + 1):
        for turn in range(len(names)):
            name = names[(turn + step) % len(names)]
            spent, after = seconds_of(sides[name]), seconds_of(between)
            if step:
                seconds[name].append(spent)
                around[name].append((before + after) / 2)
            before = after
    return seconds, around


def seconds_of(run: Callable[[], Any]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def best_limit(shape: Shape, experts: Sequence[ExpertWeights], rows_dtype: torch.dtype, rounds: int) -> int:
    """The most rows for which the compiled kernel is no slower than the loop; ALWAYS when it never was."""
    limit, rows_each = 0, 1
    while rows_each <= 512:
        rows = torch.randn(len(experts) * rows_each, shape.model_width).to(rows_dtype)
        case = Case(shape, experts, None, rows, rows_each)
        kernels = {"fused": FusedKernel(LoopKernel(), always=True), "loop": LoopKernel()}
        seconds, _ = take_turns({name: side_of(kernel, case) for name, kernel in kernels.items()}, rounds)
        if median(two / one for one, two in zip(seconds["fused"], seconds["loop"], strict=True)) < 1:
            return limit
        limit, rows_each = rows_each, rows_each * 2
    return limits.ALWAYS


@app.command()
def main(
    shapes: Annotated[str, typer.Option(help="names, separated by commas")] = ",".join(s.name for s in SHAPES),
    dtypes: Annotated[str, typer.Option(help="of the weights, separated by commas")] = ",".join(DTYPES),
    rounds: Annotated[int, typer.Option(help="rounds a case")] = 7,
    budget: Annotated[float, typer.Option(help="GiB of weights a case, about")] = 0.5,
    pause: Annotated[float, typer.Option(help="seconds of rest after each case, for others on the machine")] = 0.0,
    tune: Annotated[bool, typer.Option(help="measure this machine's own limits of rows too, and keep them")] = False,
    add: Annotated[bool, typer.Option(help="keep what the file holds of other cases")] = False,
    results: Annotated[Path, typer.Option(help="JSON file")] = RESULTS,
) -> None:
    """Measure, print the table, write the JSON."""
    torch.manual_seed(0)
    console, plain, rows = Console(width=TABLE_WIDTH), torch.ones(PLAIN_NUMBERS), []
    found: dict[str, int] = {}
    loaded = extension.load()
    with torch.inference_mode():
        for shape in (one for one in SHAPES if one.name in shapes.split(",")):
            for dtype in dtypes.split(","):
                for rows_dtype in (torch.float32, torch.bfloat16):
                    if dtype != "int8" and DTYPES[dtype] != rows_dtype:
                        continue
                    experts, packed = make_experts(shape, DTYPES[dtype], rows_dtype, int(budget * 2**30))
                    for rows_each in (*DECODE_ROWS, PREFILL_ROWS):
                        tokens = torch.randn(len(experts) * rows_each, shape.model_width).to(rows_dtype)
                        rows += measure(Case(shape, experts, packed, tokens, rows_each), dtype, plain, rounds)
                        time.sleep(pause)
                    if tune and not isinstance(loaded, str):
                        names = dtype, str(rows_dtype).removeprefix("torch.")
                        key = limits.shape_key(*names, shape.model_width, shape.ffn_width, loaded.level)
                        found[key] = best_limit(shape, experts, rows_dtype, rounds)
    console.print(table_of(rows))
    if found:
        console.print(f"limits of rows, from the next start on: {limits.save_limits(found)}")
    level = loaded if isinstance(loaded, str) else extension.LEVELS[loaded.level]
    versions = {"transformers": importlib.metadata.version("transformers")}
    setting = {"arguments": {"rounds": rounds, "budget": budget}, "fused": level, "threads": torch.get_num_threads()}
    measured: Sequence[Mapping[str, Any]] = [asdict(row) for row in rows]
    if add:
        measured = add_to(results, measured, {**setting, "machine": machine()}, [shape.name for shape in SHAPES])
    write_results(results, versions, setting.pop("arguments"), measured, **setting)


if __name__ == "__main__":
    app()
