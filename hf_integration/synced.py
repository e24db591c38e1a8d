"""``generate`` on ranks that share experts.

Ranks with batches of their own step together until the last is done: Transformers' ``synced_gpus`` lets a rank that is
done go on calling the model, so that others' exchanges find it there. What such a rank computes then, like a dummy
batch and rows of finished sentences, is routed to no expert. Ranks that are all given the same batch do the same steps
anyway; that it is the same is compared first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from fairseq_moe_opt.build import Rebalancer
from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.parallel import Collectives, agree, follow_first
from hf_integration.finished import FinishedSentences
from hf_integration.padding import PaddingMasks
from hf_integration.patching import Patches


class SyncedDecoding:
    """``model.generate``, as one work of all ``ranks``, which have batches of their own; all call it equally often.

    Attributes:
        ranks: that step together.
        rebalancer: is told of the end of every call, the moment at which no rank is within a forward.
    """

    def __init__(
        self, model: GenerationMixin, ranks: Collectives, masks: PaddingMasks, rebalancer: Rebalancer | None = None
    ) -> None:
        self.ranks, self.rebalancer = ranks, rebalancer
        self._model, self._masks = model, masks
        self._finished = FinishedSentences(model, masks)
        self._is_dummy = False

    def install(self, patches: Patches) -> None:
        """Let ``generate`` ask these ranks, not the world, whether anyone goes on."""
        self._finished.install(patches)
        patches.set_attribute(self._model, "_has_unfinished_sequences", self.has_unfinished)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``generate`` with the same arguments and result; OptionError for ``synced_gpus=False``."""
        if kwargs.pop("synced_gpus", None) is False:
            raise OptionError("synced_gpus", "False would leave other ranks waiting: these ranks share their experts")
        criteria = self._finished.watching(kwargs)
        try:
            result = type(self._model).generate(
                self._model, *args, stopping_criteria=criteria, synced_gpus=True, **kwargs
            )
        finally:
            self._masks.idle = False
            self._finished.forget()
        if self.rebalancer is not None:
            self.rebalancer.call_ended()
        return result

    def calls(self, num_batches: int) -> int:
        """How often all ranks call ``generate`` when this one has so many batches."""
        return self.ranks.maximum(num_batches)

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


class SharedDecoding:
    """``model.generate`` of ranks that are all given the same batch: all of them get its result.

    Attributes:
        ranks: that compute together.
    """

    def __init__(self, model: GenerationMixin, ranks: Collectives, masks: PaddingMasks) -> None:
        self.ranks = ranks
        self._model = model
        self._finished = FinishedSentences(model, masks)

    def install(self, patches: Patches) -> None:
        """Listen to beam search."""
        self._finished.install(patches)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """``generate`` with the same arguments and result; ParallelError unless they are the same on every rank.

        Tokens that are drawn are drawn alike: every rank goes on from rank 0's random state.
        """
        if kwargs.pop("synced_gpus", None):
            raise OptionError("synced_gpus", "has no use here: ranks that share their batch finish with the same step")
        inputs = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
        settings = {name: value for name, value in kwargs.items() if name not in inputs}
        agree(self.ranks, {"batch": _digest((*args, sorted(inputs.items()))), "settings": _digest(settings)})
        if self._draws(kwargs):
            self._draw_alike()
        criteria = self._finished.watching(kwargs)
        try:
            return type(self._model).generate(self._model, *args, stopping_criteria=criteria, **kwargs)
        finally:
            self._finished.forget()

    def calls(self, num_batches: int) -> int:
        """``num_batches``; ParallelError unless every rank has as many."""
        agree(self.ranks, {"number of batches": str(num_batches)})
        return num_batches

    def _draws(self, settings: Mapping[str, Any]) -> bool:
        configs = (settings.get("generation_config"), self._model.generation_config)
        found = [settings.get("do_sample"), *(getattr(config, "do_sample", None) for config in configs)]
        return bool(next((one for one in found if one is not None), False))

    def _draw_alike(self) -> None:
        device = torch.cuda if self._model.device.type == "cuda" else torch
        device.set_rng_state(follow_first(self.ranks, device.get_rng_state()))


Decoding = SyncedDecoding | SharedDecoding


def _digest(value: object) -> str:
    """Short, and the same for equal tensors, numbers and texts, in whatever they are in."""
    digest = hashlib.sha256()
    _add(digest, value)
    return digest.hexdigest()[:16]


def _add(digest: Any, value: object) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        _add(digest, sorted(value.items()))
    elif isinstance(value, (list, tuple)):
        for one in value:
            _add(digest, one)
    elif isinstance(value, (str, int, float, type(None), GenerationConfig)):
        digest.update(f"{value!r};".encode())
    else:
        digest.update(f"{type(value).__name__};".encode())  # of other objects, no more can be compared


def generate_batches(
    model: Any,
    batches: Sequence[Mapping[str, Any]],
    *,
    on_done: Callable[[int], None] | None = None,
    **settings: Any,
) -> list[Tensor]:
    """Generate from each of ``batches``, keyword arguments of ``generate`` as ``settings`` are for all of them.

    On ranks that share experts each has batches of its own, and may have fewer than others: how many calls are made is
    agreed first, and a rank without a batch left takes part in those of the others. Ranks that share their batches (see
    :class:`~hf_integration.ExpertParallel`) all give the same. ``on_done`` is told the number of every call, from 0,
    when it is done. The report of an optimised model covers what it covered before, and these.
    """
    decoding: Decoding | None = getattr(getattr(model, "moe", None), "decoding", None)
    generate = decoding or type(model).generate.__get__(model)
    calls = len(batches) if decoding is None else decoding.calls(len(batches))
    outputs = []
    for number in range(calls):
        if number < len(batches):
            outputs.append(generate(**batches[number], **settings))
        elif isinstance(decoding, SyncedDecoding):
            decoding.dummy(**settings)
        if on_done is not None:
            on_done(number)
    return outputs
