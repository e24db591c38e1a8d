"""Translating lines of text with a loaded model: long inputs in batches of like length, output in input order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel

import hf_integration.lm_tokenization  # registers the tokenizers of converted checkpoints
import hf_integration.tokenization  # noqa: F401
from fairseq_moe_opt.errors import CheckpointError, NoMoELayerError, OptionError
from fairseq_moe_opt.parallel import Collectives
from hf_integration.decoding import decoding_config
from hf_integration.loading import local_folder, read_config
from hf_integration.optimize import Handle
from hf_integration.synced import SyncedDecoding, generate_batches
from hf_integration.text import check_languages, is_blank, source_limit

WINDOW_BATCHES = 32
"""How many batches of lines are read and sorted by length together."""

_VOCABULARIES = ("tokenizer.json", "sentencepiece.bpe.model", "tokenizer.model", "spiece.model")

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What configurations of models with experts call their number."""


@dataclass(frozen=True)
class Truncation:
    """A line that was cut: its number from 1, its tokens, and how many of them the model takes."""

    line: int
    tokens: int
    limit: int


@dataclass(frozen=True)
class Row:
    """One line that the model is given: its number from 1, its place in the window, and its ids."""

    line: int
    place: int
    ids: Sequence[int]


def load_tokenizer(path_or_id: str | Path) -> Any:
    """The tokenizer of a checkpoint; CheckpointError where there is none that loads."""
    folder = local_folder(path_or_id)
    if not has_tokenizer(folder):  # Transformers would make up an empty one from config.json
        raise CheckpointError(folder, "has no tokenizer; moe-opt convert --spm FILE --dict FILE writes one")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # Transformers raises OSError, ValueError, TypeError, KeyError, ... by file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(folder, f"its tokenizer cannot be loaded: {reason}") from error


def has_tokenizer(path_or_id: str | Path) -> bool:
    """Whether the folder holds the vocabulary of a tokenizer."""
    return any((local_folder(path_or_id) / name).is_file() for name in _VOCABULARIES)


