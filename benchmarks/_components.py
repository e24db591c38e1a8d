"""What a forward and a generated token spend their time on, by components that every release of Transformers has.

Modules are told apart by their class's name, so the same rules hold for a model as Transformers ships it and for one
that this project runs; what runs in none of them is the rest. Hooks tell a clock when a module begins and ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from fairseq_moe_opt.profiling.clock import Clock, Key

ROUTER, EXPERTS, DENSE, ATTENTION, NORM, HEAD, EMBEDDING, REST, AROUND = COMPONENTS = (
    "router",
    "experts",
    "dense FFN",
    "attention",
    "layer norm",
    "lm_head",
    "embedding",
    "rest of the forward",
    "around the forward",
)
"""``experts`` is all of a sparse layer but its routing; ``rest``: masks, residuals, dropout, output objects;
``around``: what ``generate`` does between forwards: logits, stopping, inputs and cache of the next step."""

_BY_CLASS = (
    ("Top2Router", ROUTER),
    ("SparseMLP", EXPERTS),
    ("DenseActDense", DENSE),
    ("Attention", ATTENTION),
    ("LayerNorm", NORM),
    ("Embedding", EMBEDDING),
)
_PHASE = "forward"


def component_of(name: str, module: nn.Module) -> str | None:
    """The component of a module; None for one that has no time of its own."""
    if ".experts." in f".{name}.":
        return None  # inside a sparse layer
    if name == "lm_head":
        return HEAD
    kind = type(module).__name__
    return next((component for ending, component in _BY_CLASS if kind.endswith(ending)), None)


def seconds_of(model: nn.Module, work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds of each component during ``work()``, which add up to its wall time, and its result."""
    with _watched(model) as clock:
        handle = getattr(model, "moe", None)
        if handle is not None:
            handle.reset()
        start = time.perf_counter()
        result = work()
        whole = time.perf_counter() - start
    seconds = dict.fromkeys(COMPONENTS, 0.0)
    for key, spent in clock.settle().seconds.items():
        seconds[key.component] += spent
    seconds[AROUND] = whole - sum(seconds.values())
    if handle is not None:
        # This project's router module gives logits, the choice is made after it: routing is timed as a whole instead.
        routing = handle.report().step_seconds["routing"]
        seconds[EXPERTS] -= routing - seconds[ROUTER]
        seconds[ROUTER] = routing
    return seconds, result


@contextmanager
def _watched(model: nn.Module) -> Iterator[Clock]:
    clock = Clock(lambda: torch.device("cpu"))
    roots = {module for name, module in model.named_modules() if name == "" or name.endswith("encoder")}
    hooks = []
    for name, module in model.named_modules():
        component = REST if module in roots else component_of(name, module)
        if component is not None:
            hooks.append(module.register_forward_pre_hook(partial(_enter, clock, Key(_PHASE, name, component))))
            hooks.append(module.register_forward_hook(partial(_leave, clock)))
    try:
        yield clock
    finally:
        for hook in hooks:
            hook.remove()


def _enter(clock: Clock, key: Key, *_: Any) -> None:
    clock.enter(key)


def _leave(clock: Clock, *_: Any) -> None:
    clock.leave()
