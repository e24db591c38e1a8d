"""Generation settings of one translation call, from what the pipeline, the model's files and the user say."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.options import option_names
from fairseq_moe_opt.presets import PRESET

# Transformers 4.57's own defaults of its translation pipeline.
DEFAULTS: Mapping[str, Any] = {"max_new_tokens": 256, "num_beams": 4}

# Pairs that say the same thing; Transformers warns, or lets the weaker one win, when both are set.
_RIVALS = (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens"))
# ``generate`` refuses these together with beams.
_WITHOUT_BEAMS = ("streamer", "assistant_model")


def generation_names() -> frozenset[str]:
    """Names of all settings a ``GenerationConfig`` holds."""
    return frozenset(name for name in vars(GenerationConfig()) if not name.startswith("_"))


def check_names(names: Mapping[str, Any], model_class: type) -> None:
    """OptionError for a name that ``model_class`` takes neither in ``generate`` nor in ``forward``."""
    known = set(generation_names()) | {"generation_config", "tokenizer", "assistant_tokenizer"}
    for method in ("generate", "forward", "prepare_inputs_for_generation"):
        known |= set(inspect.signature(getattr(model_class, method)).parameters)
    known -= {"self", "kwargs"}
    for name in names:
        if name not in known and not name.startswith("decoder_"):
            moe = ", ".join((PRESET, *option_names()))
            raise OptionError(name, f"is no generation setting of {model_class.__name__}, nor one of {moe}")


def decoding_config(
    model_config: GenerationConfig,
    task_settings: Mapping[str, Any],
    arguments: Mapping[str, Any],
    padding: int | None = None,
) -> tuple[GenerationConfig, dict[str, Any]]:
    """The settings to generate with, and the ``arguments`` that are none (streamers, processors, ...).

    From weak to strong: the pipeline's defaults, the model's generation config, its settings for the task,
    the arguments. A ``generation_config`` among the arguments takes the place of the defaults and the
    task's settings. ``padding`` is the padding token where nothing else names one.
    """
    names = generation_names()
    rest = {name: value for name, value in arguments.items() if name not in names}
    given = {name: value for name, value in arguments.items() if name in names}
    if given.get("return_dict_in_generate"):
        raise OptionError("return_dict_in_generate", "has no effect in a pipeline; call model.generate")
    user_config = rest.pop("generation_config", None)
    own = _set_values(model_config)
    if user_config is None:
        defaults = dict(DEFAULTS)
        if any(rest.get(name) is not None for name in _WITHOUT_BEAMS):
            del defaults["num_beams"]
        layers = [defaults, own, task_settings, given]
    else:
        layers = [own, _set_values(user_config), given]
    merged = _merge([{"pad_token_id": padding}, *layers])
    _spell_length_as_model(merged, own, prompt_known="decoder_input_ids" not in rest)
    config = copy.deepcopy(model_config if user_config is None else user_config)
    for pair in _RIVALS:
        merged |= {name: None for name in pair if name not in merged}
    config.update(**merged, return_dict_in_generate=False)
    return config, rest


def _merge(layers: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Later layers win; a later ``max_length`` also beats an earlier ``max_new_tokens``, and the reverse."""
    merged: dict[str, Any] = {}
    for layer in layers:
        values = {name: value for name, value in layer.items() if value is not None}
        for pair in _RIVALS:
            if any(name in values for name in pair):
                for name in pair:
                    merged.pop(name, None)
        merged.update(values)
    return merged


def _spell_length_as_model(merged: dict[str, Any], own: Mapping[str, Any], *, prompt_known: bool) -> None:
    """Say the length limit under the name that the model's own config uses.

    ``generate`` fills unset values from the model's config, so a limit under the other name would meet the
    model's own and draw a warning about two limits. A decoder starts from one token: N new tokens are N + 1
    in all, unless ``decoder_input_ids`` are given.
    """
    if not prompt_known:
        return
    if "max_length" in merged and "max_new_tokens" not in merged and "max_new_tokens" in own:
        merged["max_new_tokens"] = merged.pop("max_length") - 1
    elif "max_new_tokens" in merged and "max_new_tokens" not in own and "max_length" in own:
        merged["max_length"] = merged.pop("max_new_tokens") + 1


def _set_values(config: GenerationConfig) -> dict[str, Any]:
    """The settings in which ``config`` differs from Transformers' defaults."""
    values: dict[str, Any] = config.to_diff_dict()
    values.pop("transformers_version", None)
    return values
