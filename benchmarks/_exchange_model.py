"""A cost model of the exchanges: every message costs a latency, every byte its share of a bandwidth. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from _exchange_ranks import UNEVEN, Setting

FLOAT_BYTES, COUNT_BYTES = 4, 8


@dataclass(frozen=True)
class Sample:
    """One all-to-all as measured: messages and bytes that left a rank, and seconds."""

    messages: int
    nbytes: int
    seconds: float


@dataclass(frozen=True)
class CostModel:
    """``seconds = messages * latency + bytes / bandwidth``, of one rank's share of a collective.

    Attributes:
        latency: seconds a message.
        bandwidth: bytes a second that leave a rank while all ranks send.
        error: median relative error on the samples it was fitted to.
    """

    latency: float
    bandwidth: float
    error: float

    def seconds(self, messages: float, nbytes: float) -> float:
        """What they take."""
        return messages * self.latency + nbytes / self.bandwidth

    def predict(self, setting: Setting, side: str, num_ranks: int) -> float:
        """Seconds of one layer's exchange, there and back, with rows spread evenly."""
        peers, away = num_ranks - 1, (num_ranks - 1) / num_ranks
        rows = 2 * self.seconds(peers, setting.elements(side) * FLOAT_BYTES * away)
        if side == UNEVEN:
            return rows + self.seconds(peers, setting.num_experts * COUNT_BYTES * away)
        # The agreement on a capacity: an all-reduce of one number.
        steps = 2 * math.ceil(math.log2(num_ranks))
        return rows + self.seconds(steps, steps * COUNT_BYTES)


def fit(samples: Sequence[Sample]) -> CostModel:
    """The latency and bandwidth with the least squared relative error; neither is negative."""
    scaled = np.array([[sample.messages / sample.seconds, sample.nbytes / sample.seconds] for sample in samples])
    ones = np.ones(len(samples))
    latency, per_byte = np.linalg.lstsq(scaled, ones, rcond=None)[0]
    if latency < 0:
        latency, per_byte = 0.0, np.linalg.lstsq(scaled[:, 1:], ones, rcond=None)[0][0]
    if per_byte <= 0:
        raise ValueError("the samples show no bandwidth: larger messages took no longer than small ones")
    errors = np.abs(scaled @ np.array([latency, per_byte]) - ones)
    return CostModel(float(latency), 1 / float(per_byte), float(np.median(errors)))
