"""``cfg.task`` of a fairseq checkpoint: what to keep of it in ``config.json``, and how to make one from it again."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

CONFIG_KEY = "fairseq_task"
"""Where a Transformers folder keeps what differs from the defaults below."""

TRANSLATION = "translation"
MULTILINGUAL = "translation_multi_simple_epoch"

_TRANSLATION: Mapping[str, Any] = {
    "_name": TRANSLATION,
    "data": None,
    "source_lang": None,
    "target_lang": None,
    "load_alignments": False,
    "left_pad_source": True,
    "left_pad_target": False,
    "max_source_positions": 1024,
    "max_target_positions": 1024,
    "upsample_primary": -1,
    "truncate_source": False,
    "num_batch_buckets": 0,
    "train_subset": "train",
    "dataset_impl": None,
    "required_seq_len_multiple": 1,
    "eval_bleu": False,
    "eval_bleu_args": "{}",
    "eval_bleu_detok": "space",
    "eval_bleu_detok_args": "{}",
    "eval_tokenized_bleu": False,
    "eval_bleu_remove_bpe": None,
    "eval_bleu_print_samples": False,
}
_MULTILINGUAL: Mapping[str, Any] = {
    "_name": MULTILINGUAL,
    "data": None,
    "source_lang": None,
    "target_lang": None,
    "lang_pairs": None,
    "langs": None,
    "lang_dict": None,
    "source_dict": None,
    "target_dict": None,
    "fixed_dictionary": None,
    "lang_tok_style": "multilingual",
    "encoder_langtok": None,
    "decoder_langtok": False,
    "lang_tok_replacing_bos_eos": False,
    "keep_inference_langtok": False,
    "enable_lang_ids": False,
    "enable_reservsed_directions_shared_datasets": False,
    "extra_data": None,
    "extra_lang_pairs": None,
    "langtoks_specs": ["main"],
    "langtoks": None,
    "add_data_source_prefix_tags": False,
    "sampling_method": "concat",
    "sampling_temperature": 1.5,
    "sampling_weights": None,
    "sampling_weights_from_file": None,
    "virtual_epoch_size": None,
    "virtual_data_size": None,
    "load_alignments": False,
    "left_pad_source": True,
    "left_pad_target": False,
    "max_source_positions": 1024,
    "max_target_positions": 1024,
    "truncate_source": False,
    "upsample_primary": 1,
    "dataset_impl": None,
    "shuffle_instance": False,
    "seed": 1,
}
_TEMPLATES: Mapping[str, Mapping[str, Any]] = {TRANSLATION: _TRANSLATION, MULTILINGUAL: _MULTILINGUAL}


def task_for_config(cfg: Mapping[str, Any]) -> dict[str, Any] | None:
    """What ``config.json`` keeps of ``cfg.task``: its name and what is not default; None for other kinds of task."""
    task = cfg.get("task")
    if not isinstance(task, Mapping):
        return None
    template = _TEMPLATES.get(str(task.get("_name", task.get("task"))))
    if template is None:
        return None
    own = {key: task[key] for key in template if key in task and task[key] != template[key] and key != "data"}
    return {"_name": template["_name"], **own}


def multilingual_task(languages: Sequence[str], tags: bool) -> dict[str, Any]:
    """NLLB's task over ``languages`` in the order of their ids: the source's language first, the target's forced."""
    pair = f"{languages[0]}-{languages[min(1, len(languages) - 1)]}"
    return {
        "_name": MULTILINGUAL,
        "langs": list(languages),
        "lang_pairs": pair,
        "encoder_langtok": "src",
        "decoder_langtok": True,
        "add_data_source_prefix_tags": tags,
    }


def full_task(kept: Mapping[str, Any], positions: int) -> dict[str, Any]:
    """All options of a task from what is kept of it; ``positions`` is the most that the model takes."""
    limits = {"max_source_positions": positions, "max_target_positions": positions}
    return {**_TEMPLATES[kept["_name"]], **limits, **kept}


def as_cfg_section(task: Mapping[str, Any]) -> Mapping[str, Any] | Namespace:
    """A task's options in the form fairseq pickles: a Namespace, with its name twice, for a task of its older kind."""
    return Namespace(**task, task=MULTILINGUAL) if task["_name"] == MULTILINGUAL else dict(task)
