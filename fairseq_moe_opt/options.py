"""The user's whole vocabulary: one frozen dataclass. Its field docstrings are the help texts everywhere.

The same names are keyword arguments in Python, ``--moe-NAME`` flags on command lines and keys of YAML presets.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any

from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.sizes import ALL, check_size

_CHOICES: Mapping[str, tuple[str, ...]] = {
    "gating": ("dynamic", "static"),
    "capacity": ("none", "checkpoint"),
    "kernel": ("auto", "naive", "loop", "grouped_mm", "fused", "triton"),
    "dense": ("auto", "torch"),
    "expert_dtype": ("checkpoint", "bf16", "int8"),
    "eviction": ("auto", "reuse", "lfru", "lifo", "fifo", "lru", "lfu"),
    "expert_pool": ("auto", "global", "layer"),
    "prefetch": ("auto", "off", "layers", "previous", "router"),
    "host_compute": ("off", "auto"),
}

_BUFFERING_ONLY: Mapping[str, object] = {
    "host_memory": "0",
    "eviction": "auto",
    "expert_pool": "auto",
    "prefetch": "auto",
    "host_compute": "off",
    "warm_start": None,
}
"""Options without effect while all experts stay in memory, and their defaults."""

_YES_OR_NO = ("yes", "no", "true", "false", "on", "off", "0", "1")

PAGE_CACHE = "page-cache"
"""The host memory that the operating system manages."""


_OF_ONE_RANK = frozenset({"report", "trace"})
"""Options that may differ between ranks."""


@dataclass(frozen=True)
class MoEOptions:
    """How Mixture-of-Experts layers run."""

    gating: str = "dynamic"
    """dynamic computes only the rows that tokens really chose; static pads every expert to the same capacity, as
    the original code does, and is there to compare with."""

    capacity: str = "none"
    """none drops nothing, so a token's result does not depend on its batch; checkpoint drops exactly what the
    checkpoint's own capacity options drop."""

    kernel: str = "auto"
    """what computes the experts: auto takes the fastest one here; naive, loop, grouped_mm, fused and triton ask
    for one."""

    dense: str = "auto"
    """what computes the model's dense layers on a CPU: auto takes what is fastest there of the compiled kernel, oneDNN
    and torch, with results equal to rounding; torch leaves them as they are. Transformers' models only."""

    expert_dtype: str = "checkpoint"
    """dtype of the experts in memory, all else keeps the model's: checkpoint takes them as they are stored; bf16 rounds
    them, and they compute in it; int8 quantises their matrices as they are read, one scale an output channel."""

    expert_memory: str = "all"
    """memory for experts on the device, as 2GiB, 500MB or 25% of them; others are read from the checkpoint's files when
    they are needed. all keeps all experts in memory."""

    host_memory: str = "0"
    """main memory (pinned for a GPU) for experts between the device and the files, as 8GiB or 50%; 0 for none, so that
    what was read is also dropped from the system's page cache; page-cache leaves that to the system."""

    eviction: str = "auto"
    """which expert makes room: reuse (expected to be needed latest), lfru (decayed frequency), lifo (the paper's),
    fifo, lru or lfu; never one that the current forward has still to compute. auto takes reuse."""

    expert_pool: str = "auto"
    """global shares the memory for experts among all layers; layer gives each an equal part, as in the paper; auto is
    global."""

    prefetch: str = "auto"
    """fetch experts before they are asked for: where a forward has many rows, as in the encoder, layers fetches all
    experts of the next layer in order; previous also guesses where it has few, by a layer's experts of the step before,
    and router by applying the next layer's router early; off waits until they are asked for. auto takes off on a CPU
    and router on a GPU."""

    host_compute: str = "off"
    """auto computes an expert that is in host_memory but not on the GPU where it is, when it has so few rows that
    copying it would take longer; both are timed at the start. off copies every expert. No effect on a CPU."""

    warm_start: str | None = None
    """trace that says which experts to load first."""

    trace: str | None = None
    """file that the experts each forward needs, and their rows, are recorded in, for warm_start, moe-opt cache and
    moe-opt place."""

    rebalance_every: int = 0
    """where ranks share experts: after so many generate calls (of each rank, each a batch; in fairseq, so many runs of
    the first sparse stack), move some experts to the ranks that recent loads ask for; 0 leaves them where they are."""

    profile: bool | str = False
    """time routing, dispatch, experts and combine of every layer, for the report; or a folder: a profile of everything
    that ran is written there in the end, as pictures, a page and JSON."""

    report: str | None = None
    """file that the report of each generate call is written to, as JSON."""

    def __post_init__(self) -> None:
        for name in ("expert_memory", "host_memory"):
            object.__setattr__(self, name, _size(name, getattr(self, name)))
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise OptionError(name, f"{value!r} is not one of {', '.join(choices)}")
        object.__setattr__(self, "rebalance_every", _count("rebalance_every", self.rebalance_every))
        if not _is_folder_or_bool(self.profile):
            raise OptionError("profile", f"{self.profile!r} is not true or false, nor a folder")
        if self.gating == "static" and self.kernel != "auto":
            raise OptionError("kernel", f"{self.kernel!r} has no effect with gating='static'; leave it at 'auto'")
        self._check_buffering()

    @property
    def profile_folder(self) -> str | None:
        """Where a profile is written to; None where there is to be none."""
        return self.profile if isinstance(self.profile, str) else None

    @property
    def buffered(self) -> bool:
        """Whether experts are buffered: not all of them stay in memory."""
        return self.expert_memory != ALL

    def _check_buffering(self) -> None:
        if self.buffered:
            if self.kernel in ("grouped_mm", "triton"):
                raise OptionError(
                    "kernel",
                    f"{self.kernel!r} computes from one tensor of all experts, which expert_memory="
                    f"{self.expert_memory!r} does not keep; use kernel='loop'",
                )
            self._check_host_compute()
            return
        for name, default in _BUFFERING_ONLY.items():
            if getattr(self, name) != default:
                raise OptionError(
                    name, f"{getattr(self, name)!r} has no effect with expert_memory='all'; give expert_memory a size"
                )

    def _check_host_compute(self) -> None:
        if self.host_compute == "off":
            return
        for name, useless, instead in (
            ("host_memory", ("0", PAGE_CACHE), "give host_memory a size"),
            ("gating", ("static",), "leave one of them out"),
        ):
            if (value := getattr(self, name)) in useless:
                raise OptionError(
                    "host_compute", f"{self.host_compute!r} has no effect with {name}={value!r}; {instead}"
                )

    @classmethod
    def from_kwargs(cls, **values: Any) -> MoEOptions:
        """Options from keyword arguments; OptionError on a name that does not exist, listing those that do."""
        known = option_names()
        for name in values:
            if name not in known:
                raise OptionError(name, f"no such option; there are {', '.join(known)}")
        return cls(**values)

    def alike_on_ranks(self) -> dict[str, str]:
        """What ranks that share experts have to be given alike, as text; where each writes files is its own affair."""
        return {name: str(value) for name, value in self.to_dict().items() if name not in _OF_ONE_RANK}

    def to_dict(self) -> dict[str, object]:
        """All options by name."""
        return asdict(self)


