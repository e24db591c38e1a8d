"""The body of ``moe-opt verify``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fairseq_moe_opt.cli.progress import status
from fairseq_moe_opt.cli.text_files import checked_line_count, decoded, open_lines
from fairseq_moe_opt.errors import InputError
from fairseq_moe_opt.options import MoEOptions

if TYPE_CHECKING:
    from hf_integration.verify import Batch, Comparison


@dataclass(frozen=True)
class Verification:
    """What to verify, on which text (a file, or None), and how."""

    checkpoint: str
    text: str | None
    languages: tuple[str | None, str | None]
    batch_size: int
    dtype: str
    device: str | None
    options: Mapping[str, Any]
    stock: bool


@dataclass(frozen=True)
class Verified:
    """The text that was used in words, and what came out, of which ``counted`` decides."""

    description: str
    comparisons: tuple[Comparison, ...]
    counted: tuple[Comparison, ...]


def run_verification(request: Verification) -> Verified:
    """Load the checkpoint and compare every way of computing it."""
    options = MoEOptions.from_kwargs(**request.options)
    lines = None if request.text is None else _read(request.text)
    from hf_integration import from_pretrained
    from hf_integration.translate import choose_device, quiet_host
    from hf_integration.verify import REFERENCE, STOCK, compare, expert_weight

    quiet_host()
    device = choose_device(request.device)
    batches, description = _batches(request, lines)
    with status(f"loading {request.checkpoint}"):
        model = from_pretrained(
            request.checkpoint,
            dtype=request.dtype,
            device=device,
            kernel=REFERENCE,
            expert_dtype=options.expert_dtype,
        )
    others: dict[str, Callable[[], Any]] = {}
    if options.buffered:
        others[f"buffered, {options.expert_memory}"] = lambda: from_pretrained(
            request.checkpoint, dtype=request.dtype, device=device, **request.options
        )
    with status("computing"):
        found = compare(model, batches, capacity=options.capacity, stock=request.stock, others=others)
    counted = tuple(one for one in found if one.name != STOCK)
    experts = str(expert_weight(model).dtype).removeprefix("torch.")
    dtypes = request.dtype if experts == request.dtype else f"{request.dtype} with {experts} experts"
    return Verified(f"{description}, {dtypes} on {device}", tuple(found), counted)


def _read(name: str) -> list[str]:
    checked_line_count(name)
    with open_lines(name) as stream:
        lines = [line for line in decoded(stream, name) if line.strip()]
    if not lines:
        raise InputError(f"{name}: has no line with text")
    return lines


def _batches(request: Verification, lines: list[str] | None) -> tuple[list[Batch], str]:
    """What to compute, and in words what it is."""
    from hf_integration.text import check_languages
    from hf_integration.translate import has_tokenizer, load_tokenizer, stored_config
    from hf_integration.verify import SENTENCES, choose_languages, random_batches, text_batches, text_limit

    config: Any = stored_config(request.checkpoint)
    if not has_tokenizer(request.checkpoint):
        if lines is not None:
            raise InputError(f"--text needs a tokenizer, and {request.checkpoint} has none")
        batches = random_batches(config)
        return batches, f"{len(batches[0].ids)} rows of random tokens (there is no tokenizer)"
    tokenizer = load_tokenizer(request.checkpoint)
    is_lm = not config.is_encoder_decoder
    if is_lm and any(request.languages):
        raise InputError(f"{request.checkpoint}: is a language model and knows no languages: leave them out")
    languages = (None, None) if is_lm else choose_languages(tokenizer, *request.languages)
    check_languages(tokenizer, *languages)
    texts = list(SENTENCES) if lines is None else lines
    batches = text_batches(tokenizer, texts, languages, text_limit(config), request.batch_size, left=is_lm)
    where = f" from {languages[0]} to {languages[1]}" if languages[0] else ""
    return batches, f"{len(texts)} {'built-in ' if lines is None else ''}sentences{where}"
