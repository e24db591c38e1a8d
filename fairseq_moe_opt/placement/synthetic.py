"""Seeded load histories with the statistics that the paper tells of its traces, for where no trace can be recorded.

Which statistic imitates which sentence (sections 1.5 and 4.3 of arXiv 2303.06182):

=========  ==============================================================  =========================================
workload   sentence                                                        statistic
=========  ==============================================================  =========================================
decoder    MT decoder "~75 % inactive" even at batch 96                    mean share of experts without a row: .70-.80
decoder    "the same expert is active in consecutive batches"              P(active | active before) over twice
                                                                           P(active)
decoder    "activations are correlated" between experts                    mean Pearson correlation of experts of one
                                                                           topic over .2, of two topics near 0
decoder,   "a single expert may get almost half of the full batch"         largest share of any batch: .35-.60
encoder
encoder    "almost all experts active", independent of each other          over 95 % active; correlations near 0
lm         "a few hot experts take a large share in every batch, others    the 10 % hottest take over 40 % of the
           always little; some never get a token"                          rows in the mean; some columns are all 0
lm         "almost all experts active"                                     over 75 % active
lm         "the hot set and its heat change with the domain"               the hottest 10 % of two domains overlap by
                                                                           less than .8, but do overlap
=========  ==============================================================  =========================================

All else (the family of distributions, how long a topic stays, rows a batch) is this file's own choice. A layer is drawn
independently of the others, as placement treats it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.placement.history import Counts, LoadHistory

_Floats = NDArray[np.float64]
_Generator = np.random.Generator

DECODER_ROWS = 192
"""Rows of one decoding step of 96 sentences with two experts a token: the paper's largest decoder batch."""
ENCODER_ROWS = 48 * 30 * 2
"""Rows of 48 sentences of 30 tokens with two experts a token."""
LM_ROWS = 8 * 1024 * 2
"""Rows of 8 sequences of 1024 tokens with two experts a token."""

EXPERTS_PER_TOPIC = 4
"""Experts of the decoder that wake and sleep together."""
TOPIC_ON, TOPIC_STAYS = 0.29, 0.9
"""Share of time a topic is awake, and the chance that an awake one still is in the next batch."""
AWAKE, ASLEEP = 0.9, 0.02
"""Chance that an expert takes part in a batch while its topic is awake, and while it is not."""
BURST_SHARE, BURST_CHANCE = (0.3, 0.48), 0.04
"""What one expert takes of a batch in a burst, and how often a batch has one."""
DOMAINS = 3
"""Wikipedia, PubMed, Github: batches take turns, as the pooled validation sets would."""
DOMAIN_WEIGHT = 0.5
"""How much of a log popularity belongs to the domain alone."""
LOG_HEAT = 1.8
"""Standard deviation of a log popularity in the language model."""
NEVER_USED = 0.04
"""Experts of the language model that no token ever chooses."""


@dataclass(frozen=True)
class Workload:
    """A synthetic workload.

    Attributes:
        name: ``decoder``, ``encoder`` or ``lm``.
        correlated: whether its experts are correlated by construction.
        draw: (generator, batches, experts) to one layer's (B, E) counts.
    """

    name: str
    correlated: bool
    draw: Callable[[_Generator, int, int], Counts]


def synthetic_history(workload: str, num_experts: int, num_batches: int, num_layers: int, seed: int) -> LoadHistory:
    """A history of ``workload`` (a key of ``WORKLOADS``); the same arguments give the same counts.

    Raises OptionError for a workload that does not exist or sizes below 1 (layers, batches) or 8 (experts).
    """
    if workload not in WORKLOADS:
        raise OptionError("workload", f"{workload!r} is not one of {', '.join(WORKLOADS)}")
    for option, value, least in (
        ("num_experts", num_experts, 8),
        ("num_batches", num_batches, 1),
        ("num_layers", num_layers, 1),
    ):
        if value < least:
            raise OptionError(option, f"must be {least} or more; got {value}")
    draw = WORKLOADS[workload].draw
    seeds = np.random.SeedSequence(seed).spawn(num_layers)
    return LoadHistory(
        {f"{workload}.{i}": draw(np.random.default_rng(one), num_batches, num_experts) for i, one in enumerate(seeds)}
    )


