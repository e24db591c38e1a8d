"""Load the checkpoint with buffered experts and translate: ``python _nllb54b_run.py '{"folder": ..., ...}'``.

In a process of its own, so that its peak of memory is the run's alone. The answer is one JSON line on standard output.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _page_cache import forget_folder
from _routing_facts import routing_facts
from _worker import decode, peak_bytes, source, timed

import hf_integration
from fairseq_moe_opt.moe.cache_report import CacheReport
from fairseq_moe_opt.moe.report import Report
from fairseq_moe_opt.moe.trace import read_trace

_IO = Path("/proc/self/io")

COLD_SHARE = 0.95
"""The files are called cold when at least so much of what was read came from the disk."""


@dataclass(frozen=True)
class Phase:
    """What the encoder or the decoder did in one round.

    Attributes:
        round: from 1.
        phase: ``encoder`` or ``decoder``.
        tokens: source tokens, or tokens generated.
        seconds: wall time.
        hits, misses: experts asked for that were in memory, and that were not.
        bytes_read: of experts, those for the other phase that were fetched ahead included.
        disk_bytes: what the system fetched from the disk meanwhile; None where it does not say.
        stall_seconds: time that layers waited for experts.
        fetched_ahead, fetched_ahead_used: experts read before they were asked for, and those that were then used.
    """

    round: int
    phase: str
    tokens: int
    seconds: float
    hits: int
    misses: int
    bytes_read: int
    disk_bytes: int | None
    stall_seconds: float
    fetched_ahead: int
    fetched_ahead_used: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values, rates among them."""
        return {
            **asdict(self),
            "tokens_per_second": self.tokens / self.seconds,
            "bytes_per_token": self.bytes_read / self.tokens,
            "miss_rate": self.misses / max(self.hits + self.misses, 1),
            "file_tier": tier_of(self.bytes_read, self.disk_bytes),
        }


def tier_of(bytes_read: int, disk_bytes: int | None) -> str:
    """Where the bytes came from: ``cold`` for the disk, ``warm`` for the page cache, in part at least."""
    if disk_bytes is None or not bytes_read:
        return "unknown"
    return "cold" if disk_bytes >= COLD_SHARE * bytes_read else "warm"


class Run:
    """A loaded model and its sources."""

    def __init__(self, spec: dict[str, Any], trace: Path) -> None:
        torch.set_num_threads(spec["threads"])
        forget_folder(Path(spec["folder"]))
        self._new_tokens: int = spec["new_tokens"]
        self.load_seconds, self._model = timed(
            lambda: hf_integration.from_pretrained(
                spec["folder"], dtype=torch.bfloat16, trace=str(trace), **spec["options"]
            )
        )
        self.load_peak_bytes = peak_bytes()
        self._inputs = source(spec["batch"], spec["source_tokens"], int(self._model.config.vocab_size))

    @property
    def report(self) -> Report:
        """What the layers did last."""
        report: Report = self._model.moe.report()
        return report

    def round(self, number: int) -> tuple[list[Phase], torch.Tensor]:
        """Translate once; what each phase did, and the tokens (batch, new_tokens)."""
        self._model.moe.reset()
        encoder, encoded = self._measure(number, "encoder", lambda: self._model.get_encoder()(**self._inputs))
        decoder, tokens = self._measure(
            number, "decoder", lambda: decode(self._model, encoded, self._inputs["attention_mask"], self._new_tokens)
        )
        return [encoder, decoder], tokens[:, 1:]

    def _measure(self, number: int, phase: str, work: Callable[[], Any]) -> tuple[Phase, Any]:
        before = disk_bytes()
        seconds, result = timed(work)
        after = disk_bytes()
        caches = [(layer.phase, layer.cache) for layer in self.report.layers if layer.cache is not None]
        every = [cache for _, cache in caches]
        own = [cache for of, cache in caches if of == phase]
        batch, length = self._inputs["input_ids"].shape
        row = Phase(
            round=number,
            phase=phase,
            tokens=batch * (length if phase == "encoder" else self._new_tokens),
            seconds=seconds,
            hits=sum(cache.hits for cache in own),
            misses=sum(cache.misses for cache in own),
            bytes_read=sum(bytes_of(cache) for cache in every),
            disk_bytes=None if before is None or after is None else after - before,
            stall_seconds=sum(cache.stall_seconds for cache in own),
            fetched_ahead=sum(cache.fetched_ahead for cache in every),
            fetched_ahead_used=sum(cache.fetched_ahead_used for cache in every),
        )
        return row, result


def bytes_of(cache: CacheReport) -> int:
    """What was read for a layer, from all tiers."""
    return sum(cache.bytes_read.values())


def disk_bytes() -> int | None:
    """What this process had the system fetch from disks since it started; None where the system does not say."""
    if not _IO.exists():
        return None
    return next(int(line.split()[1]) for line in _IO.read_text().splitlines() if line.startswith("read_bytes:"))


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """All rounds of ``spec``: rows, and what the run as a whole took."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="moe-bench-") as base, torch.inference_mode():
        trace = Path(base) / "trace.json"
        run = Run(spec, trace)
        rows: list[dict[str, Any]] = []
        for number in range(1, spec["rounds"] + 1):
            phases, tokens = run.round(number)
            rows += [phase.to_dict() for phase in phases]
        routing = routing_facts(read_trace(trace), "decoder")
    report = run.report
    return {
        "rows": rows,
        "load_seconds": run.load_seconds,
        "load_peak_bytes": run.load_peak_bytes,
        "peak_bytes": peak_bytes(),
        "seconds": time.perf_counter() - start,
        "expert_bytes": report.expert_bytes,
        "buffer": None if report.buffer is None else asdict(report.buffer),
        "kernels": sorted({kernel for layer in report.layers for kernel in layer.kernels}),
        "routing": {**routing, "distinct_tokens": len(tokens.unique()) / tokens.numel()},
        "tokens": tokens.tolist(),
    }


def main() -> None:
    """Keep standard output for the answer; what libraries print goes to standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)
        json.dump(measure(json.loads(sys.argv[1])), answer)


if __name__ == "__main__":
    main()
