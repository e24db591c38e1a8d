"""One text through every way of computing the same model: how far the logits are apart, and whether tokens agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fairseq_moe_opt.errors import KernelError
from fairseq_moe_opt.moe.kernels import available_kernels
from hf_integration.families import experts_interface, family_of
from hf_integration.optimize import Handle, optimize
from hf_integration.text import language_codes, source_limit
from hf_integration.translate import pad_rows

SENTENCES: tuple[str, ...] = (
    "Save the file before you close the window.",
    "The password is wrong.",
    "Click here to open the list of all installed programs, then choose the one to be removed.",
    "No network connection",
    "You can change these settings at any time.",
    "Everyone has the right to freedom of thought, conscience and religion.",
)
REFERENCE = "naive"
STATIC = "static"
STOCK = "transformers"
_RANDOM_LENGTHS = (17, 5, 11, 8)
_SEED = 20240


@dataclass(frozen=True)
class Batch:
    """(B, T) ids and attention mask, and the settings to generate with."""

    ids: Tensor
    mask: Tensor
    generation: Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """One way of computing against the naive loop, over all batches.

    Attributes:
        name: ``static``, a kernel, or ``transformers`` for the host's own layers.
        max_abs: the largest difference of two logits.
        max_rel: the same, divided by the batch's largest logit of the naive loop.
        tokens_agree: whether greedy decoding gave the same tokens.
    """

    name: str
    max_abs: float
    max_rel: float
    tokens_agree: bool

    def agrees(self, tolerance: float) -> bool:
        """Same tokens, and logits no further apart than ``tolerance``, relatively; NaN never agrees."""
        return self.tokens_agree and self.max_rel <= tolerance


@dataclass(frozen=True)
class _Result:
    logits: Tensor
    tokens: Tensor


def compare(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    *,
    capacity: str = "none",
    stock: bool = False,
    others: Mapping[str, Callable[[], PreTrainedModel]] | None = None,
) -> list[Comparison]:
    """Compare static gating, where there is, and every kernel that runs here with the naive loop, on ``model``.

    ``stock`` adds the host's own layers, ``others`` models that are loaded in another way. ``model`` comes back as it
    was given: optimised the same way, or not.
    """
    before = model.moe.options if isinstance(getattr(model, "moe", None), Handle) else None
    weight = expert_weight(model)
    # Models whose own routers route have no capacity to pad to.
    host_routes = family_of(model) is experts_interface
    ways: dict[str, dict[str, str] | None] = {} if host_routes else {STATIC: {"gating": "static"}}
    ways |= {name: {"kernel": name} for name in available_kernels(weight.device, weight.dtype) if name != REFERENCE}
    if stock:
        ways[STOCK] = None
    try:
        reference = _run_as(model, {"kernel": REFERENCE, "capacity": capacity}, batches, None)
        results = []
        for name, options in ways.items():
            full = None if options is None else {**options, "capacity": capacity}
            try:
                run = _run_as(model, full, batches, reference)
            except KernelError:  # it does not compute these experts' activation
                continue
            results.append(_difference(name, run, reference))
        for name, load in (others or {}).items():
            results.append(_difference(name, _run(load(), batches, reference), reference))
        return results
    finally:
        _undo(model)
        if before is not None:
            optimize(model, **before.to_dict())


def expert_weight(model: PreTrainedModel) -> Tensor:
    """The first matrix of the first expert, or of all, whose dtype says which kernels can run."""
    for _, layer in family_of(model).expert_linears(model):
        return cast(Tensor, layer.weight)
    return next(iter(experts_interface.experts_of(model).values())).stacks().first


def text_batches(
    tokenizer: Any,
    lines: Iterable[str],
    languages: tuple[str | None, str | None],
    limit: int | None,
    batch_size: int,
    *,
    left: bool = False,
) -> list[Batch]:
    """The non-blank ``lines`` as batches; lines longer than ``limit`` tokens are cut. ``left``: where padding goes."""
    kept = [line for line in lines if line.strip()]
    how = {} if limit is None else {"truncation": True, "max_length": limit}
    batches = []
    for first in range(0, len(kept), batch_size):
        texts = kept[first : first + batch_size]
        build = getattr(tokenizer, "_build_translation_inputs", None)
        if build is None or languages[0] is None:
            rows, forced = tokenizer(texts, **how)["input_ids"], {}
        else:
            encoded = build(texts, return_tensors=None, src_lang=languages[0], tgt_lang=languages[1], **how)
            rows, forced = encoded["input_ids"], {"forced_bos_token_id": encoded["forced_bos_token_id"]}
        batches.append(Batch(*pad_rows(rows, tokenizer.pad_token_id or 0, left=left), generation=forced))
    return batches


def random_batches(config: Any) -> list[Batch]:
    """One batch of random ids with padding, the same every time, for a model without a tokenizer."""
    generator = torch.Generator().manual_seed(_SEED)
    first, limit = min(4, config.vocab_size - 1), text_limit(config) or max(_RANDOM_LENGTHS)
    rows = [
        torch.randint(first, config.vocab_size, (min(length, limit),), generator=generator).tolist()
        for length in _RANDOM_LENGTHS
    ]
    ids, mask = pad_rows(rows, config.pad_token_id or 0, left=not config.is_encoder_decoder)
    return [Batch(ids, mask, generation={})]


def text_limit(config: Any) -> int | None:
    """How many tokens of a line to compute: a language model's positions are for what follows, too."""
    limit = source_limit(config)
    return limit if limit is None or config.is_encoder_decoder else max(limit // 2, 1)


def choose_languages(tokenizer: Any, source: str | None, target: str | None) -> tuple[str | None, str | None]:
    """What was given, else English where it is known, else the first; and another language as the target."""
    codes = language_codes(tokenizer)
    if not codes:
        return None, None
    source = source or next((code for code in codes if code.startswith("en")), codes[0])
    return source, target or next((code for code in codes if code != source), source)


def _run_as(
    model: PreTrainedModel,
    options: Mapping[str, str] | None,
    batches: Sequence[Batch],
    reference: Sequence[_Result] | None,
) -> list[_Result]:
    """Logits and greedy tokens with ``options``, None for the host's own layers."""
    _undo(model)
    if options is not None:
        optimize(model, **options)
    return _run(model, batches, reference)


def _run(model: PreTrainedModel, batches: Sequence[Batch], reference: Sequence[_Result] | None) -> list[_Result]:
    """Logits and greedy tokens.

    Logits are those of the reference's tokens, so that a token that differs does not change what is compared.
    """
    results = []
    for number, batch in enumerate(batches):
        ids, mask = batch.ids.to(model.device), batch.mask.to(model.device)
        tokens = _greedy(model, ids, mask, batch.generation)
        forced = tokens if reference is None else reference[number].tokens
        with torch.inference_mode():
            results.append(_Result(_forced(model, ids, mask, forced).float(), tokens))
    return results


def _forced(model: PreTrainedModel, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """The logits (B, T, V) of ``tokens`` that were generated from ``ids``; 0 where a language model's are padding."""
    if model.config.is_encoder_decoder:
        logits: Tensor = model(input_ids=ids, attention_mask=mask, decoder_input_ids=tokens).logits
        return logits
    new = torch.ones_like(tokens[:, ids.shape[1] :])
    mask = torch.cat([mask, new], dim=1)
    logits = model(input_ids=tokens, attention_mask=mask).logits
    # What stands at padding is nobody's, and some ways route it and others do not.
    return logits.masked_fill(mask.unsqueeze(-1) == 0, 0.0)


def _greedy(model: PreTrainedModel, ids: Tensor, mask: Tensor, generation: Mapping[str, Any]) -> Tensor:
    """(B, T) tokens, at most half as many again as the source has, and 20."""
    length = ids.shape[1] + ids.shape[1] // 2 + 20
    tokens: Tensor = type(model).generate(
        model,
        input_ids=ids,
        attention_mask=mask,
        num_beams=1,
        do_sample=False,
        max_length=min(length, source_limit(model.config) or length),
        **generation,
    )
    return tokens


def _difference(name: str, results: Sequence[_Result], reference: Sequence[_Result]) -> Comparison:
    pairs = list(zip(results, reference, strict=True))
    apart = torch.stack([(mine.logits - theirs.logits).abs().max() for mine, theirs in pairs])
    scale = torch.stack([theirs.logits.abs().max() for _, theirs in pairs]).clamp(min=1e-30)
    agree = all(torch.equal(mine.tokens, theirs.tokens) for mine, theirs in pairs)
    # Tensor.max keeps a NaN, which Python's max may lose.
    return Comparison(name, float(apart.max()), float((apart / scale).max()), agree)


def _undo(model: PreTrainedModel) -> None:
    handle = getattr(model, "moe", None)
    if isinstance(handle, Handle):
        handle.undo()
