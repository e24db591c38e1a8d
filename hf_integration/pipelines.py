"""``pipeline("translation")``: Transformers 4's translation pipeline on Transformers 5, right for NLLB-MoE.

Transformers 5 dropped the task. :func:`register` puts it back, so that ``transformers.pipeline`` has
it, and :func:`unregister` takes it out. Semantics follow ``TranslationPipeline`` of Transformers 4.57.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
from transformers.pipelines.base import Pipeline

from fairseq_moe_opt.errors import CheckpointError, InputError, NoMoELayerError, OptionError
from fairseq_moe_opt.options import MoEOptions, option_names
from fairseq_moe_opt.presets import PRESET, with_preset
from hf_integration.decoding import check_names, decoding_config
from hf_integration.families import FAMILIES
from hf_integration.loading import MODEL_CLASSES, from_pretrained, local_folder, read_config
from hf_integration.optimize import Handle, optimize
from hf_integration.registration import install_task, is_installed, remove_task
from hf_integration.text import check_languages, is_blank, source_limit, task_languages, task_settings

logger = logging.getLogger(__name__)

_DO_NOT_TRUNCATE = (False, "do_not_truncate")
# Arguments of transformers.pipeline that only its own loader understands.
_HUB_ARGUMENTS = frozenset(
    {"config", "revision", "code_revision", "token", "trust_remote_code", "local_files_only", "device_map"}
    | {"model_kwargs"}
)
# The rest of what it, Pipeline and TranslationPipeline take.
_PIPELINE_ARGUMENTS = (
    _HUB_ARGUMENTS
    | {"tokenizer", "use_fast", "device", "dtype", "torch_dtype", "pipeline_class", "binary_output"}
    | {"feature_extractor", "image_processor", "video_processor", "processor", "batch_size", "num_workers"}
    | {"src_lang", "tgt_lang", "truncation", "return_tensors", "return_text", "stop_sequence"}
    | {"clean_up_tokenization_spaces"}
)


class TranslationPipeline(Pipeline):
    """Translates strings: ``pipe("Hello")`` is ``[{"translation_text": ...}]``, for a list one dict a string.

    An NLLB-MoE that is not optimised yet is optimised here: Transformers 5 itself computes it wrongly. Fields
    of :class:`~fairseq_moe_opt.options.MoEOptions` may be among the arguments. All other arguments, here or
    in a call, are languages (``src_lang``, ``tgt_lang``), ``truncation``, ``return_tensors``,
    ``return_text``, ``clean_up_tokenization_spaces``, ``stop_sequence``, or go to ``model.generate``.

    A blank string becomes an empty one without running the model. Text of more tokens than the model has
    positions is cut there, with one warning a call.
    """

    _load_tokenizer = True
    _load_processor = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    # The base class would sort generation settings in a way that differs between releases.
    _pipeline_calls_generate = False

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any = None, *, task: str = "translation", **arguments: Any
    ) -> None:
        options, arguments = split_options(arguments)
        arguments.pop("local_files_only", None)  # meant for the loader; Transformers hands it on
        self._task_languages = task_languages(task) or (None, None)
        self._warned = False
        super().__init__(model=model, tokenizer=tokenizer, task=task, **arguments)
        if self.tokenizer is None:
            raise OptionError("tokenizer", "is needed: a tokenizer, or the folder or id of one")
        self.check_model_type(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
        _ensure_optimised(self.model, options)

    def __call__(self, texts: Any, **arguments: Any) -> Any:
        """Translate a string, or a list, tuple, data set or generator of strings, in order.

        A string gives a list of dicts, one a returned sequence; a list gives one dict a text, or one list of
        dicts where ``num_return_sequences`` is above 1; data sets and generators give lists of dicts, lazily
        where the release of Transformers does. Raises InputError for anything else and for unknown
        languages.
        """
        self._warned = False
        if isinstance(texts, (list, tuple)):
            for text in texts:
                _check_text(text)
            results = super().__call__(list(texts), **arguments) if texts else []
            single = all(len(records) == 1 for records in results)
            return [records[0] for records in results] if single else results
        if isinstance(texts, (dict, bytes, int, float)) or texts is None:
            _check_text(texts)
        return super().__call__(texts, **arguments)

    def _sanitize_parameters(
        self,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        truncation: Any = None,
        return_tensors: bool | None = None,
        return_text: bool | None = None,
        clean_up_tokenization_spaces: bool | None = None,
        stop_sequence: str | None = None,
        **generate_arguments: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Arguments of ``preprocess``, ``_forward`` and ``postprocess``: only those that were given."""
        check_names(generate_arguments, type(self.model))
        if stop_sequence is not None:
            generate_arguments["eos_token_id"] = self._stop_token(stop_sequence)
        languages = _given(src_lang=src_lang, tgt_lang=tgt_lang)
        preprocess = languages | _given(truncation=truncation)
        postprocess = _given(
            return_tensors=return_tensors,
            return_text=return_text,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
        )
        return preprocess, languages | generate_arguments, postprocess

    def preprocess(
        self, text: str, src_lang: str | None = None, tgt_lang: str | None = None, truncation: Any = None
    ) -> dict[str, Any]:
        """Ids and mask (1, T) of ``text``, ``blank`` (1,) bool, and the forced first token, if any."""
        _check_text(text)
        source, target = self._languages(src_lang, tgt_lang)
        self._check_languages(source, target)
        blank = is_blank(text)
        # A stand-in gives a blank row the same fields as its neighbours in a batch; the model never sees it.
        encoded = self._encode("." if blank else text, source, target, truncation)
        encoded.pop("token_type_ids", None)
        return {**encoded, "blank": torch.tensor([blank])}

    def _forward(
        self,
        model_inputs: Mapping[str, Any],
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        **arguments: Any,
    ) -> dict[str, Tensor]:
        """``output_ids`` (B, sequences, T) and ``blank`` (B,); blank rows are all padding."""
        inputs = dict(model_inputs)
        blank: Tensor = inputs.pop("blank")
        forced = inputs.pop("forced_bos_token_id", None)
        if forced is not None:  # a batch has a list of them, all of one language
            arguments.setdefault("forced_bos_token_id", forced[0] if isinstance(forced, list) else forced)
        source, target = self._languages(src_lang, tgt_lang)
        settings = task_settings(self.model.config, self.task, source, target)
        padding = self.tokenizer.pad_token_id
        config, rest = decoding_config(self.model.generation_config, settings, arguments, padding)
        padding, count = padding or 0, config.num_return_sequences or 1
        output = torch.full((len(blank), count, 1), padding, device=blank.device)
        if not blank.all():
            rows = {name: value[~blank] for name, value in inputs.items()}
            ids = self.model.generate(**rows, generation_config=config, **rest)
            output = torch.full((len(blank), count, ids.shape[-1]), padding, device=ids.device)
            output[~blank] = ids.view(-1, count, ids.shape[-1])
        return {"output_ids": output, "blank": blank}

    def postprocess(
        self,
        model_outputs: Mapping[str, Tensor],
        return_tensors: bool = False,
        return_text: bool | None = None,
        clean_up_tokenization_spaces: bool = False,
    ) -> list[dict[str, Any]]:
        """One dict a returned sequence: ``translation_text``, ``translation_token_ids`` where asked for."""
        with_text = not return_tensors if return_text is None else return_text
        if not (with_text or return_tensors):
            raise OptionError("return_text", "False leaves nothing to return without return_tensors=True")
        blank = bool(model_outputs["blank"][0])
        records: list[dict[str, Any]] = []
        for ids in model_outputs["output_ids"][0]:
            record: dict[str, Any] = {}
            if return_tensors:
                record["translation_token_ids"] = ids[:0] if blank else ids
            if with_text:
                record["translation_text"] = (
                    ""
                    if blank
                    else self.tokenizer.decode(
                        ids,
                        skip_special_tokens=True,
                        clean_up_tokenization_spaces=clean_up_tokenization_spaces,
                    )
                )
            records.append(record)
        return records

    def _languages(self, source: str | None, target: str | None) -> tuple[str | None, str | None]:
        """Those given, else those of the task's name."""
        return source or self._task_languages[0], target or self._task_languages[1]

    def _check_languages(self, source: str | None, target: str | None) -> None:
        check_languages(self.tokenizer, source, target)
        obeyed = hasattr(self.tokenizer, "_build_translation_inputs")
        # Models of one language pair ignore languages, as in Transformers 4; here that would be another language.
        if (source or target) and not obeyed and self.model.config.model_type in MODEL_CLASSES:
            kind = type(self.tokenizer).__name__
            raise OptionError("tokenizer", f"{kind} cannot set languages; load the checkpoint's own by AutoTokenizer")

    def _encode(self, text: str, source: str | None, target: str | None, truncation: Any) -> dict[str, Any]:
        limit = source_limit(self.model.config)
        if truncation is None and limit is not None:
            # One token more than fits tells whether there was more; with a limit the tokenizer does not warn.
            encoded = self._tokenize(text, source, target, truncation=True, max_length=limit + 1)
            if encoded["input_ids"].shape[1] <= limit:
                return encoded
            self._warn_of_truncation(text, limit)
            return self._tokenize(text, source, target, truncation=True, max_length=limit)
        if truncation is None or truncation in _DO_NOT_TRUNCATE:
            return self._tokenize(text, source, target)
        own = getattr(self.tokenizer, "model_max_length", None)
        limits = [one for one in (limit, own) if one is not None and one < 10**9]
        length = {"max_length": min(limits)} if limits else {}
        return self._tokenize(text, source, target, truncation=truncation, **length)

    def _tokenize(self, text: str, source: str | None, target: str | None, **how: Any) -> dict[str, Any]:
        build = getattr(self.tokenizer, "_build_translation_inputs", None)
        if build is not None:
            return dict(build(text, return_tensors="pt", src_lang=source, tgt_lang=target, **how))
        default = getattr(self.model.config, "prefix", None) or ""
        prefix = task_settings(self.model.config, self.task, source, target).get("prefix", default)
        return dict(self.tokenizer(prefix + text, return_tensors="pt", **how))

    def _warn_of_truncation(self, text: str, limit: int) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "a text of %d words is longer than the %d tokens this model takes and is cut there; split it"
                " into sentences to translate all of it (other texts of this call may be cut as well)",
                len(text.split()),
                limit,
            )

    def _stop_token(self, stop_sequence: str) -> int:
        """The one token that ``stop_sequence`` is, or its first one with a warning."""
        whole = self.tokenizer.convert_tokens_to_ids(stop_sequence)
        if isinstance(whole, int) and whole != self.tokenizer.unk_token_id:
            return whole
        ids: list[int] = self.tokenizer.encode(stop_sequence, add_special_tokens=False)
        if not ids:
            raise OptionError("stop_sequence", f"{stop_sequence!r} is no token of this model")
        if len(ids) > 1:
            logger.warning("stop_sequence %r is %d tokens; only the first one stops", stop_sequence, len(ids))
        return ids[0]


