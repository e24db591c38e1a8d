"""Expert kernels on a CUDA device, shape by shape: decoding against the memory's speed, prefill against one dense FFN.

Every side computes the same tokens with the same choices of experts; outputs are compared with float32 ones first, then
sides take turns for several rounds, timed by the device's own events. Before each of them the device's caches are
overwritten. In each round memory is read once (the sum of a large tensor) and one dense FFN with as many FLOPs is
computed; ratios are medians of ratios within a round. A decoding step reads the matrices of the experts that its tokens
chose; kernels that need no counts on the host are also captured in a CUDA graph. Beside them, Transformers' own
functions for experts where they apply.

``--device cpu`` runs all but the graphs: it is there to try the script, not to measure.
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
from _machine import write_results
from _transformers_experts import BATCHED, GROUPED, transformers_ways
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fairseq_moe_opt.moe.experts import ResidentPackedExperts, expert_ffn
from fairseq_moe_opt.moe.kernels import available_kernels, get_kernel
from fairseq_moe_opt.moe.layer import LayerConfig, MoELayer
from fairseq_moe_opt.moe.report import LayerCounters
from fairseq_moe_opt.moe.routing import GivenRouting
from fairseq_moe_opt.moe.types import PackedExperts, Routing

BANDWIDTH, DENSE, TRANSFORMERS = "bandwidth", "dense FFN", "Transformers"
DECODE, PREFILL = (1, 8, 32), 8192
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CACHE_BYTES = 256 * 2**20
"""More than the caches of any GPU there is."""
WARM_UP = 3
"""Runs before a graph is captured: kernels are compiled, and workspaces made."""

TABLE_WIDTH = 150
RESULTS = Path(__file__).resolve().parent / "results" / "kernels_gpu.json"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Side = Callable[[], Tensor]


class BenchmarkError(Exception):
    """A side computes something else, or there is nothing to measure on."""


@dataclass(frozen=True)
class Shape:
    """One model's layer: D, F, E, K, and whether experts are gated (SiLU) or not (ReLU with biases)."""

    name: str
    model_width: int
    ffn_width: int
    num_experts: int
    top_k: int
    gated: bool

    @property
    def weights(self) -> int:
        """Numbers in an expert's matrices."""
        return self.model_width * self.ffn_width * (3 if self.gated else 2)


SHAPES = (
    Shape("NLLB-MoE-54B", 2048, 8192, 128, 2, False),
    Shape("Mixtral-8x7B", 4096, 14336, 8, 2, True),
    Shape("Qwen3-30B-A3B", 2048, 768, 128, 8, True),
    Shape("OLMoE-1B-7B", 2048, 1024, 64, 8, True),
)


@dataclass(frozen=True)
class Row:
    """One side in one case.

    Attributes:
        shape, dtype, tokens, top_k, num_experts: of the case; ``active`` of the experts were chosen.
        side: a kernel, or Transformers' function.
        difference: of its output from float32's, relative in the norm.
        seconds: of every round.
        bandwidth: bytes a second of the plain read, by round.
        dense_seconds: of the dense FFN, by round.
        of_bandwidth: how fast the chosen experts' matrices are read, as a share of the plain read.
        of_dense: speed as a share of the dense FFN's.
        of_grouped: how many times as fast as Transformers' ``grouped_mm``; 0 where that does not apply.
    """

    shape: str
    dtype: str
    tokens: int
    top_k: int
    num_experts: int
    active: int
    side: str
    difference: float
    seconds: list[float]
    bandwidth: list[float]
    dense_seconds: list[float]
    of_bandwidth: float
    of_dense: float
    of_grouped: float


@dataclass(frozen=True)
class Case:
    """A layer's experts, its (T, D) tokens, and what they chose."""

    shape: Shape
    packed: PackedExperts
    tokens: Tensor
    routing: Routing

    @property
    def activation(self) -> str:
        """Of the experts."""
        return "silu" if self.shape.gated else "relu"


def random_packed(shape: Shape, dtype: torch.dtype, device: torch.device) -> PackedExperts:
    """Random experts; gate and fc1 lie in one tensor, as Transformers has them."""

    def matrix(*sizes: int) -> Tensor:
        return torch.randn(shape.num_experts, *sizes, device=device, dtype=dtype).mul_(sizes[-1] ** -0.5)

    width, ffn = shape.model_width, shape.ffn_width
    if not shape.gated:
        biases = [torch.randn(shape.num_experts, size, device=device, dtype=dtype) for size in (ffn, width)]
        return PackedExperts(matrix(ffn, width), biases[0], matrix(width, ffn), biases[1])
    joined = matrix(2 * ffn, width)
    return PackedExperts(joined[:, ffn:], None, matrix(width, ffn), None, joined[:, :ffn])


