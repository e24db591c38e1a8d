"""Which rows of a decoder belong to sentences that are finished: what is computed for them is thrown away.

Without beams a row is a sentence, which ends with its end token. With beams a sentence goes on until none of its
running beams can get better than those that ended; Transformers knows that of every sentence, and asks its method
``_check_early_stop_heuristic`` with each step, so that is where it is listened to.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, StoppingCriteria, StoppingCriteriaList

from hf_integration.padding import PaddingMasks
from hf_integration.patching import Patches

_HEURISTIC = "_check_early_stop_heuristic"


class FinishedSentences:
    """Tells the layers of ``model``, through ``masks``, during a ``generate`` that has the criteria of ``watching``."""

    def __init__(self, model: GenerationMixin, masks: PaddingMasks) -> None:
        self._model, self._masks = model, masks

    def install(self, patches: Patches) -> None:
        """Listen to beam search, where this release of Transformers lets one."""
        if hasattr(type(self._model), _HEURISTIC):
            patches.set_attribute(self._model, _HEURISTIC, self.after_beam_step)

    def watching(self, settings: dict[str, Any]) -> StoppingCriteriaList:
        """The criteria of ``settings``, which are those of a ``generate`` call, and one that notes ends."""
        criteria = StoppingCriteriaList([*(settings.pop("stopping_criteria", None) or ())])
        criteria.append(_NoteFinished(self._masks, self._ends(settings)))
        return criteria

    def forget(self) -> None:
        """Of another batch nothing is known."""
        self._masks.finished = None

    def after_beam_step(self, **known: Any) -> Tensor:
        """``GenerationMixin._check_early_stop_heuristic``: (B, 1), which sentences can still get better."""
        improvable: Tensor = getattr(type(self._model), _HEURISTIC)(**known)
        open_sentences = improvable[:, 0]
        if known["early_stopping"] is True:  # then a sentence is done as well when so many of its beams have ended
            open_sentences = open_sentences & ~known["is_sent_finished"].all(dim=-1)
        num_beams = known["running_beam_scores"].shape[1]
        self._masks.finished = (~open_sentences).repeat_interleave(num_beams)
        return improvable

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