def topic_of_expert(num_experts: int) -> NDArray[np.int64]:
    """(E,) the topic of each expert of the decoder workload: scattered over the ids, so none is favoured by its own."""
    return np.asarray(np.random.default_rng(num_experts).permutation(num_experts) // EXPERTS_PER_TOPIC, dtype=np.int64)


def domain_of_batch(num_batches: int) -> NDArray[np.int64]:
    """(B,) the domain each batch of the lm workload comes from."""
    return np.arange(num_batches, dtype=np.int64) % DOMAINS


def _decoder(generator: _Generator, num_batches: int, num_experts: int) -> Counts:
    """Sticky topics switch correlated experts on and off; within a batch heat is persistent."""
    topics = topic_of_expert(num_experts)
    awake = _sticky_chains(generator, num_batches, int(topics.max()) + 1)[:, topics]
    taking_part = generator.random(awake.shape) < np.where(awake, AWAKE, ASLEEP)
    heat = np.exp(generator.normal(0.0, 0.8, num_experts))
    weight = taking_part * heat * generator.gamma(4.0, 0.25, awake.shape)
    # A batch in which nobody takes part still has rows: they go where the heat is.
    weight[weight.sum(axis=1) == 0] = heat
    # Few rows over many experts would leave the least hot of the awake ones idle by chance: E = 512 gets more rows.
    rows = DECODER_ROWS * max(1, num_experts // 128)
    return _sample(generator, _with_bursts(generator, _normalised(weight), heat), rows)


def _encoder(generator: _Generator, num_batches: int, num_experts: int) -> Counts:
    """Every expert is warm, on its own; now and then one takes nearly half of a batch."""
    heat = np.exp(generator.normal(0.0, 0.8, num_experts))
    weight = heat * generator.gamma(6.0, 1 / 6, (num_batches, num_experts))
    rows = ENCODER_ROWS * max(1, num_experts // 128)
    return _sample(generator, _with_bursts(generator, _normalised(weight), heat), rows)


def _lm(generator: _Generator, num_batches: int, num_experts: int) -> Counts:
    """A skewed popularity, part of it common and part of its domain's own; a few experts are dead."""
    common = generator.normal(0.0, LOG_HEAT, num_experts)
    own = generator.normal(0.0, LOG_HEAT, (DOMAINS, num_experts))
    log_heat = np.sqrt(1 - DOMAIN_WEIGHT) * common + np.sqrt(DOMAIN_WEIGHT) * own
    heat = np.exp(log_heat)[domain_of_batch(num_batches)]
    heat[:, generator.permutation(num_experts)[: max(1, round(NEVER_USED * num_experts))]] = 0.0
    return _sample(generator, _normalised(heat * generator.gamma(8.0, 1 / 8, heat.shape)), LM_ROWS)


def _sticky_chains(generator: _Generator, num_batches: int, num_topics: int) -> NDArray[np.bool_]:
    """(B, topics) two-state Markov chains, started from their stationary distribution."""
    wakes = TOPIC_ON * (1 - TOPIC_STAYS) / (1 - TOPIC_ON)
    awake = np.empty((num_batches, num_topics), dtype=np.bool_)
    awake[0] = generator.random(num_topics) < TOPIC_ON
    for batch in range(1, num_batches):
        awake[batch] = generator.random(num_topics) < np.where(awake[batch - 1], TOPIC_STAYS, wakes)
    return awake


def _with_bursts(generator: _Generator, shares: _Floats, heat: _Floats) -> _Floats:
    """``shares`` (B, E) where in some batches one of the four hottest experts takes a burst's share."""
    hottest = np.argsort(-heat, kind="stable")[:4]
    result: _Floats = shares.copy()
    for batch in np.flatnonzero(generator.random(len(shares)) < BURST_CHANCE):
        share = generator.uniform(*BURST_SHARE)
        expert = generator.choice(hottest)
        rest = np.where(np.arange(len(heat)) == expert, 0.0, result[batch] + 1e-9 * heat)
        result[batch] = rest * ((1 - share) / rest.sum())
        result[batch, expert] = share
    return result


def _sample(generator: _Generator, shares: _Floats, rows: int) -> Counts:
    """(B, E) counts of ``rows`` rows a batch."""
    return np.asarray([generator.multinomial(rows, row) for row in shares], dtype=np.int64)


def _normalised(weight: _Floats) -> _Floats:
    return np.asarray(weight / weight.sum(axis=1, keepdims=True), dtype=np.float64)


WORKLOADS: Mapping[str, Workload] = MappingProxyType(
    {
        one.name: one
        for one in (
            Workload("decoder", True, _decoder),
            Workload("encoder", False, _encoder),
            Workload("lm", False, _lm),
        )
    }
)
"""Every workload by name. The domains of ``lm`` correlate experts too, but the paper treats it as independent."""
