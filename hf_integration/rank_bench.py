"""How fast ranks that share experts translate, by exchange and placement; what ``launch bench`` measures.

The ways are loaded side by side and give their tokens first, which have to be equal; then they take turns at doing the
same work, and only then does each do it once more to see where its time goes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from fairseq_moe_opt.errors import ParallelError
from fairseq_moe_opt.moe.report import Report
from fairseq_moe_opt.parallel import ALL_REDUCE, Collectives, TimedRanks
from fairseq_moe_opt.placement import Placement
from hf_integration.decoding import decoding_config
from hf_integration.expert_parallel import ExpertParallel
from hf_integration.loading import from_pretrained
from hf_integration.synced import generate_batches
from hf_integration.translate import pad_rows

PHASES = ("encoder", "decoder")


@dataclass(frozen=True)
class Way:
    """How experts are shared: ``exchange`` as in :class:`ExpertParallel`; ``placement`` None is in order."""

    exchange: str
    placement: Placement | None

    @property
    def placement_name(self) -> str:
        """The strategy that made the placement."""
        return "contiguous" if self.placement is None else self.placement.strategy


@dataclass(frozen=True)
class Work:
    """What is translated, the same for every way and on every rank.

    Attributes:
        batches: (B, T) ids and mask each, on the device.
        generation: settings of a ``GenerationConfig``; what it leaves open is as in ``translate_lines``.
        forced: the language token to begin with, if any.
        padding: what fills translations that are shorter than others of their batch.
    """

    batches: Sequence[Mapping[str, Tensor]]
    generation: Mapping[str, Any]
    forced: int | None
    padding: int

    @property
    def source_tokens(self) -> int:
        """Tokens of all sentences."""
        return sum(int(batch["attention_mask"].sum()) for batch in self.batches)

    def settings(self, model: Any) -> dict[str, Any]:
        """Of ``generate``."""
        config, _ = decoding_config(model.generation_config, {}, self.generation, self.padding)
        return {"generation_config": config, **({} if self.forced is None else {"forced_bos_token_id": self.forced})}


def text_batches(rows: Sequence[Sequence[int]], batch_size: int, padding: int, device: torch.device) -> list[Any]:
    """Batches of sentences of like length, the longest first, as translating makes them."""
    ordered = sorted(rows, key=len, reverse=True)
    batches = []
    for first in range(0, len(ordered), batch_size):
        ids, mask = pad_rows(ordered[first : first + batch_size], padding)
        batches.append({"input_ids": ids.to(device), "attention_mask": mask.to(device)})
    return batches


def made_up_rows(num_sentences: int, length: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Random tokens, which route as no text does; for a model without a text."""
    generator = torch.Generator().manual_seed(seed)
    first = min(4, vocabulary - 1)  # the controls come first
    rows: list[list[int]] = torch.randint(first, vocabulary, (num_sentences, length), generator=generator).tolist()
    return rows


@dataclass(frozen=True)
class RankShare:
    """What one rank did in one go.

    Attributes:
        rows: expert rows it computed, by phase.
        bytes_leaving: that it sent to other ranks (of an all-reduce, what it handed over).
        exchange_seconds: in collectives, once all ranks had come.
        waiting_seconds: until they had.
    """

    rows: Mapping[str, int]
    bytes_leaving: int
    exchange_seconds: float
    waiting_seconds: float


@dataclass(frozen=True)
class Measured:
    """One way.

    Attributes:
        exchange, placement: which.
        encoder_seconds, decoder_seconds: of the slowest rank, a round each.
        encoder_rate, decoder_rate: source tokens, and tokens of translations, a second: medians of all rounds.
        ranks: by rank, of a go that was timed piece by piece and is not among the rounds.
    """

    exchange: str
    placement: str
    encoder_seconds: tuple[float, ...]
    decoder_seconds: tuple[float, ...]
    encoder_rate: float
    decoder_rate: float
    ranks: tuple[RankShare, ...]

    def load(self, rank: int, phase: str) -> float:
        """The share of a phase's expert rows that ``rank`` computed."""
        return self.ranks[rank].rows[phase] / max(1, sum(share.rows[phase] for share in self.ranks))


@dataclass(frozen=True)
class BenchResult:
    """All ways, and how much each of them translated."""

    ways: tuple[Measured, ...]
    sentences: int
    source_tokens: int
    target_tokens: int

    def to_dict(self) -> dict[str, object]:
        """Plain values, ready for ``json.dump``."""
        return asdict(self)


@dataclass
class _Loaded:
    """A way with its model, and what its rounds took."""

    way: Way
    model: Any
    ranks: TimedRanks
    encoder: list[float] = field(default_factory=list)
    decoder: list[float] = field(default_factory=list)


