"""What a rank of the exchange benchmark does: both exchanges through whole layers once, then by themselves, timed."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor, multiprocessing
from torch import distributed as dist

from fairseq_moe_opt.moe import (
    LayerConfig,
    LayerCounters,
    MoELayer,
    PackedExperts,
    ResidentPackedExperts,
    Routing,
    SoftmaxTopKRouter,
)
from fairseq_moe_opt.moe import dispatch as dispatching
from fairseq_moe_opt.moe.routing import first_come_slots
from fairseq_moe_opt.parallel import AllToAllExchange, PaddedAllToAllExchange, ProcessGroupRanks, SlotMap

UNEVEN, PADDED = "uneven all-to-all", "padded all-to-all"
FFN_WIDTH = 8
"""Of the experts through which both sides' outputs are compared; what they cost is not timed."""

PROBES = (1, 4_096, 65_536, 524_288)
"""Numbers of float32 that the calibration sends to each peer."""

TIMEOUT_SECONDS = 120


@dataclass(frozen=True)
class Setting:
    """One comparison.

    Attributes:
        num_experts: E; ``top_k`` divides it, and it divides ``tokens * top_k``, so that every expert is asked alike.
        fraction: static capacity is ceil(fraction * S).
        tokens: S, of each rank.
        width: D.
        top_k: k.
    """

    num_experts: int
    fraction: float
    tokens: int
    width: int
    top_k: int = 2

    @property
    def capacity(self) -> int:
        """C."""
        return math.ceil(self.fraction * self.tokens)

    def elements(self, side: str) -> int:
        """What the paper says a rank sends in each direction: k*S*D, or E*C*D."""
        rows = self.top_k * self.tokens if side == UNEVEN else self.num_experts * self.capacity
        return rows * self.width


@dataclass(frozen=True)
class Measured:
    """What one rank saw.

    Attributes:
        traffic: by side and direction, of one forward of a layer, as the exchange counted it.
        seconds: by side, of every round: there and back.
        difference: between the sides' outputs, relative to the largest number.
        probes: (bytes that leave the rank, seconds), medians over rounds.
    """

    traffic: dict[str, dict[str, dict[str, int]]]
    seconds: dict[str, list[float]]
    difference: float
    probes: list[tuple[int, float]]


def measure(setting: Setting, num_ranks: int, rounds: int, seed: int) -> list[Measured]:
    """What each of ``num_ranks`` processes on gloo measured."""
    with tempfile.TemporaryDirectory(prefix="moe-exchange-") as folder:
        multiprocessing.spawn(_rank, (num_ranks, folder, setting, rounds, seed), nprocs=num_ranks)
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(num_ranks)]
    return [Measured(**one) for one in found]


def _rank(rank: int, num_ranks: int, folder: str, setting: Setting, rounds: int, seed: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/store", num_ranks),
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    with torch.no_grad():
        found = Sides(ProcessGroupRanks(timeout=TIMEOUT_SECONDS), setting, seed).measure(rounds)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(asdict(found)))
    dist.destroy_process_group()


