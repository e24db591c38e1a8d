"""The Mixture-of-Experts arguments of fairseq's ``nllb`` and ``moe`` branches, under their names and defaults.

They are the fields of one fairseq dataclass, which makes the command-line flags, the language model's configuration
and the values that are read from a checkpoint. No ``from __future__ import annotations`` here: fairseq reads the
types of the fields and wants classes, not strings.
"""
# ruff: noqa: UP045 - fairseq looks at the origin of Optional, which `X | None` does not have

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Optional

from fairseq.dataclass import FairseqDataclass
from omegaconf.errors import InterpolationKeyError

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.options import MoEOptions, field_choices, field_help
from fairseq_moe_opt.presets import PRESET, read_preset

CAPACITY_ARGUMENTS = ("moe_eval_capacity_token_fraction", "moe_eval_capacity_max_seqlen")
"""Arguments that mean something only where capacity drops tokens: giving one asks for the checkpoint's capacity."""

IMPLIED_BY = "moe_capacity_implied_by"
"""Where a model's configuration notes which argument implied ``moe_capacity="checkpoint"``."""

BATCH_SIZES = ("batch_size", "batch_size_valid")
"""Arguments of the data that reach the layers, which pad a smaller batch to them in training and validation."""

PRESET_ARGUMENT = f"moe_{PRESET}"


@dataclass
class MoEArguments(FairseqDataclass):
    """What a checkpoint (or a training command line) says of its Mixture-of-Experts layers."""

    moe_freq: int = field(default=0, metadata={"help": "every k-th layer is a Mixture-of-Experts layer; 0 for none"})
    encoder_moe_freq: int = field(default=0, metadata={"help": "the same for the encoder alone; the larger one counts"})
    decoder_moe_freq: int = field(default=0, metadata={"help": "the same for the decoder alone; the larger one counts"})
    moe_expert_count: int = field(default=0, metadata={"help": "experts of each Mixture-of-Experts layer"})
    moe_gating_use_fp32: bool = field(default=False, metadata={"help": "compute the gate's softmax in fp32"})
    moe_second_expert_policy: str = field(
        default="sampling", metadata={"help": "all, sampling or random: when the second expert is used"}
    )
    moe_normalize_gate_prob_before_dropping: bool = field(
        default=False, metadata={"help": "normalise the two gate values before capacity drops choices, not after"}
    )
    moe_top1_expert: bool = field(default=False, metadata={"help": "route each token to one expert"})
    moe_eval_capacity_token_fraction: float = field(
        default=0.25, metadata={"help": "rows an expert may serve at evaluation, as a fraction of all rows"}
    )
    moe_eval_capacity_max_seqlen: bool = field(
        default=False, metadata={"help": "the fraction is of the maximal length times the batch"}
    )
    use_moe_pad_mask: bool = field(default=False, metadata={"help": "do not route padding"})
    moe_batch_prioritized_routing: bool = field(
        default=False, metadata={"help": "serve tokens by descending gate value where capacity binds (top-2 only)"}
    )
    moe_eom: float = field(default=0.0, metadata={"help": "expert output masking probability"})
    moe_fom: float = field(default=0.0, metadata={"help": "final output masking probability"})
    moe_local_drop: float = field(default=0.0, metadata={"help": "probability of keeping tokens on their own process"})
    moe_cmr: bool = field(default=False, metadata={"help": "mix each such layer with a dense one by a learned gate"})
    cmr_gate_drop: float = field(default=0.0, metadata={"help": "dropout of that gate in training"})
    alternate_ffn_embed_dim: int = field(
        default=0, metadata={"help": "not 0: dense layers of this width in place of Mixture-of-Experts ones (encoder)"}
    )
    alternate_decoder_ffn_embed_dim: int = field(default=0, metadata={"help": "the same for the decoder"})
    moe_normalize_expert_grad: str = field(
        default="world_size", metadata={"help": "how expert gradients are divided under fully sharded training"}
    )
    moe_expert_ffn_dim: Optional[int] = field(default=None, metadata={"help": "accepted and unused, as in fairseq"})

    def frequency(self, side: str) -> int:
        """Every how many layers of ``side`` (``encoder`` or ``decoder``) one is sparse; 0 for none."""
        own = self.encoder_moe_freq if side == "encoder" else self.decoder_moe_freq
        return max(self.moe_freq, own)

    def is_sparse(self, side: str, index: int) -> bool:
        """Whether layer ``index`` (from 0) of ``side`` is one of the special layers."""
        frequency = self.frequency(side)
        return frequency > 0 and (index + 1) % frequency == 0

    def alternate_width(self, side: str) -> int:
        """Width of the dense layers that stand in for sparse ones; 0 where the layers really are sparse."""
        return self.alternate_ffn_embed_dim if side == "encoder" else self.alternate_decoder_ffn_embed_dim

    @property
    def any_sparse(self) -> bool:
        """Whether any layer differs from a stock model's."""
        return self.frequency("encoder") > 0 or self.frequency("decoder") > 0