def measure(
    path: str, loading: Mapping[str, Any], work: Work, ways: Sequence[Way], ranks: Collectives, rounds: int
) -> BenchResult:
    """Measure every way, on all ranks together; ``loading`` are arguments of ``from_pretrained``.

    Raises ParallelError on every rank, before anything is timed, where ways do not give the same tokens.
    """
    loaded = []
    for way in ways:
        timed = TimedRanks(ranks)
        model = from_pretrained(path, **loading, parallel=ExpertParallel(timed, way.placement, way.exchange))
        loaded.append(_Loaded(way, model, timed))
    outputs = [_translations(one, work) for one in loaded]
    for one, tokens in zip(loaded[1:], outputs[1:], strict=True):
        _require_equal(one.way, tokens, outputs[0])
    for _ in range(rounds):
        for one in loaded:
            seconds = _slowest(ranks, _timed(one, work))
            one.encoder.append(seconds[0])
            one.decoder.append(seconds[1])
    target_tokens = sum(len(row) for row in outputs[0])
    ways_measured = tuple(_measured(one, work, target_tokens) for one in loaded)
    return BenchResult(ways_measured, len(outputs[0]), work.source_tokens, target_tokens)


def _own(one: _Loaded, work: Work) -> Sequence[Mapping[str, Tensor]]:
    """The batches of this rank: every W-th, or all where ranks share each batch."""
    return work.batches if one.way.exchange == ALL_REDUCE else work.batches[one.ranks.rank :: one.ranks.size]


def _generate(one: _Loaded, work: Work) -> list[Tensor]:
    return generate_batches(one.model, _own(one, work), **work.settings(one.model))


def _translations(one: _Loaded, work: Work) -> list[list[int]]:
    """The tokens of every sentence, less padding and the token that decoding starts from; the same on every rank."""
    outputs = [output.tolist() for output in _generate(one, work)]
    if one.way.exchange != ALL_REDUCE:
        parts = cast("list[list[list[list[int]]]]", one.ranks.gather_objects(outputs))
        outputs = [parts[number % len(parts)][number // len(parts)] for number in range(len(work.batches))]
    return [_trimmed(row[1:], work.padding) for output in outputs for row in output]


def _trimmed(row: list[int], padding: int) -> list[int]:
    while row and row[-1] == padding:
        row = row[:-1]
    return row


def _require_equal(way: Way, found: list[list[int]], expected: list[list[int]]) -> None:
    different = [number for number, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]]
    if different:
        raise ParallelError(
            f"{way.exchange} with the placement {way.placement_name} gives other tokens than the first way for "
            f"{len(different)} of {len(expected)} sentences, so nothing was timed"
        )


def _timed(one: _Loaded, work: Work) -> tuple[float, float]:
    """Seconds in the encoder and outside of it, which is the decoder and the steps between."""
    device = one.model.device
    one.ranks.maximum(0)  # all begin together
    with _encoder_seconds(one.model) as encoder:
        start = _now(device)
        _generate(one, work)
        total = _now(device) - start
    return encoder[0], total - encoder[0]


@contextmanager
def _encoder_seconds(model: Any) -> Iterator[list[float]]:
    """One number, to which each forward of the encoder adds what it takes."""
    seconds, encoder, device = [0.0], model.get_encoder(), model.device

    def before(*_: object) -> None:
        seconds[0] -= _now(device)

    def after(*_: object) -> None:
        seconds[0] += _now(device)

    handles = [encoder.register_forward_pre_hook(before), encoder.register_forward_hook(after)]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _slowest(ranks: Collectives, seconds: tuple[float, float]) -> list[float]:
    return [ranks.maximum(round(one * 1e9)) / 1e9 for one in seconds]


def _measured(one: _Loaded, work: Work, target_tokens: int) -> Measured:
    """Rates of the rounds, and what one go more shows piece by piece."""
    one.model.moe.reset()
    one.ranks.reset()
    one.ranks.is_on = True
    _generate(one, work)
    one.ranks.is_on = False
    share = _share(one.model.moe.report(), one.ranks)
    return Measured(
        exchange=one.way.exchange,
        placement=one.way.placement_name,
        encoder_seconds=tuple(one.encoder),
        decoder_seconds=tuple(one.decoder),
        encoder_rate=work.source_tokens / statistics.median(one.encoder),
        decoder_rate=target_tokens / statistics.median(one.decoder),
        ranks=tuple(cast("list[RankShare]", one.ranks.gather_objects(share))),
    )


def _share(report: Report, ranks: TimedRanks) -> RankShare:
    exchanges = [(layer.phase, layer.exchange) for layer in report.layers if layer.exchange is not None]
    rows = {phase: sum(sum(one.slot_rows) for of, one in exchanges if of == phase) for phase in PHASES}
    leaving = sum(traffic.bytes_leaving for _, one in exchanges for traffic in one.traffic.values())
    return RankShare(rows, leaving, ranks.exchanging, ranks.waiting)
