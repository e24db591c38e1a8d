"""NLLB's flags of the multilingual task: symbols of the dictionary, lists of languages, what cannot be honoured."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fairseq", reason="fairseq is not installed")

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.tasks.multilingual import (
    DATA_TAGS,
    TaggedTranslationTask,
    extra_symbols,
    read_dictionary_specs,
    read_languages,
)
from tests.helpers.goldens import FAIRSEQ_GOLDENS

DATA = str(FAIRSEQ_GOLDENS / "data" / "bin")


def arguments(*flags: str) -> Namespace:
    """Parsed flags of the task, for translating."""
    parser = ArgumentParser()
    TaggedTranslationTask.add_args(parser)
    parser.set_defaults(seed=1)  # of another group of fairseq's flags
    return parser.parse_args([DATA, "--lang-pairs", "src-tgt", *flags])


def dictionary(*flags: str) -> list[str]:
    """What stands in the source dictionary after its own 128 symbols."""
    task = TaggedTranslationTask.setup_task(arguments("-s", "src", "-t", "tgt", *flags))
    return list(task.source_dictionary.symbols[128:])


def test_tags_stand_after_the_languages() -> None:
    assert dictionary("--langs", "src,tgt") == ["__src__", "__tgt__"]
    flags = ("--langs", "src,tgt", "--add-data-source-prefix-tags")
    assert dictionary(*flags) == ["__src__", "__tgt__", *DATA_TAGS]


def test_symbols_of_self_supervised_tasks_stand_around_the_tags() -> None:
    """The order of the branch: languages, <mask>, __dae__, tags, __lm__."""
    specs = ("--finetune-dict-specs", "{'mono_dae': '', 'mono_lm': ''}", "--langs", "src,tgt")
    assert dictionary(*specs) == ["__src__", "__tgt__", "<mask>"]
    found = dictionary(*specs, "--add-ssl-task-tokens", "--add-data-source-prefix-tags")
    assert found == ["__src__", "__tgt__", "<mask>", "__dae__", *DATA_TAGS, "__lm__"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"extra_data": {"mono_mixed_task": ""}, "add_ssl_task_tokens": True}, ["<mask>", "__dae__", "__lm__"]),
        ({"extra_data": {"mono_lm": ""}, "add_ssl_task_tokens": True}, ["__lm__"]),
        ({"lang_tok_style": "mbart"}, ["<mask>"]),
        ({"finetune_dict_specs": {"mono_lm": ""}}, []),
        ({}, []),
    ],
)
def test_which_symbols_a_task_asks_for(values: dict[str, Any], expected: list[str]) -> None:
    assert list(extra_symbols(Namespace(**values))) == expected


@pytest.mark.parametrize("content", ["src,tgt", "src\ntgt\n", "src, tgt\n"])
def test_languages_may_be_in_a_file(content: str, tmp_path: Path) -> None:
    file = tmp_path / "langs.txt"
    file.write_text(content, encoding="utf-8")
    assert dictionary("--langs", str(file)) == ["__src__", "__tgt__"]


def test_a_long_list_of_languages_is_no_file_name() -> None:
    codes = [f"l{number:03d}_Latn" for number in range(600)]
    assert read_languages(",".join(codes)) == codes


def test_specs_that_are_no_dictionary() -> None:
    with pytest.raises(ArgumentTypeError, match="mono_dae"):
        read_dictionary_specs("mono_dae")


def test_other_sampling_is_refused_in_training_and_accepted_elsewhere() -> None:
    both = ("--langs", "src,tgt", "--one-dataset-per-batch", "--use-local-shard-size")
    assert dictionary(*both) == ["__src__", "__tgt__"]
    with pytest.raises(OptionError, match="one_dataset_per_batch"):
        TaggedTranslationTask.setup_task(arguments(*both))
    training = arguments("--langs", "src,tgt", "--use-local-shard-size")
    assert TaggedTranslationTask.setup_task(training).langs == ["src", "tgt"]
    training.data = f"{DATA}:{DATA}"
    with pytest.raises(OptionError, match="use_local_shard_size"):
        TaggedTranslationTask.setup_task(training)
