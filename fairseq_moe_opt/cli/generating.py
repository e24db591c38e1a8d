"""What ``moe-opt generate`` does otherwise than ``moe-opt translate``, whose body it shares."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from fairseq_moe_opt.cli.translating import Translation
from fairseq_moe_opt.errors import InputError

if TYPE_CHECKING:
    from hf_integration.translate import Truncation


@dataclass(frozen=True)
class Generation(Translation):
    """What to continue. ``with_prompt`` writes the prompt before what follows it, ``as_json`` both in an object."""

    seed: int = 0
    with_prompt: bool = True
    as_json: bool = False

    @classmethod
    def of(cls, job: Translation) -> Generation:
        """The same work with a language model."""
        if any(language is not None for language in job.languages):
            raise InputError(f"{job.checkpoint}: is a language model and knows no languages: leave them out")
        return cls(**{one.name: getattr(job, one.name) for one in fields(Translation)})

    @property
    def form(self) -> str:
        """Seed and what is written of a line."""
        return f"seed {self.seed}, prompt {self.with_prompt}, JSON {self.as_json}"

    def check_model(self) -> None:
        """InputError for a translation model."""
        from hf_integration.translate import is_language_model

        if not is_language_model(self.checkpoint):
            raise InputError(f"{self.checkpoint}: is a translation model: see moe-opt translate")

    def lines(
        self, model: Any, tokenizer: Any, lines: Iterable[str], lines_before: int = 0, **told: Callable[[Any], None]
    ) -> Iterator[str]:
        """A prompt continued, a line."""
        from hf_integration.continuation import continue_lines

        for one in continue_lines(
            model,
            tokenizer,
            lines,
            batch_size=self.batch_size,
            generation=self.generation,
            seed=self.seed,
            lines_before=lines_before,
            on_progress=told.get("on_progress"),
            on_truncated=told.get("on_truncated"),
        ):
            if self.as_json:
                yield json.dumps({"prompt": one.prompt, "text": one.text}, ensure_ascii=False)
            else:
                yield one.prompt + one.text if self.with_prompt else one.text

    def truncation_message(self, cut: Truncation) -> str:
        """One line on a prompt that was too long."""
        return (
            f"line {cut.line} has {cut.tokens:,} tokens, more than the {cut.limit:,} that leave room for new ones, "
            "and only its end is taken; ask for fewer new tokens, or shorten it"
        )


def for_its_model(job: Translation, targets: Sequence[str | None]) -> Translation:
    """``job`` as work for the kind of model that its checkpoint is; InputError for ``targets`` of a language model."""
    from hf_integration.translate import is_language_model

    if not is_language_model(job.checkpoint):
        return job
    if any(target is not None for target in targets):
        raise InputError(f"{job.checkpoint}: is a language model and knows no languages: leave --tgt-lang out")
    return Generation.of(job)
