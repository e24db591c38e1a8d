"""``generate`` on ranks that share experts: each has batches of its own, and all step together until the last is done.

Transformers' ``synced_gpus`` lets a rank that is done go on calling the model, so that others' exchanges find it there.
What such a rank computes then, like a dummy batch and rows of finished sentences, is routed to no expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, StoppingCriteria, StoppingCriteriaList

from fairseq_moe_opt.build import Rebalancer
from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.parallel import Collectives
from hf_integration.padding import PaddingMasks


class SyncedDecoding:
    """``model.generate``, as one work of all ``ranks``: every rank has to call it equally often.

    Attributes:
        ranks: that step together.
        rebalancer: is told of the end of every call, the moment at which no rank is within a forward.
    """

    def __init__(
        self, model: GenerationMixin, ranks: Collectives, masks: PaddingMasks, rebalancer: Rebalancer | None = None
    ) -> None:
        self.ranks, self.rebalancer = ranks, rebalancer
        self._model, self._masks = model, masks
        self._is_dummy = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``generate`` with the same arguments and result; OptionError for ``synced_gpus=False``."""
        if kwargs.pop("synced_gpus", None) is False:
            raise OptionError("synced_gpus", "False would leave other ranks waiting: these ranks share their experts")
        criteria = StoppingCriteriaList([*(kwargs.pop("stopping_criteria", None) or ())])
        criteria.append(_NoteFinished(self._masks, self._ends(kwargs)))
        try:
            result = type(self._model).generate(
                self._model, *args, stopping_criteria=criteria, synced_gpus=True, **kwargs
            )
        finally:
            self._masks.idle, self._masks.finished = False, None
        if self.rebalancer is not None:
            self.rebalancer.call_ended()
        return result

    def dummy(self, **settings: Any) -> None:
        """Take part in one ``generate`` of the others, with one token whose result is thrown away."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=self._model.device)
        self._is_dummy = self._masks.idle = True
        try:
            self(input_ids=token, attention_mask=torch.ones_like(token), **settings)
        finally:
            self._is_dummy = False

    def has_unfinished(self, this_peer_finished: bool, synced_gpus: bool, device: torch.device) -> bool:
        """``GenerationMixin._has_unfinished_sequences`` over the ranks that share experts, not the world."""
        done = bool(this_peer_finished) or self._is_dummy
        self._masks.idle = done
        return self.ranks.maximum(int(not done)) > 0

    def _ends(self, settings: Mapping[str, Any]) -> tuple[int, ...]:
        """Tokens that end a sentence."""
        configs = (settings.get("generation_config"), self._model.generation_config)
        found = [settings.get("eos_token_id"), *(getattr(config, "eos_token_id", None) for config in configs)]
        ends = next((one for one in found if one is not None), ())
        return tuple(ends) if isinstance(ends, (Sequence, Tensor)) else (int(ends),)


class _NoteFinished(StoppingCriteria):
    """Notes which sentences have come to an end; stops nothing itself."""

    def __init__(self, masks: PaddingMasks, ends: Iterable[int]) -> None:
        self._masks = masks
        self._ends = torch.tensor([int(end) for end in ends], dtype=torch.int64)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(B,) False for (B, T) ``input_ids``."""
        nothing = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        # With beams, these are candidates, more than the rows that are computed, and say nothing of those.
        if len(input_ids) == self._masks.decoder_rows:
            ended = torch.isin(input_ids[:, -1], self._ends.to(input_ids.device))
            before = self._masks.finished
            self._masks.finished = ended if before is None else ended | before
        return nothing


def generate_batches(
    model: Any,
    batches: Sequence[Mapping[str, Any]],
    *,
    on_done: Callable[[int], None] | None = None,
    **settings: Any,
) -> list[Tensor]:
    """Generate from each of ``batches``, keyword arguments of ``generate`` as ``settings`` are for all of them.

    On ranks that share experts each has batches of its own, and may have fewer than others: how many calls are made is
    agreed first, and a rank without a batch left takes part in those of the others. ``on_done`` is told the number of
    every call, from 0, when it is done. The report of an optimised model covers what it covered before, and these.
    """
    decoding: SyncedDecoding | None = getattr(getattr(model, "moe", None), "decoding", None)
    generate = decoding or type(model).generate.__get__(model)
    calls = len(batches) if decoding is None else decoding.ranks.maximum(len(batches))
    outputs = []
    for number in range(calls):
        if number < len(batches):
            outputs.append(generate(**batches[number], **settings))
        elif decoding is not None:
            decoding.dummy(**settings)
        if on_done is not None:
            on_done(number)
    return outputs