def pipeline(task: str = "translation", model: Any = None, **arguments: Any) -> TranslationPipeline:
    """A translation pipeline for ``model``: a folder, a hub id, or a loaded model.

    ``arguments`` are fields of :class:`~fairseq_moe_opt.options.MoEOptions`, ``preset`` (as for ``optimize``) and what
    ``transformers.pipeline`` and :class:`TranslationPipeline` take. An NLLB-MoE is loaded by
    :func:`~hf_integration.loading.from_pretrained`, which holds no weight twice; other models, and calls
    with arguments such as ``revision`` or ``device_map``, are loaded by Transformers. A model that came
    without ``tokenizer`` takes the one of the folder it came from.

    Raises OptionError for an argument or option nobody knows, CheckpointError where there is no such model.
    """
    task_languages(task)
    options, rest = split_options(arguments)
    MoEOptions.from_kwargs(**options)
    if model is None:
        raise OptionError("model", "is needed: a folder, a hub id, or a loaded model")
    if isinstance(model, (str, os.PathLike)):
        source = os.fspath(model)
        if _is_moe_checkpoint(source, rest):
            model, options = _load_moe(source, options, rest), {}
        else:
            model = source
    if not isinstance(model, str) and rest.get("tokenizer") is None:
        rest["tokenizer"] = getattr(model, "name_or_path", None) or None
    with _registered():
        return transformers.pipeline(task, model=model, **rest, **options)


