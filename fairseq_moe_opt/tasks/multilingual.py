"""``translation_multi_simple_epoch`` as NLLB uses it: its flags, and its symbols after the language tokens."""

from __future__ import annotations

import ast
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fairseq.data.multilingual.multilingual_data_manager import MultilingualDatasetManager
from fairseq.tasks import TASK_REGISTRY
from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask

from fairseq_moe_opt.errors import OptionError

DATA_TAGS = ("<MINED_DATA>", "<MMT_BT_DATA>", "<SMT_BT_DATA>")
"""Symbols after the language tokens; a checkpoint trained with them has an embedding of each."""

_TRAINING_ONLY: Mapping[str, str] = {
    "one_dataset_per_batch": "fairseq's own sampler mixes the language pairs of a batch",
    "use_local_shard_size": "fairseq's own sampler counts all shards; give it one shard of data to have the same",
}
"""The branch's flags that would change how batches of training are drawn, and why they cannot be honoured."""


class TaggedTranslationTask(TranslationMultiSimpleEpochTask):
    """fairseq's task and the flags of the ``nllb`` branch."""

    @staticmethod
    def add_args(parser: ArgumentParser) -> None:
        """fairseq's own flags and the branch's; ``--langs`` may name a file too."""
        TranslationMultiSimpleEpochTask.add_args(parser)
        parser._option_string_actions["--langs"].type = read_languages
        texts = {
            "--add-data-source-prefix-tags": "put the data-source tags into the dictionary, after the language tokens",
            "--add-ssl-task-tokens": "put __dae__ and __lm__ into the dictionary where the data asks for such tasks",
            "--enable-m2m-validation": "accepted for the branch's command lines: validation is of the pairs given",
            "--one-dataset-per-batch": "accepted where nothing is trained",
            "--use-local-shard-size": "accepted where nothing is trained, or from one shard of data",
        }
        for flag, text in texts.items():
            parser.add_argument(flag, action="store_true", help=text)
        parser.add_argument(
            "--finetune-dict-specs",
            type=read_dictionary_specs,
            metavar="DICT",
            help="tasks whose symbols the dictionary has although the data does not ask for them: \"{'mono_dae': ''}\"",
        )

    @classmethod
    def setup_task(cls, args: Namespace, **kwargs: Any) -> TaggedTranslationTask:
        """The task over dictionaries with language tokens and what else ``args`` ask for.

        Raises OptionError for a training flag that fairseq's sampler cannot honour.
        """
        langs, dictionaries, training = MultilingualDatasetManager.prepare(cls.load_dictionary, args, **kwargs)
        if training:
            _refuse_other_sampling(args)
        for dictionary in dictionaries.values():
            for symbol in extra_symbols(args):
                if symbol not in dictionary.indices:
                    dictionary.add_symbol(symbol)
        return cls(args, langs, dictionaries, training)


def extra_symbols(args: Namespace) -> Iterator[str]:
    """What the branch puts after the language tokens, in its order (fairseq's own ``<mask>`` may be there already)."""
    data: Mapping[str, Any] = getattr(args, "extra_data", None) or {}
    specs: Mapping[str, Any] = getattr(args, "finetune_dict_specs", None) or {}
    tasks, task_tokens = {*data, *specs}, getattr(args, "add_ssl_task_tokens", False)
    denoising = bool(tasks & {"mono_dae"}) or "mono_mixed_task" in data
    if denoising or getattr(args, "lang_tok_style", None) == "mbart":
        yield "<mask>"
        if task_tokens:
            yield "__dae__"
    if getattr(args, "add_data_source_prefix_tags", False):
        yield from DATA_TAGS
    if task_tokens and ("mono_lm" in tasks or "mono_mixed_task" in data):
        yield "__lm__"


def read_languages(text: str) -> list[str]:
    """``en,fr`` or the name of a file that holds as much, on one line or several."""
    path = Path(text)
    try:
        is_file = path.is_file()
    except OSError:  # a long list of languages is no possible name of a file
        is_file = False
    content = path.read_text(encoding="utf-8") if is_file else text
    return [name.strip() for name in content.replace("\n", ",").split(",") if name.strip()]


def read_dictionary_specs(text: str) -> dict[str, str]:
    """``{'mono_dae': ''}`` as a dictionary."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        found = None
    if not isinstance(found, dict):
        raise ArgumentTypeError(f"{text!r} is not a dictionary such as {{'mono_dae': ''}}")
    return {str(key): str(value) for key, value in found.items()}


def _refuse_other_sampling(args: Namespace) -> None:
    for name, reason in _TRAINING_ONLY.items():
        one_shard = name == "use_local_shard_size" and ":" not in str(args.data)
        if getattr(args, name, False) and not one_shard:
            raise OptionError(name, f"has no effect in training: {reason}")


TASK_REGISTRY["translation_multi_simple_epoch"] = TaggedTranslationTask