def case_of(shape: Shape, packed: PackedExperts, num_tokens: int) -> Case:
    """Random tokens that choose K different experts each, all equally likely."""
    like = packed.fc1_weight
    tokens = torch.randn(num_tokens, shape.model_width, device=like.device, dtype=like.dtype)
    index = torch.rand(num_tokens, shape.num_experts, device=like.device).topk(shape.top_k).indices
    weight = torch.rand(num_tokens, shape.top_k, device=like.device).softmax(1)
    return Case(shape, packed, tokens, Routing(index, weight, shape.num_experts))


def layer_of(case: Case, kernel: str) -> MoELayer:
    """The project's layer with that kernel; routing is given to it."""
    counters = LayerCounters(kernel, "decoder", case.shape.num_experts)
    router = GivenRouting(case.shape.num_experts, case.shape.top_k)
    store, config = ResidentPackedExperts(case.packed), LayerConfig(case.activation, kernel=kernel)
    return MoELayer(lambda tokens: tokens, router, store, config, counters)


def sides_of(case: Case) -> Iterator[tuple[str, Side]]:
    """Every way to compute the case; each call gives (T, D)."""
    device, dtype, decodes = case.tokens.device, case.tokens.dtype, len(case.tokens) != PREFILL
    for kernel in available_kernels(device, dtype):
        if kernel == "naive":  # a launch a row
            continue
        layer = layer_of(case, kernel)
        yield kernel, lambda layer=layer: layer.apply(case.tokens, case.routing)  # type: ignore[misc]
        if decodes and device.type == "cuda" and hasattr(get_kernel(kernel), "run_routed"):
            yield f"{kernel}, CUDA graph", captured(lambda layer=layer: layer.apply(case.tokens, case.routing))  # type: ignore[misc]
    if case.shape.gated:
        weight = case.routing.weight.to(dtype)
        for way, run in transformers_ways(case.packed, case.routing.expert_index, weight).items():
            if way != BATCHED or decodes:  # it copies an expert's weights for every row
                yield f"{TRANSFORMERS} {way}", lambda run=run: run(case.tokens)  # type: ignore[misc]