def _runtime_field(name: str) -> tuple[str, Any, Any]:
    # Not a Union of bool and str, which omegaconf does not know.
    kind = Optional[Any] if name == "profile" else Optional[str]
    return f"moe_{name}", kind, field(default=None, metadata={"help": field_help()[name]})


_TRANSFORMERS_ONLY = ("dense",)
"""Options without effect here: fairseq's dense layers are left as they are."""

RUNTIME_ARGUMENTS: Mapping[str, str] = {
    f"moe_{option.name}": option.name for option in fields(MoEOptions) if option.name not in _TRANSFORMERS_ONLY
}
"""The runtime's own options, under the names they have among fairseq's arguments."""

RuntimeArguments = make_dataclass(
    "RuntimeArguments",
    [
        *(_runtime_field(name) for name in RUNTIME_ARGUMENTS.values()),
        (IMPLIED_BY, Optional[str], field(default=None)),
    ],
    bases=(FairseqDataclass,),
)
"""The same as a fairseq dataclass, None where the user said nothing."""


_REFERENCE = "${"
"""What omegaconf's references begin with; a dataclass of its own holds them as text."""


def read_arguments(cfg: Any) -> MoEArguments:
    """The arguments in any configuration object; what is missing or None has the branches' default."""
    values = {}
    for item in fields(MoEArguments):
        value = getattr(cfg, item.name, None)
        if item.name != "_name" and value is not None:
            values[item.name] = value
    return MoEArguments(**values)


def read_batch_sizes(cfg: Any) -> tuple[int, int]:
    """Sentences that a batch is filled up to in training and in validation; 0 for not at all."""
    return _batch_size(cfg, BATCH_SIZES[0]), _batch_size(cfg, BATCH_SIZES[1])


def _batch_size(cfg: Any, name: str) -> int:
    try:
        value = getattr(cfg, name, None) or 0
    except InterpolationKeyError:
        value = _REFERENCE
    if str(value).startswith(_REFERENCE):
        # A model's configuration by itself, without the section of the data that this one refers to.
        return 0
    try:
        # fairseq parses --batch-size-valid as text, because its default is a reference.
        return int(value)
    except ValueError:
        raise OptionError(name, f"{value!r} is not a number of sentences") from None


def read_options(cfg: Any) -> MoEOptions:
    """The runtime's options in a configuration object; OptionError names a wrong one."""
    given = {option: getattr(cfg, argument, None) for argument, option in RUNTIME_ARGUMENTS.items()}
    return options_from({option: value for option, value in given.items() if value is not None})


def options_from(values: Mapping[str, Any]) -> MoEOptions:
    """Options by their names, an error naming them as users of fairseq know them."""
    try:
        options = MoEOptions.from_kwargs(**values)
    except OptionError as error:
        message = str(error).split(": ", 1)[1]
        raise OptionError(f"moe_{error.option}", message) from None
    if options.expert_dtype != "checkpoint" and not options.buffered:
        raise OptionError(
            "moe_expert_dtype",
            f"{options.expert_dtype!r} is what experts become on their way into a buffer: give moe_expert_memory too, "
            "100% for all of them",
        )
    return options


def expand_preset(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """``arguments`` without their ``moe_preset``, whose options stand in where they say nothing."""
    given = dict(arguments)
    name = given.pop(PRESET_ARGUMENT, None)
    if name is None:
        return given
    try:
        preset = read_preset(name)
    except OptionError as error:
        raise OptionError(PRESET_ARGUMENT, str(error).split(": ", 1)[1]) from None
    for option in _TRANSFORMERS_ONLY:
        if option in preset:
            raise OptionError(PRESET_ARGUMENT, f"{name!r} gives {option!r}, which has no effect on fairseq's models")
    said = {argument: value for argument, value in given.items() if value is not None}
    return {**given, **{f"moe_{option}": value for option, value in preset.items()}, **said}


def argument_choices(argument: str) -> tuple[str, ...] | None:
    """The values that a runtime argument may have, None where there is no fixed set."""
    return field_choices().get(RUNTIME_ARGUMENTS[argument])