def choose_device(device: str | None) -> torch.device:
    """The device asked for, else the first GPU there is, else the CPU; OptionError where it cannot be used."""
    name = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError("device", f"{name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return chosen


def choose_dtype(path_or_id: str | Path, dtype: str | None, device: torch.device) -> str | None:
    """The dtype asked for; else float32 for float16 weights on a CPU; else None, the checkpoint's own.

    CPUs compute float16 slowly or through float32 anyway, with its rounding after every step.
    """
    if dtype is not None or device.type != "cpu":
        return dtype
    stored = stored_config(path_or_id).dtype
    return "float32" if str(stored).removeprefix("torch.") == "float16" else None


def is_language_model(path_or_id: str | Path) -> bool:
    """Whether a checkpoint has no encoder: it continues texts, and translates none."""
    return not stored_config(path_or_id).is_encoder_decoder


def stored_config(path_or_id: str | Path) -> Any:
    """The configuration of a checkpoint with experts of any kind; CheckpointError or NoMoELayerError for others."""
    folder = local_folder(path_or_id)
    try:
        return read_config(folder)
    except NoMoELayerError:
        config = _any_config(folder)
        if not any(hasattr(config, name) for name in _EXPERT_COUNTS):
            raise
        return config


def _any_config(folder: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(folder)
    except Exception as error:  # strict configurations raise classes of the hub client
        raise CheckpointError(folder / "config.json", f"cannot be read: {' '.join(str(error).split())}") from error


def quiet_host() -> None:
    """Keep Transformers' advice and bars off the terminal; its errors stay."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def translate_lines(
    model: PreTrainedModel,
    tokenizer: Any,
    lines: Iterable[str],
    src_lang: str | None,
    tgt_lang: str | None,
    *,
    batch_size: int = 16,
    generation: Mapping[str, Any] | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_truncated: Callable[[Truncation], None] | None = None,
) -> Iterator[str]:
    """One translation a line, in order, lazily: lines are read ``WINDOW_BATCHES`` batches at a time.

    A blank line gives an empty one without running the model. A line of more tokens than the model has positions
    is cut there and ``on_truncated`` is told. ``on_progress`` is told how many more lines are done. ``generation``
    holds settings of a ``GenerationConfig``; what it leaves open is as in the translation pipeline. The report of
    an optimised model covers all lines, and is written where its options say when the last one is done.
    Ranks that share experts are given the same lines, share the batches (or, with the all-reduce exchange, all compute
    each of them together), and all get all translations.

    Raises InputError for unknown languages and OptionError for a batch size below 1, both at once.
    """
    check_languages(tokenizer, src_lang, tgt_lang)
    if batch_size < 1:
        raise OptionError("batch_size", f"{batch_size} is not 1 or more")
    languages = {"src_lang": src_lang, "tgt_lang": tgt_lang}
    config, _ = decoding_config(model.generation_config, {}, generation or {}, tokenizer.pad_token_id)
    told = (on_progress or _ignore, on_truncated or _ignore)
    return LineJob(model, tokenizer, languages, config, batch_size, *told).run(lines)


def _ignore(_: object) -> None:
    pass


@dataclass(frozen=True)
class LineJob:
    """Everything that stays the same from window to window; what a kind of model does otherwise is its own method."""

    model: PreTrainedModel
    tokenizer: Any
    languages: Mapping[str, str | None]
    config: GenerationConfig
    batch_size: int
    on_progress: Callable[[int], None]
    on_truncated: Callable[[Truncation], None]

    @property
    def ranks(self) -> Collectives | None:
        """That share the experts of the model and have batches of their own; None where every process has them all."""
        decoding = getattr(getattr(self.model, "moe", None), "decoding", None)
        return decoding.ranks if isinstance(decoding, SyncedDecoding) else None

    @property
    def limit(self) -> int | None:
        """How many tokens of a line the model takes; None for any number."""
        return source_limit(self.model.config)

    def is_left_out(self, line: str) -> bool:
        """Whether ``line`` is not given to the model, and comes out empty."""
        return is_blank(line)

    def cut(self, line: str, ids: Sequence[int], limit: int) -> Sequence[int]:
        """``limit`` ids of a longer ``line``."""
        return self._encode([line], truncation=True, max_length=limit)[0][0]

    def run(self, lines: Iterable[str]) -> Iterator[str]:
        """A result a line, in order."""
        handle = getattr(self.model, "moe", None)
        if isinstance(handle, Handle):
            handle.reset()
        seconds, done, rest = 0.0, 0, iter(lines)
        while window := list(islice(rest, self.batch_size * WINDOW_BATCHES)):
            start = time.perf_counter()
            translations = self._translate_window(window, done)
            seconds += time.perf_counter() - start
            done += len(window)
            yield from translations
        if isinstance(handle, Handle):
            handle.finish_call(seconds)

    def _translate_window(self, window: Sequence[str], done: int) -> list[str]:
        """The translations of ``window``, before which ``done`` lines were read."""
        results = [""] * len(window)
        places = [place for place, line in enumerate(window) if not self.is_left_out(line)]
        self.on_progress(len(window) - len(places))
        if not places:
            return results
        encoded, forced = self._encode([window[place] for place in places])
        limit = self.limit
        rows = []
        for place, found in zip(places, encoded, strict=True):
            ids: Sequence[int] = found
            if limit is not None and len(ids) > limit:
                self.on_truncated(Truncation(done + place + 1, len(ids), limit))
                ids = self.cut(window[place], ids, limit)
            rows.append(Row(done + place + 1, place, ids))
        self._check_ids(rows, forced)
        # The longest first: what does not fit the memory is found at once.
        rows.sort(key=lambda row: -len(row.ids))
        batches = [rows[first : first + self.batch_size] for first in range(0, len(rows), self.batch_size)]
        for place, text in self._translate_batches(batches, forced):
            results[place] = text
        return results

    def _translate_batches(self, batches: Sequence[Sequence[Row]], forced: int | None) -> list[tuple[int, str]]:
        """Place and translation of every row; ranks that share experts take turns, and learn each other's results."""
        ranks = self.ranks
        rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
        own = batches[rank::size]
        outputs = generate_batches(
            self.model,
            _MadeInTurn(self.inputs, own),
            on_done=lambda call: self.on_progress(sum(map(len, batches[call * size : (call + 1) * size]))),
            generation_config=self.config,
            **({} if forced is None else {"forced_bos_token_id": forced}),
        )
        done = [
            (row.place, text)
            for batch, output in zip(own, outputs, strict=True)
            for row, text in zip(batch, self.texts(batch, output), strict=True)
        ]
        if ranks is None:
            return done
        return list(chain.from_iterable(cast("list[list[tuple[int, str]]]", ranks.gather_objects(done))))

    def _check_ids(self, rows: Sequence[Row], forced: int | None) -> None:
        """CheckpointError for ids the model has no embedding of: its tokenizer is another model's."""
        largest = max(*(max(row.ids) for row in rows), forced or 0)
        known = self.model.get_input_embeddings().weight.shape[0]
        if largest >= known:
            folder = getattr(self.tokenizer, "name_or_path", None) or "the tokenizer"
            raise CheckpointError(folder, f"its tokenizer is of another model: token {largest}, the model has {known}")

    def _encode(self, texts: Sequence[str], **how: Any) -> tuple[list[list[int]], int | None]:
        return encode_texts(self.tokenizer, texts, self.languages, **how)

    def inputs(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """What ``generate`` is given of a batch."""
        ids, mask = pad_rows([row.ids for row in rows], self.tokenizer.pad_token_id or 0)
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}

    def texts(self, rows: Sequence[Row], output: Tensor) -> list[str]:
        """The results of a batch."""
        texts: list[str] = self.tokenizer.batch_decode(
            output, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return texts


def encode_texts(
    tokenizer: Any, texts: Sequence[str], languages: Mapping[str, str | None], **how: Any
) -> tuple[list[list[int]], int | None]:
    """The ids of each text, and the language token to force, where the tokenizer knows languages."""
    build = getattr(tokenizer, "_build_translation_inputs", None)
    # verbose=False: the caller says which lines are too long.
    if build is None:
        return list(tokenizer(list(texts), verbose=False, **how)["input_ids"]), None
    encoded = build(list(texts), return_tensors=None, verbose=False, **languages, **how)
    return list(encoded["input_ids"]), encoded["forced_bos_token_id"]


@dataclass(frozen=True)
class _MadeInTurn(Sequence[dict[str, Tensor]]):
    """What ``make`` makes of each batch, when its turn comes."""

    make: Callable[[Sequence[Row]], dict[str, Tensor]]
    batches: Sequence[Sequence[Row]]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: Any) -> Any:
        return self.make(self.batches[number])


def pad_rows(rows: Sequence[Sequence[int]], padding: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """(B, T) ids padded on the right, or the ``left``, and their attention mask, both int64."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), padding)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(len(row))
        ids[number, place] = torch.tensor(row)
        mask[number, place] = 1
    return ids, mask
