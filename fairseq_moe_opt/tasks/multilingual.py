"""``translation_multi_simple_epoch`` as NLLB uses it: with data-source tags in the dictionary."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from fairseq.data.multilingual.multilingual_data_manager import MultilingualDatasetManager
from fairseq.tasks import TASK_REGISTRY
from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask

DATA_TAGS = ("<MINED_DATA>", "<MMT_BT_DATA>", "<SMT_BT_DATA>")
"""Symbols after the language tokens; a checkpoint trained with them has an embedding of each."""


class TaggedTranslationTask(TranslationMultiSimpleEpochTask):
    """fairseq's task and the flags of the ``nllb`` branch."""

    @staticmethod
    def add_args(parser: ArgumentParser) -> None:
        """fairseq's own flags and the branch's."""
        TranslationMultiSimpleEpochTask.add_args(parser)
        parser.add_argument(
            "--add-data-source-prefix-tags",
            action="store_true",
            help="put the data-source tags into the dictionary, after the language tokens",
        )
        parser.add_argument(
            "--enable-m2m-validation",
            action="store_true",
            help="accepted for the nllb branch's command lines; validation covers the language pairs given",
        )

    @classmethod
    def setup_task(cls, args: Namespace, **kwargs: Any) -> TaggedTranslationTask:
        """The task over dictionaries with language tokens and, where asked for, tags."""
        langs, dictionaries, training = MultilingualDatasetManager.prepare(cls.load_dictionary, args, **kwargs)
        if getattr(args, "add_data_source_prefix_tags", False):
            for dictionary in dictionaries.values():
                for tag in DATA_TAGS:
                    if tag not in dictionary.indices:
                        dictionary.add_symbol(tag)
        return cls(args, langs, dictionaries, training)


TASK_REGISTRY["translation_multi_simple_epoch"] = TaggedTranslationTask
