"""A language model over lines of text: all of them read, none written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from hf_integration.translate import pad_rows


def read_lines(
    model: nn.Module, tokenizer: Any, lines: Sequence[str], batch_size: int, advance: Callable[[int], None]
) -> None:
    """Have a language model read ``lines``, batches of like length, and throw away what it says of them."""
    used = [line for line in lines if line.strip()]
    advance(len(lines) - len(used))
    rows: list[list[int]] = tokenizer(used, verbose=False)["input_ids"] if used else []
    limit = getattr(model.config, "max_position_embeddings", None)
    ordered = sorted((row[:limit] for row in rows if row), key=len, reverse=True)
    device = next(model.parameters()).device
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        ids, mask = pad_rows(batch, tokenizer.pad_token_id or 0)
        with torch.inference_mode():
            model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        advance(len(batch))