def _size(option: str, value: object) -> str:
    """A size as text; OptionError for anything that is none."""
    if option == "host_memory" and value == PAGE_CACHE:
        return PAGE_CACHE
    if isinstance(value, (int, str)) and not isinstance(value, bool):
        check_size(option, value)
        if option == "host_memory" and value == ALL:
            raise OptionError(option, "'all' is not a size; 100% holds every expert")
        return str(value)
    raise OptionError(option, f"{value!r} is not a size such as '2GiB' or '25%'")


def _is_folder_or_bool(value: object) -> bool:
    """Words that mean true or false elsewhere are taken for a mistake, not for a folder."""
    if isinstance(value, str):
        return bool(value.strip()) and value.strip().lower() not in _YES_OR_NO
    return isinstance(value, bool)


def _count(option: str, value: object) -> int:
    """A whole number that is not negative; command lines give it as text."""
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise OptionError(option, f"{value!r} is not 0 or a whole number above it")
    return value


def option_names() -> tuple[str, ...]:
    """Names of all options, in order."""
    return tuple(field.name for field in fields(MoEOptions))


def field_choices() -> dict[str, tuple[str, ...]]:
    """The values an option may take, for options with a fixed set."""
    return dict(_CHOICES)


@cache
def field_help() -> Mapping[str, str]:
    """One-line help of every option: the docstring under its field."""
    (class_node,) = ast.parse(inspect.getsource(MoEOptions)).body
    if not isinstance(class_node, ast.ClassDef):
        raise TypeError("MoEOptions is not a class")
    texts: dict[str, str] = {}
    for node, following in zip(class_node.body, class_node.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(following, ast.Expr):
            texts[node.target.id] = " ".join(str(ast.literal_eval(following.value)).split())
    return texts
