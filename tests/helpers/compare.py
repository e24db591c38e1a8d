"""Comparing tensors the way the project states its tolerances: relative to the largest expected number."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value; 0.0 for empty or equal tensors.

    A number that is not finite on one side only, or anywhere it is not the same on both, makes it infinite.
    """
    if expected.numel() == 0:
        return 0.0
    actual, expected = actual.double(), expected.double()
    finite = expected.isfinite()
    if not torch.equal(finite, actual.isfinite()) or not torch.equal(
        actual[~finite].nan_to_num(), expected[~finite].nan_to_num()
    ):
        return float("inf")
    difference = float((actual[finite] - expected[finite]).abs().max()) if finite.any() else 0.0
    scale = float(expected[finite].abs().max()) if finite.any() else 0.0
    if difference == 0.0:
        return 0.0
    return difference / scale if scale else float("inf")


def assert_close_relative(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Fail unless the shapes are equal and ``relative_difference`` is at most ``tolerance``."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    difference = relative_difference(actual, expected)
    if not difference <= tolerance:
        raise AssertionError(f"relative difference {difference:.3g} is above {tolerance:.3g}")
