"""Continuing lines of text with a loaded language model: in batches of like length, output in input order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import tee
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from fairseq_moe_opt.errors import OptionError
from hf_integration.text import source_limit
from hf_integration.translate import LineJob, Row, Truncation, pad_rows

NEW_TOKENS = 64
"""How many tokens a text is continued by, where nothing says more."""

_SEED_STEP = 1_000_003
"""Between the random numbers of two seeds there are those of so many lines."""


@dataclass(frozen=True)
class Continued:
    """A prompt and what the model makes of it."""

    prompt: str
    text: str


def continue_lines(
    model: PreTrainedModel,
    tokenizer: Any,
    lines: Iterable[str],
    *,
    batch_size: int = 16,
    generation: Mapping[str, Any] | None = None,
    seed: int = 0,
    lines_before: int = 0,
    on_progress: Callable[[int], None] | None = None,
    on_truncated: Callable[[Truncation], None] | None = None,
) -> Iterator[Continued]:
    """One continuation a line, in order, lazily, as :func:`~hf_integration.translate.translate_lines` translates.

    An empty line is continued from the beginning of a text. Of a line that leaves no room for new tokens the end is
    taken, and ``on_truncated`` is told. ``generation`` holds settings of a ``GenerationConfig``; what it leaves open is
    as the model's own says, else greedy and ``NEW_TOKENS``. Where tokens are sampled, ``seed`` sets torch's random
    numbers anew for every batch, so that they depend neither on the ranks that share the work nor, with the number of
    ``lines_before`` these, on where a run was taken up again.

    Raises OptionError for a batch size below 1, or more new tokens than the model has positions, both at once.
    """
    if batch_size < 1:
        raise OptionError("batch_size", f"{batch_size} is not 1 or more")
    config = generation_config(model.generation_config, generation or {}, tokenizer)
    told = (on_progress or _ignore, on_truncated or _ignore)
    job = _PromptJob(model, tokenizer, {}, config, batch_size, *told, seed=seed, lines_before=lines_before)
    _ = job.limit  # raises
    prompts, given = tee(lines)
    return (Continued(prompt, text) for prompt, text in zip(prompts, job.run(given), strict=True))


def generation_config(own: GenerationConfig, given: Mapping[str, Any], tokenizer: Any) -> GenerationConfig:
    """The settings to generate with: those ``given`` over the model's ``own``; lengths are of new tokens."""
    config = copy.deepcopy(own)
    wanted = {"max_new_tokens": own.max_new_tokens or NEW_TOKENS, "max_length": None, **given}
    if getattr(config, "pad_token_id", None) is None:
        wanted["pad_token_id"] = _padding(tokenizer)
    config.update(**wanted, return_dict_in_generate=False)
    return config


def _ignore(_: object) -> None:
    pass


def _padding(tokenizer: Any) -> int:
    """An id to fill rows up with; which one it is changes nothing."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(one) for one in known if one is not None)


@dataclass(frozen=True)
class _PromptJob(LineJob):
    """Rows are padded on the left, and what is decoded is new."""

    seed: int = 0
    lines_before: int = 0

    @property
    def limit(self) -> int | None:
        """Tokens of a prompt beside which there is room for all new ones."""
        positions, new = source_limit(self.model.config), int(self.config.max_new_tokens)
        if positions is not None and new >= positions:
            raise OptionError(
                "max_new_tokens", f"{new} leave no room for a prompt: this model has {positions:,} positions"
            )
        return None if positions is None else positions - new

    def is_left_out(self, line: str) -> bool:
        """Never: an empty text can be continued."""
        return False

    def cut(self, line: str, ids: Sequence[int], limit: int) -> Sequence[int]:
        """The last tokens, after what begins a text."""
        begins = ids[:1] if limit > 1 and ids[0] in self.tokenizer.all_special_ids else []
        return [*begins, *ids[len(ids) - limit + len(begins) :]]

    def inputs(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Ids and their mask."""
        if self.config.do_sample:
            torch.manual_seed(self.seed * _SEED_STEP + self.lines_before + rows[0].line)
        ids, mask = pad_rows([row.ids for row in rows], _padding(self.tokenizer), left=True)
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}

    def texts(self, rows: Sequence[Row], output: Tensor) -> list[str]:
        """What follows each prompt."""
        width = max(len(row.ids) for row in rows)
        return [self._after(row.ids, new) for row, new in zip(rows, output[:, width:].tolist(), strict=True)]

    def _after(self, prompt: Sequence[int], new: Sequence[int]) -> str:
        """The text of ``new``: decoded together with its prompt, because how a token is spelled may depend on that."""
        how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        before, whole = (self.tokenizer.decode(ids, **how) for ids in (list(prompt), [*prompt, *new]))
        text: str = whole.removeprefix(before) if whole.startswith(before) else self.tokenizer.decode(new, **how)
        return text

    def _encode(self, texts: Sequence[str], **how: Any) -> tuple[list[list[int]], int | None]:
        encoded, _ = super()._encode(texts, **how)
        first = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else self.tokenizer.eos_token_id
        return [ids or [first or 0] for ids in encoded], None
