"""What the buffering benchmark measures: budgets, policies, prefetch and tiers, each a side in a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from _page_cache import forget_folder
from _rounds import SideError, Worker
from _sides import REFERENCE, Case, Side
from _worker import OFFLOADED

from fairseq_moe_opt.buffering import POLICIES

SLACK_BYTES = 64 * 2**20
"""What a process may take beyond its budget, its readers' workspace and what it had before the first expert."""

ACCELERATE = f"accelerate disk_offload, {REFERENCE}"
RESIDENT = "resident"
COLD, WARM, HOST = "file, cold", "file, warm", "host"
_HOST_MEMORY: Mapping[str, str] = {COLD: "0", WARM: "page-cache", HOST: "100%"}


@dataclass(frozen=True)
class BufferSide:
    """One way to keep experts: what a row of the table stands for; ``budget`` in percent, None keeps them all."""

    budget: int | None
    policy: str = "auto"
    pool: str = "auto"
    prefetch: str = "auto"
    tier: str = COLD

    @property
    def options(self) -> dict[str, str]:
        """As options of this project."""
        if self.budget is None:
            return {}
        return {
            "expert_memory": f"{self.budget}%",
            "eviction": self.policy,
            "expert_pool": self.pool,
            "prefetch": self.prefetch,
            "host_memory": _HOST_MEMORY[self.tier],
        }


def sides(budgets: Sequence[int], *, policies: bool = True) -> Iterator[BufferSide]:
    """At every budget each tier and no prefetch; at the second smallest every policy, and the paper's own set-up."""
    yield BufferSide(None)
    for budget in budgets:
        yield from (BufferSide(budget, tier=tier) for tier in (COLD, WARM, HOST))
        yield BufferSide(budget, prefetch="off")
    if not policies:
        return
    middle = sorted(budgets)[min(1, len(budgets) - 1)]
    yield from (BufferSide(middle, policy=policy, prefetch="off") for policy in POLICIES)
    yield BufferSide(middle, policy="lifo", pool="layer", prefetch="off")


@dataclass(frozen=True)
class BufferRow:
    """What one side did.

    Attributes:
        side: its name, with ``budget`` ... ``tier`` of it, empty for accelerate.
        tokens_equal: whether all tokens are those of the resident model.
        tokens_per_second: decoded, median over rounds.
        of_resident: that over the resident model's.
        seconds: of decoding, every round.
        miss_rate: experts that were not there over those asked for, in the last round's decoding; None when resident.
        bytes_per_token: read for each decoded token then.
        stall_seconds: waited for experts then.
        arena_bytes: of the slots.
        peak_bytes: of the process, over all rounds.
        grown_bytes: that less what the process had when it was loaded.
        within_budget: whether it grew by no more than slots, tiers and workspace, and 64 MiB.
        error: why it could not run, or None.
    """

    side: str
    settings: dict[str, Any]
    tokens_equal: bool = False
    tokens_per_second: float = 0.0
    of_resident: float = 0.0
    seconds: tuple[float, ...] = ()
    miss_rate: float | None = None
    bytes_per_token: float | None = None
    stall_seconds: float | None = None
    arena_bytes: int = 0
    peak_bytes: int = 0
    grown_bytes: int = 0
    within_budget: bool | None = None
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for ``json.dump``."""
        return asdict(self)


def measure_sides(
    wanted: Sequence[BufferSide],
    case: Case,
    rounds: int,
    folder: Path,
    threads: int,
    trace: Path,
    progress: Callable[[str], None],
) -> tuple[list[BufferRow], list[list[int]]]:
    """One row a side, one side after the other; the first has to be the resident one, which records ``trace``.

    Also gives the resident model's tokens.
    """
    rows: list[BufferRow] = []
    expected: list[list[int]] = []
    for side in wanted:
        extra = {"trace": str(trace)} if side.budget is None else {}
        progress(_name(side))
        run = Side(_name(side), "float32", {**side.options, **extra})
        row, tokens = _measure(run, asdict(side), case, rounds, folder, threads, expected)
        expected = expected or tokens
        rows.append(_compared(row, tokens == expected, rows))
    return rows, expected


def measure_accelerate(
    case: Case, folder: Path, threads: int, reference: Path, expected: list[list[int]], resident: BufferRow
) -> BufferRow:
    """accelerate's disk offload, one round of fewer tokens, since it is slow."""
    side = Side(ACCELERATE, "float32", OFFLOADED, python_path=reference)
    row, tokens = _measure(side, {}, case, 1, folder, threads, expected)
    return _compared(row, tokens == [line[: case.new_tokens] for line in expected], [resident])


def _measure(
    side: Side,
    settings: dict[str, Any],
    case: Case,
    rounds: int,
    folder: Path,
    threads: int,
    expected: list[list[int]],
) -> tuple[BufferRow, list[list[int]]]:
    forget_folder(folder)
    with tempfile.NamedTemporaryFile(suffix=".txt") as log, Worker(side, folder, threads, Path(log.name)) as worker:
        try:
            worker.wait_ready()
            tokens = worker.ask("begin", **asdict(case))["tokens"]
            answers = [worker.ask("round") for _ in range(rounds)]
            report = worker.ask("report")
        except SideError as error:
            return BufferRow(side.name, settings, error=str(error)), []
    seconds = tuple(answer["decoder"] for answer in answers)
    peak = max(answer["peak_bytes"] for answer in answers)
    grown = peak - worker.facts["loaded_bytes"]
    row = BufferRow(
        side.name,
        settings,
        tokens_per_second=case.tokens["decoder"] / median(seconds),
        seconds=seconds,
        peak_bytes=peak,
        grown_bytes=grown,
        **_of_buffer(report, case, grown),
    )
    return row, tokens


def _of_buffer(report: Mapping[str, Any], case: Case, grown: int) -> dict[str, Any]:
    """The columns that a buffered side's own report fills."""
    if not report:
        return {}
    buffer, caches = report["buffer"], report["caches"]
    misses, hits = (sum(cache[name] for cache in caches) for name in ("misses", "hits"))
    nbytes = sum(sum(cache["bytes_read"].values()) for cache in caches)
    allowed = buffer["arena_bytes"] + buffer["workspace_bytes"] + buffer["host_bytes"] + SLACK_BYTES
    return {
        "miss_rate": misses / max(misses + hits, 1),
        "bytes_per_token": nbytes / case.tokens["decoder"],
        "stall_seconds": sum(cache["stall_seconds"] for cache in caches),
        "arena_bytes": buffer["arena_bytes"],
        "within_budget": grown <= allowed,
    }


def _compared(row: BufferRow, equal: bool, rows: Sequence[BufferRow]) -> BufferRow:
    """With what it is beside the resident model, the first of ``rows`` or itself."""
    resident = rows[0].tokens_per_second if rows else row.tokens_per_second
    ratio = row.tokens_per_second / resident if resident else 0.0
    return BufferRow(**{**vars(row), "tokens_equal": equal and row.error is None, "of_resident": ratio})


def _name(side: BufferSide) -> str:
    if side.budget is None:
        return RESIDENT
    details = [f"{side.budget}%", side.tier]
    details += [side.policy] if side.policy != "auto" else []
    details += [f"pool a {side.pool}"] if side.pool != "auto" else []
    details += [f"prefetch {side.prefetch}"] if side.prefetch != "auto" else []
    return ", ".join(details)