def captured(side: Side) -> Side:
    """``side`` as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            side()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = side()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def expected(case: Case) -> Tensor:
    """(T, D) in float32, an expert at a time, whatever the experts are."""
    result = torch.zeros_like(case.tokens, dtype=torch.float32)
    for number in case.routing.expert_index.unique().tolist():
        expert = case.packed.expert(number)
        tensors = {field.name: getattr(expert, field.name) for field in fields(expert)}
        wide = replace(expert, **{name: one.float() for name, one in tensors.items() if one is not None})
        token, choice = (case.routing.expert_index == number).nonzero(as_tuple=True)
        computed = expert_ffn(case.tokens[token].float(), wide, case.activation)
        result.index_add_(0, token, computed * case.routing.weight[token, choice].unsqueeze(1))
    return result


def dense_of(case: Case) -> Side:
    """One FFN that T * K rows go through: as many FLOPs, without experts."""
    rows, expert = case.tokens.repeat(case.shape.top_k, 1), case.packed.expert(0)
    return lambda: expert_ffn(rows, expert, case.activation)


class Clock:
    """Seconds of a call, with cold caches."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flushed = torch.empty(CACHE_BYTES if device.type == "cuda" else 1, dtype=torch.int8, device=device)

    def seconds(self, side: Callable[[], Any]) -> float:
        """Of one call: on a GPU from the first launch to the end of the last, waits for the host included."""
        self._flushed.zero_()
        if self._device.type != "cuda":
            start = time.perf_counter()
            side()
            return time.perf_counter() - start
        torch.cuda.synchronize(self._device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        side()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def measure(case: Case, plain: Tensor, clock: Clock, rounds: int) -> list[Row]:
    """Compare the sides' outputs, then time them; BenchmarkError when one differs."""
    dtype, right = case.tokens.dtype, expected(case)
    differences, sides = {}, dict(sides_of(case))
    for name, side in sides.items():
        differences[name] = float((side().float() - right).norm() / right.norm())
        if not differences[name] <= TOLERANCE[dtype]:
            raise BenchmarkError(f"{case.shape.name}, {dtype}: {name} differs by {differences[name]:.1e}")
    seconds = take_turns({BANDWIDTH: plain.sum, DENSE: dense_of(case), **sides}, clock, rounds)
    bandwidth, dense = [plain.nbytes / one for one in seconds[BANDWIDTH]], seconds[DENSE]
    active = len(case.routing.expert_index.unique())
    read, grouped = active * case.shape.weights * dtype.itemsize, seconds.get(f"{TRANSFORMERS} {GROUPED}")
    return [
        Row(
            shape=case.shape.name,
            dtype=str(dtype).removeprefix("torch."),
            tokens=len(case.tokens),
            top_k=case.shape.top_k,
            num_experts=case.shape.num_experts,
            active=active,
            side=name,
            difference=differences[name],
            seconds=seconds[name],
            bandwidth=bandwidth,
            dense_seconds=dense,
            of_bandwidth=median(read / one / speed for one, speed in zip(seconds[name], bandwidth, strict=True)),
            of_dense=ratio(dense, seconds[name]),
            of_grouped=ratio(grouped, seconds[name]) if grouped else 0.0,
        )
        for name in sides
    ]


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """How many times as fast: the median over the rounds."""
    return median(one / other for one, other in zip(theirs, ours, strict=True))


def take_turns(sides: Mapping[str, Callable[[], Any]], clock: Clock, rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in every round, after one that does not count; each round begins with another side."""
    names = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for step in range(rounds + 1):
        for turn in range(len(names)):
            name = names[(turn + step) % len(names)]
            spent = clock.seconds(sides[name])
            if step:
                seconds[name].append(spent)
    return seconds


def table_of(rows: Sequence[Row]) -> Table:
    """A line a side, a block a case."""
    table = Table(title="experts on a GPU: decoding as a share of a plain read, prefill as a share of a dense FFN")
    for heading in ("shape", "dtype", "tokens", "side"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms", "of plain\nread", "of dense", "of Transformers'\ngrouped_mm", "difference"):
        table.add_column(heading, justify="right")
    last = None
    for row in rows:
        case = (row.shape, row.dtype, f"{row.tokens:,}")
        if last not in (None, case):
            table.add_section()
        table.add_row(
            *(case if case != last else ("", "", "")),
            row.side,
            f"{median(row.seconds) * 1e3:.3f}",
            f"{row.of_bandwidth:.0%}",
            f"{row.of_dense:.0%}",
            f"{row.of_grouped:.2f} x" if row.of_grouped else "",
            f"{row.difference:.0e}",
        )
        last = case
    return table


@app.command()
def main(
    shapes: Annotated[str, typer.Option(help="names, separated by commas")] = ",".join(s.name for s in SHAPES),
    dtypes: Annotated[str, typer.Option(help="separated by commas")] = ",".join(DTYPES),
    rounds: Annotated[int, typer.Option(help="rounds a case")] = 15,
    device: Annotated[str, typer.Option(help="a CUDA device; cpu to try the script")] = "cuda",
    results: Annotated[Path, typer.Option(help="JSON file")] = RESULTS,
) -> None:
    """Measure, print the table, write the JSON."""
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        raise BenchmarkError("--device cuda: torch sees no CUDA device here; --device cpu tries the script without one")
    torch.manual_seed(0)
    clock, rows = Clock(where), []
    plain = torch.ones(2**30 if where.type == "cuda" else 2**20, dtype=torch.float32, device=where)
    with torch.inference_mode():
        for shape in (one for one in SHAPES if one.name in shapes.split(",")):
            for dtype in dtypes.split(","):
                packed = random_packed(shape, DTYPES[dtype], where)
                for num_tokens in (*DECODE, PREFILL):
                    rows += measure(case_of(shape, packed, num_tokens), plain, clock, rounds)
                del packed
    Console(width=TABLE_WIDTH).print(table_of(rows))
    versions = {name: importlib.metadata.version(name) for name in ("transformers", "triton") if _installed(name)}
    arguments = {"rounds": rounds, "dtypes": dtypes, "shapes": shapes}
    gpu = torch.cuda.get_device_name(where) if where.type == "cuda" else None
    write_results(results, versions, arguments, [asdict(row) for row in rows], gpu=gpu)


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    app()
