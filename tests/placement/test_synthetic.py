"""The synthetic histories have the statistics that their table promises, for several seeds, and are reproducible."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.placement import WORKLOADS, LoadHistory, synthetic_history
from fairseq_moe_opt.placement.synthetic import domain_of_batch, topic_of_expert

BATCHES = 256
SEEDS = (1, 2, 3)
SIZES = (128, 512)


def layer(workload: str, num_experts: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Counts and shares of one layer."""
    history = synthetic_history(workload, num_experts, BATCHES, 1, seed)
    (name,) = history.layers
    return history.layers[name], history.shares(name)


def correlations(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson correlations of the experts that ever change."""
    return np.corrcoef(shares[:, shares.std(axis=0) > 0].T)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_experts", SIZES)
def test_decoder_is_idle_sticky_and_correlated(num_experts: int, seed: int) -> None:
    counts, shares = layer("decoder", num_experts, seed)
    active = counts > 0
    assert 0.70 <= 1 - active.mean() <= 0.80
    assert (active[1:] & active[:-1]).sum() / active[:-1].sum() > 2 * active.mean()
    changing = shares.std(axis=0) > 0
    topics = topic_of_expert(num_experts)[changing]
    found = correlations(shares)
    same = (topics[:, None] == topics) & ~np.eye(len(topics), dtype=bool)
    assert found[same].mean() > 0.2
    assert abs(found[topics[:, None] != topics].mean()) < 0.05


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_experts", SIZES)
@pytest.mark.parametrize("workload", ["decoder", "encoder"])
def test_one_expert_takes_up_to_half_of_a_batch(workload: str, num_experts: int, seed: int) -> None:
    _, shares = layer(workload, num_experts, seed)
    assert 0.35 <= shares.max() <= 0.60


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_experts", SIZES)
def test_encoder_is_dense_and_independent(num_experts: int, seed: int) -> None:
    counts, shares = layer("encoder", num_experts, seed)
    assert (counts > 0).mean() > 0.95
    found = correlations(shares)
    assert abs(found[~np.eye(len(found), dtype=bool)].mean()) < 0.06


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("num_experts", SIZES)
def test_lm_is_skewed_with_dead_experts_and_domains(num_experts: int, seed: int) -> None:
    counts, shares = layer("lm", num_experts, seed)
    tenth = num_experts // 10
    assert np.sort(shares.mean(axis=0))[-tenth:].sum() > 0.4
    assert (counts.sum(axis=0) == 0).any()
    assert (counts > 0).mean() > 0.75
    domains = domain_of_batch(BATCHES)
    hottest = [set(np.argsort(-shares[domains == one].mean(axis=0))[:tenth].tolist()) for one in (0, 1)]
    assert 0.1 < len(hottest[0] & hottest[1]) / tenth < 0.8


@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_seed_decides_everything(workload: str) -> None:
    def draw(seed: int) -> LoadHistory:
        return synthetic_history(workload, 16, 12, 2, seed)

    one, again, other = draw(1), draw(1), draw(2)
    for name in one.layers:
        np.testing.assert_array_equal(one.layers[name], again.layers[name])
        assert (one.layers[name] != other.layers[name]).any()
    first, second = one.layers.values()
    assert (first != second).any()


def test_every_batch_has_the_same_rows() -> None:
    for workload in WORKLOADS:
        rows = layer(workload, 128, 1)[0].sum(axis=1)
        assert len(set(rows.tolist())) == 1


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(OptionError, match="'workload': 'mt' is not one of decoder, encoder, lm"):
        synthetic_history("mt", 128, 10, 1, 0)
    with pytest.raises(OptionError, match="'num_experts': must be 8 or more; got 4"):
        synthetic_history("lm", 4, 10, 1, 0)
    with pytest.raises(OptionError, match="'num_batches': must be 1 or more; got 0"):
        synthetic_history("lm", 8, 0, 1, 0)
    with pytest.raises(OptionError, match="'num_layers': must be 1 or more; got 0"):
        synthetic_history("lm", 8, 1, 0, 0)
