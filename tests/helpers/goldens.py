"""Recorded outputs of other implementations, and how tests compare with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.helpers.compare import relative_difference

DATA = Path(__file__).parents[1] / "data"
FAIRSEQ_GOLDENS = DATA / "goldens"
HF_GOLDENS = DATA / "hf_goldens"
TOLERANCE = 1e-5
"""Largest difference allowed, relative to the largest reference value."""


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_arrays(path: Path) -> Mapping[str, Tensor]:
    """All arrays of an ``.npz`` as tensors; dtypes stay as they are."""
    with np.load(path) as arrays:
        return {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}


def real_difference(actual: Tensor, expected: Tensor, real: Tensor) -> float:
    """``relative_difference`` over the positions that ``real``, a mask over the leading dimensions, has."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    return relative_difference(actual[real.bool()], expected[real.bool()])
