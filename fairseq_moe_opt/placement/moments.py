"""How much of a history's averages and correlations to believe in."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fairseq_moe_opt.placement.history import Shares

_NEGLIGIBLE = 0.05
"""Autocorrelation under which two batches count as independent."""


def believed_second_moment(shares: Shares) -> NDArray[np.float64]:
    """(E, E) estimate of E[a a^T] for a batch's shares a, which placing on must not fit to accidents.

    E experts have E^2 / 2 correlations, and a history has few independent batches to learn them from. So each
    correlation is moved towards 0 by its standard error under independence, 1 / sqrt(effective batches), and what is
    smaller than that is 0 (soft thresholding). Means and variances are taken as they are.
    """
    mean = shares.mean(axis=0)
    centred = shares - mean
    spread = np.sqrt((centred**2).mean(axis=0))
    scale = np.where(spread > 1e-12, spread, np.inf)
    correlation = (centred / scale).T @ (centred / scale) / len(shares)
    error = 1 / np.sqrt(effective_batches(shares))
    believed = np.sign(correlation) * np.maximum(np.abs(correlation) - error, 0.0)
    np.fill_diagonal(believed, 1.0)
    return np.asarray(np.outer(mean, mean) + believed * np.outer(spread, spread))


def effective_batches(shares: Shares) -> float:
    """How many independent batches say as much as these (B, E), 1 to B.

    B over the integrated autocorrelation time 1 + 2 sum_k rho_k: sticky experts make neighbouring batches alike. rho_k
    is taken over all experts together, each by its variance, up to the first that is negligible.
    """
    centred = shares - shares.mean(axis=0)
    variance = float((centred**2).mean(axis=0).sum())
    time = 1.0
    for lag in range(1, len(shares) // 2):
        covariance = float((centred[lag:] * centred[:-lag]).mean(axis=0).sum())
        if covariance <= _NEGLIGIBLE * variance:
            break
        time += 2 * covariance / variance
    return max(1.0, len(shares) / time)
