"""The ids of a fairseq translation model's embedding, in words: control symbols, pieces, languages, tags."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from fairseq_moe_opt.checkpoints.files import require_file
from fairseq_moe_opt.errors import CheckpointError

# fairseq's Dictionary always begins with these, whatever the file holds.
BOS, PAD, EOS, UNK = CONTROLS = ("<s>", "<pad>", "</s>", "<unk>")
# The nllb branch appends these after the languages with --add-data-source-prefix-tags.
DATA_TAGS = ("<MINED_DATA>", "<MMT_BT_DATA>", "<SMT_BT_DATA>")
_OVERWRITE = "#fairseq:overwrite"
_FILLER = re.compile(r"madeupword\d+")
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:[_-][A-Za-z0-9]+)*")
_WRAPPED = re.compile(r"__(?P<code>.+)__")


@final
@dataclass(frozen=True)
class Symbols:
    """Symbols by id; which of them are language codes, and which are never text (codes, tags, controls)."""

    names: tuple[str, ...]
    languages: tuple[str, ...]
    special: frozenset[str]

    def id_of(self, name: str) -> int:
        """The id of a symbol."""
        return self.names.index(name)


def read_dictionary(path: Path) -> tuple[str, ...]:
    """The symbols of a fairseq ``dict.txt`` (``symbol count`` a line), without the controls before them."""
    require_file(path)
    try:
        lines = _lines(path)
    except UnicodeDecodeError as error:
        raise CheckpointError(path, "is not a fairseq dictionary: not UTF-8") from error
    names: dict[str, None] = {}
    for number, line in enumerate(lines, start=1):
        symbol, _, count = line.removesuffix(f" {_OVERWRITE}").rpartition(" ")
        if not symbol or not count.lstrip("-").isdigit():
            raise CheckpointError(path, f"is not a fairseq dictionary: line {number} is not `symbol count`")
        names[symbol] = None
    return tuple(name for name in names if name not in CONTROLS)


def build_symbols(dictionary: Sequence[str], pieces: Collection[str], cfg: Mapping[str, Any]) -> Symbols:
    """The symbols by id as fairseq numbers them: controls, dictionary, then languages and tags of the task.

    A dictionary entry that is no piece of the SentencePiece model is never text: a language code if it looks
    like one, else a control symbol. ``__fra_Latn__`` is named ``fra_Latn``, as Transformers does.
    """
    known = set(pieces)
    appended = tuple(name for name in language_symbols(cfg) if name not in dictionary)
    tags = tag_symbols(cfg)
    never_text = [name for name in (*dictionary, *appended) if name not in known and not _FILLER.fullmatch(name)]
    languages = tuple(plain_code(name) for name in never_text if is_language(name))
    renamed = {name: plain_code(name) for name in never_text if plain_code(name) in languages}
    names = tuple(renamed.get(name, name) for name in (*CONTROLS, *dictionary, *appended, *tags))
    special = {*CONTROLS, *tags, *(renamed.get(name, name) for name in never_text)}
    return Symbols(names, languages, frozenset(special))


def language_symbols(cfg: Mapping[str, Any]) -> tuple[str, ...]:
    """The symbols that a multilingual task puts after the dictionary's, ``__code__`` each."""
    return tuple(f"__{language}__" for language in _task_languages(cfg))


def tag_symbols(cfg: Mapping[str, Any]) -> tuple[str, ...]:
    """The symbols that a task with data-source tags puts after the languages'."""
    return DATA_TAGS if _task(cfg).get("add_data_source_prefix_tags") else ()


def is_language(name: str) -> bool:
    """Whether a symbol that is no piece looks like a language code, ``fra_Latn`` or ``__fra_Latn__``."""
    return _LANGUAGE.fullmatch(plain_code(name)) is not None


def plain_code(name: str) -> str:
    """``fra_Latn`` of ``__fra_Latn__``; any other name as it is."""
    match = _WRAPPED.fullmatch(name)
    return match["code"] if match else name


def _lines(path: Path) -> list[str]:
    """Lines as fairseq reads them; ``str.splitlines`` would also cut at rarer separators (pieces)."""
    with path.open(encoding="utf-8") as stream:
        return [line.rstrip() for line in stream if line.strip()]


def _task(cfg: Mapping[str, Any]) -> Mapping[str, Any]:
    task = cfg.get("task")
    return task if isinstance(task, Mapping) else {}


def _task_languages(cfg: Mapping[str, Any]) -> tuple[str, ...]:
    """Languages that a multilingual task adds to the dictionary itself, in its order; () for other tasks."""
    task = _task(cfg)
    if not str(task.get("_name", task.get("task", ""))).startswith("translation_multi"):
        return ()
    if not (task.get("encoder_langtok") or task.get("decoder_langtok")):
        return ()
    langs = task.get("langs")
    if isinstance(langs, str):
        return tuple(code.strip() for code in langs.split(",") if code.strip())
    if isinstance(langs, list):
        return tuple(str(code) for code in langs)
    pairs = task.get("lang_pairs") or []
    pairs = pairs.split(",") if isinstance(pairs, str) else pairs
    return tuple(sorted({code for pair in pairs for code in str(pair).split("-")}))
