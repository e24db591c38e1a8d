"""fairseq's dictionary, SentencePiece model and task from the tokenizer files of a Transformers folder.

``dict.txt`` and a SentencePiece model are kept by the conversion from fairseq and go back as they are. Without them
both are made again where that can be done (``spm_from_tokenizer`` says where). The dictionary comes from
``tokenizer.json``, whose ids are fairseq's: four control symbols, the pieces, then the languages. NLLB's 54B model has
256,001 ids before the languages, 202 languages and three data-source tags, which Transformers' tokenizer does not know
(its ``<mask>`` has the id of the first).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from os import PathLike
from pathlib import Path
from typing import Any, final

from fairseq_moe_opt.checkpoints.fairseq_task import TRANSLATION, multilingual_task
from fairseq_moe_opt.checkpoints.files import read_json, require_file
from fairseq_moe_opt.checkpoints.spm_from_tokenizer import made_model
from fairseq_moe_opt.checkpoints.symbols import (
    CONTROLS,
    DATA_TAGS,
    is_language,
    language_symbols,
    plain_code,
    read_dictionary,
    tag_symbols,
)
from fairseq_moe_opt.checkpoints.tokenizer import DICTIONARY_NAME, MASK, SPM_NAMES, TOKENIZER
from fairseq_moe_opt.errors import CheckpointError


@final
@dataclass(frozen=True)
class FairseqTexts:
    """What goes beside a fairseq checkpoint, and the task that its dictionary is for.

    Attributes:
        task: what is not default of ``cfg.task``.
        dictionary: ``dict.txt`` to copy, or its symbols, or None where nothing tells them.
        spm: the SentencePiece model to copy, or its bytes, or None where there is none.
        notes: what a user has to know about what could not be written.
    """

    task: Mapping[str, Any]
    dictionary: Path | tuple[str, ...] | None
    spm: Path | bytes | None
    notes: tuple[str, ...]


def read_hf_texts(
    folder: Path,
    rows: int,
    kept_task: Mapping[str, Any] | None,
    spm: str | PathLike[str] | None = None,
    dictionary: str | PathLike[str] | None = None,
) -> FairseqTexts:
    """The texts of a Transformers folder whose embedding has ``rows`` rows; ``spm`` and ``dictionary`` override it.

    Raises CheckpointError for a dictionary, given or kept, that does not have as many symbols as the embedding.
    """
    model = (Path(spm) if spm is not None else _existing(folder, SPM_NAMES)) or made_model(folder)
    words = Path(dictionary) if dictionary is not None else _existing(folder, (DICTIONARY_NAME,))
    vocabulary = _read_vocabulary(folder / TOKENIZER, rows)
    task = kept_task or (_derived_task(vocabulary) if vocabulary is not None else {"_name": TRANSLATION})
    if words is not None:
        symbols = read_dictionary(words)
        if kept_task is None and len(CONTROLS) + len(symbols) == rows:
            task = {"_name": TRANSLATION}  # the languages are in the dictionary, so no task adds them
        _require_rows(words, symbols, task, rows)
        return FairseqTexts(task, words, model, _notes(model, words))
    made = None if vocabulary is None else vocabulary.names[len(CONTROLS) : rows - len(_appended(task))]
    return FairseqTexts(task, made, model, _notes(model, made))


def write_texts(folder: Path, texts: FairseqTexts) -> list[Path]:
    """Writes ``dict.txt`` and ``spm.model`` into ``folder``, as far as there are any; CheckpointError without one."""
    written = []
    for path in (texts.dictionary, texts.spm):
        if isinstance(path, Path):
            require_file(path)
    if texts.dictionary is not None:
        written.append(folder / DICTIONARY_NAME)
        if isinstance(texts.dictionary, Path):
            shutil.copyfile(texts.dictionary, written[-1])
        else:
            lines = "".join(f"{name} 1\n" for name in texts.dictionary)
            written[-1].write_text(lines, encoding="utf-8", newline="\n")
    if texts.spm is not None:
        written.append(folder / SPM_NAMES[0])
        if isinstance(texts.spm, Path):
            shutil.copyfile(texts.spm, written[-1])
        else:
            written[-1].write_bytes(texts.spm)
    return written


def _existing(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


@final
@dataclass(frozen=True)
class _Vocabulary:
    """Symbols by id, one for each embedding row, and the ids of those that are never text."""

    names: tuple[str, ...]
    special: frozenset[int]

    def is_language(self, number: int) -> bool:
        return number in self.special and is_language(self.names[number])


def _read_vocabulary(path: Path, rows: int) -> _Vocabulary | None:
    """The symbols of ``tokenizer.json``, fillers for rows without one; None where there is no such file."""
    if not path.is_file():
        return None
    content = read_json(path)
    try:
        listed = content["model"]["vocab"]
        pieces = listed.items() if isinstance(listed, Mapping) else ((item[0], at) for at, item in enumerate(listed))
        added = {int(token["id"]): str(token["content"]) for token in content.get("added_tokens", ())}
        by_id = {int(number): str(name) for name, number in pieces} | added
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(path, "has no vocabulary that can be understood") from error
    if by_id.get(rows) == MASK:
        del by_id[rows]  # without tags Transformers' own mask comes after the last row, and nothing ever uses it
    if by_id and max(by_id) >= rows:
        raise CheckpointError(path, f"has ids up to {max(by_id)}, but the embedding has {rows} rows: not of this model")
    names = tuple(by_id.get(number, f"madeupword{number:04d}") for number in range(rows))
    if names[: len(CONTROLS)] != CONTROLS:
        raise CheckpointError(path, f"begins with {names[: len(CONTROLS)]}; fairseq's ids begin with {CONTROLS}")
    if broken := [name for name in names if not name or "\n" in name or "\r" in name]:
        raise CheckpointError(path, f"has the symbol {broken[0]!r}, which no line of a fairseq dictionary can hold")
    return _Vocabulary(names, frozenset(number for number in added if number < rows))


def _derived_task(vocabulary: _Vocabulary) -> dict[str, Any]:
    """NLLB's task when the ids end in languages, with tags when exactly their number of rows follows."""
    rows = len(vocabulary.names)
    first = next((number for number in range(len(CONTROLS), rows) if vocabulary.is_language(number)), rows)
    numbers = list(takewhile(vocabulary.is_language, range(first, rows)))
    after = rows - first - len(numbers)
    if not numbers or after not in (0, len(DATA_TAGS)):
        return {"_name": TRANSLATION}
    return multilingual_task([plain_code(vocabulary.names[number]) for number in numbers], tags=after > 0)


def _appended(task: Mapping[str, Any]) -> tuple[str, ...]:
    """The symbols that fairseq's task adds to the dictionary itself."""
    return (*language_symbols({"task": task}), *tag_symbols({"task": task}))


def _require_rows(path: Path, symbols: Sequence[str], task: Mapping[str, Any], rows: int) -> None:
    appended = [name for name in _appended(task) if name not in symbols]
    count = len(CONTROLS) + len(symbols) + len(appended)
    if count != rows:
        raise CheckpointError(path, f"gives {count} symbols, but the embedding has {rows} rows: not of this model")


def _notes(spm: Path | bytes | None, dictionary: object) -> tuple[str, ...]:
    notes = []
    if dictionary is None:
        notes.append("no dict.txt: the folder has no tokenizer.json (--dict gives one)")
    if spm is None:
        notes.append(
            "no spm.model: a SentencePiece model cannot be made from these tokenizer files, "
            "or sentencepiece and protobuf are not installed (--spm gives one)"
        )
    return tuple(notes)