def register() -> None:
    """Make ``transformers.pipeline("translation")`` and ``"translation_SRC_to_TGT"`` work; idempotent."""
    # No default model, as languages and sizes differ too much to guess one; the key has to be there.
    install_task({"impl": TranslationPipeline, "pt": (AutoModelForSeq2SeqLM,), "default": {}, "type": "text"})


def unregister() -> None:
    """Make Transformers' tasks exactly what they were before :func:`register`; idempotent."""
    remove_task()


def split_options(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of MoEOptions among ``arguments``, those of a preset among them, and the rest."""
    names = (PRESET, *option_names())
    options = with_preset({name: value for name, value in arguments.items() if name in names})
    return options, {name: value for name, value in arguments.items() if name not in names}


@contextmanager
def _registered() -> Iterator[None]:
    """The task in place for a while, where the user has taken it out."""
    before = is_installed()
    register()
    try:
        yield
    finally:
        if not before:
            unregister()


def _ensure_optimised(model: PreTrainedModel, options: Mapping[str, Any]) -> None:
    """Optimise a model that holds layers of a known family; OptionError where ``options`` come too late."""
    handle = getattr(model, "moe", None)
    if isinstance(handle, Handle):
        now = handle.options.to_dict()
        for name, value in options.items():
            if now[name] != value:
                message = f"the model is already optimised with {now[name]!r}; call model.moe.undo() first"
                raise OptionError(name, message)
    elif options or any(family.matches(model) for family in FAMILIES):
        optimize(model, **options)


def _is_moe_checkpoint(source: str, arguments: Mapping[str, Any]) -> bool:
    """Whether ``from_pretrained`` should load ``source``; CheckpointError where there is nothing to load."""
    if any(arguments.get(name) is not None for name in _HUB_ARGUMENTS):
        return False
    if Path(source).exists() or source.startswith((".", "/", "~")):
        try:
            model_type = read_config(local_folder(source)).model_type
        except NoMoELayerError:
            return False
    else:
        try:
            model_type = AutoConfig.from_pretrained(source).model_type
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(source, f"no such folder, nor to be had from the hub: {reason}") from error
    return model_type in MODEL_CLASSES


def _load_moe(source: str, options: Mapping[str, Any], arguments: dict[str, Any]) -> PreTrainedModel:
    """The optimised model; takes ``dtype`` out of ``arguments`` and refuses unknown names before reading."""
    unknown = {name: value for name, value in arguments.items() if name not in _PIPELINE_ARGUMENTS}
    check_names(unknown, next(iter(MODEL_CLASSES.values())))
    old_name = arguments.pop("torch_dtype", None)
    dtype = arguments.pop("dtype", old_name)
    return from_pretrained(source, dtype=dtype, device=_load_device(arguments.get("device")), **options)


def _load_device(device: Any) -> torch.device | str | None:
    """Where Transformers' pipelines would put a model: ``device`` may be a number, None is GPU 0."""
    if device is None:
        return "cuda:0" if torch.cuda.is_available() else None
    if isinstance(device, int):
        return f"cuda:{device}" if device >= 0 and torch.cuda.is_available() else "cpu"
    return device


def _check_text(text: Any) -> None:
    if not isinstance(text, str):
        kind = type(text).__name__
        raise InputError(f"what to translate is a string or a list of strings; this is of type {kind}")


def _given(**values: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in values.items() if value is not None}
