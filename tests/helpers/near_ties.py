"""Tokens that differ: whether rounding can have done it, since the reference itself could hardly decide."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

CLOSE = 1e-4
"""Between the two best logits, so that rounding may change which one is the best."""

Rows = Sequence[Sequence[int]]


def first_gaps(model: Any, inputs: Mapping[str, Tensor], expected: Rows, found: Rows) -> list[float]:
    """For every row that differs, the gap between the two best logits of ``model`` where it begins to.

    ``expected`` are tokens that ``model`` has generated greedily from ``inputs``, the token decoding starts from
    included; rows may differ in padding at their end.
    """
    gaps = []
    for row, (right, other) in enumerate(zip(expected, found, strict=True)):
        length = max(len(right), len(other))
        right, other = ([*one, *[model.config.pad_token_id] * (length - len(one))] for one in (right, other))
        place = next((place for place in range(length) if right[place] != other[place]), None)
        if place is not None:
            one = {name: value[row : row + 1] for name, value in inputs.items()}
            with torch.no_grad():
                logits = model(**one, decoder_input_ids=torch.tensor([right[:place]])).logits[0, -1]
            best, second = logits.topk(2).values.tolist()
            gaps.append(best - second)
    return gaps