class Sides:
    """Both exchanges on one rank, over the same tokens, routing and experts."""

    def __init__(self, ranks: ProcessGroupRanks, setting: Setting, seed: int) -> None:
        self._ranks = ranks
        self._setting = setting
        self._uneven = AllToAllExchange(ranks, SlotMap.contiguous(setting.num_experts, ranks.size))
        self._padded = PaddedAllToAllExchange(ranks, setting.num_experts)
        torch.manual_seed(seed)
        experts = random_experts(setting, ranks.rank, ranks.size)
        torch.manual_seed(seed + 1 + ranks.rank)
        self._tokens = torch.randn(setting.tokens, setting.width)
        self._routing = even_routing(setting)
        router = SoftmaxTopKRouter(setting.num_experts, setting.top_k)
        self._layers = {
            side: MoELayer(
                torch.nn.Identity(),
                router,
                ResidentPackedExperts(experts),
                LayerConfig(gating=gating),
                LayerCounters(side, "encoder", setting.num_experts, exchange=exchange.counters),
                exchange=self._uneven,
                padded_exchange=self._padded,
            )
            for side, gating, exchange in ((UNEVEN, "dynamic", self._uneven), (PADDED, "static", self._padded))
        }

    def measure(self, rounds: int) -> Measured:
        """One forward of each layer, to compare and to count; then rounds in which the exchanges take turns."""
        outputs = {side: layer.apply(self._tokens, self._routing) for side, layer in self._layers.items()}
        difference = (outputs[UNEVEN] - outputs[PADDED]).abs().max() / outputs[PADDED].abs().max()
        traffic = {side: self._traffic(layer) for side, layer in self._layers.items()}
        seconds: dict[str, list[float]] = {UNEVEN: [], PADDED: []}
        uneven, padded = self._uneven_round(), self._padded_round()
        for _ in range(rounds):
            seconds[UNEVEN].append(self._timed(uneven))
            seconds[PADDED].append(self._timed(padded))
        return Measured(traffic, seconds, difference.item(), self._probe(rounds))

    @staticmethod
    def _traffic(layer: MoELayer) -> dict[str, dict[str, int]]:
        report = layer.counters.snapshot().exchange
        if report is None:
            raise RuntimeError(f"{layer.counters.name} counted nothing")
        return {direction: asdict(traffic) for direction, traffic in report.traffic.items()}

    def _uneven_round(self) -> Callable[[], object]:
        """Sizes, rows there, both permutations, results back; the gather overlaps with the sizes as in a layer."""
        choices = dispatching.sort(self._routing)
        results = torch.zeros(self._received_rows() + 1, self._setting.width)

        def run() -> Tensor:
            arrival = self._uneven.dispatch(
                choices.sizes, lambda limit: dispatching.gather(self._tokens, choices.source, limit)
            )
            return self._uneven.combine(results, arrival.state)

        return run

    def _received_rows(self) -> int:
        """R: with even routing every rank receives as many rows as it sends."""
        return self._setting.top_k * self._setting.tokens

    def _padded_round(self) -> Callable[[], object]:
        """The agreement on C, blocks there and back; filling and emptying them by masks is not part of it."""
        setting = self._setting
        buffers = torch.zeros(setting.num_experts, setting.capacity, setting.width)

        def run() -> Tensor:
            self._padded.capacity(setting.capacity)
            return self._padded.combine(self._padded.dispatch(buffers))

        return run

    def _timed(self, run: Callable[[], object]) -> float:
        dist.barrier()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def _probe(self, rounds: int) -> list[tuple[int, float]]:
        """Plain equal all-to-alls of several sizes, for the cost model."""
        found = []
        for numbers in PROBES:
            sent = torch.zeros(self._ranks.size * numbers)
            received = torch.empty_like(sent)
            seconds = [self._timed(lambda: self._ranks.all_to_all(received, sent).wait()) for _ in range(rounds)]  # noqa: B023
            found.append((4 * numbers * (self._ranks.size - 1), statistics.median(seconds)))
        return found


def random_experts(setting: Setting, rank: int, num_ranks: int) -> PackedExperts:
    """This rank's part of experts that are the same whatever the rank count."""
    packed = PackedExperts.empty(setting.num_experts, setting.width, FFN_WIDTH, dtype=torch.float32)
    tensors = (packed.fc1_weight, packed.fc1_bias, packed.fc2_weight, packed.fc2_bias)
    held = slice(*(setting.num_experts * edge // num_ranks for edge in (rank, rank + 1)))
    return PackedExperts(*(tensor.normal_(0, setting.width**-0.5)[held] for tensor in tensors if tensor is not None))


def even_routing(setting: Setting) -> Routing:
    """Random, but every expert gets the same number of rows: the case that suits capacity best, nothing is dropped."""
    repeats = setting.top_k * setting.tokens // setting.num_experts
    choices = torch.cat([torch.randperm(setting.num_experts) for _ in range(repeats)])
    index = choices.view(setting.tokens, setting.top_k)
    slots = first_come_slots(index, setting.num_experts)
    return Routing(index, torch.rand(index.shape), setting.num_experts, setting.capacity, slots)
