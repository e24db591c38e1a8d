"""``optimize(model)``: the engine's layers in a loaded Transformers model, and the handle that looks after them."""

from __future__ import annotations

import atexit
import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationMixin

from fairseq_moe_opt.build import ExpertBuffer, Rebalancer, require_ranks
from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.moe.dense_report import DenseCounters
from fairseq_moe_opt.moe.exchange_report import RebalanceReport
from fairseq_moe_opt.moe.report import Report, peak_memory, tokens_by_phase, write_report
from fairseq_moe_opt.moe.trace import TraceLayer, TraceRecorder, write_trace
from fairseq_moe_opt.options import MoEOptions
from fairseq_moe_opt.parallel import ALL_REDUCE, ExpertSpread, own_file, own_folder, own_number
from fairseq_moe_opt.placement import Placement
from fairseq_moe_opt.presets import with_preset
from fairseq_moe_opt.profiling import ALL_CALLS, Profile, Profiler, check_folder, write_profile
from hf_integration.dense import install_dense
from hf_integration.expert_dtypes import require_scales
from hf_integration.families import family_of
from hf_integration.patching import Installed, Patches
from hf_integration.profiling import about, profiler_for, weights_of
from hf_integration.roomy_cache import install_roomy_caches
from hf_integration.synced import Decoding, SharedDecoding, SyncedDecoding


class Handle:
    """What ``optimize`` put into a model: reports on it, and takes it out again.

    Attributes:
        options: that it runs with.
        decoding: how ranks that share experts generate together; None where this process has them all.
        number: of this process among several, which write files of their own; None for one that is alone.
    """

    def __init__(
        self,
        model: nn.Module,
        installed: Installed,
        options: MoEOptions,
        decoding: Decoding | None = None,
        rebalancer: Rebalancer | None = None,
        number: int | None = None,
        dense: DenseCounters | None = None,
    ) -> None:
        self.options = options
        self.decoding = decoding
        self.number = number
        self._model = model
        self._installed = installed
        self._rebalancer = rebalancer
        self._dense = dense
        self._seconds = 0.0
        self._recorder = self.record() if options.trace is not None else None
        self._profiler: Profiler | None = None
        if options.profile_folder is not None:
            check_folder(Path(options.profile_folder), "profile")
            self._profiler = self.profiler()
            self._profiler.attach()
            self._profiler.record_memory()
            self._profiler.begin(ALL_CALLS)
            atexit.register(self.write_profile)

    @property
    def active(self) -> bool:
        """False once undone."""
        return getattr(self._model, "moe", None) is self

    def report(self) -> Report:
        """What the layers did since the last reset; every ``generate`` call starts with one."""
        layers = tuple(layer.counters.snapshot() for layer in self._installed.layers)
        peak, kind = peak_memory(self._device())
        moving = self._rebalancer
        return Report(
            family=self._installed.family,
            options=self.options.to_dict(),
            layers=layers,
            tokens=tokens_by_phase(layers),
            expert_bytes=self._installed.expert_bytes if moving is None else moving.expert_bytes,
            peak_memory_bytes=peak,
            peak_memory_kind=kind,
            seconds=self._seconds,
            buffer=self._installed.buffer,
            rebalancing=None if moving is None else moving.report,
            notes=self._installed.notes,
            dense=None if self._dense is None else self._dense.snapshot(),
        )

    @property
    def placement(self) -> Placement | None:
        """Which rank holds which expert now; None where this process has them all."""
        return None if self._rebalancer is None else self._rebalancer.placement

    def rebalance(self, placement: Placement | None = None) -> RebalanceReport:
        """Move experts between the ranks that share them; outputs stay what they are. Every rank calls it.

        To ``placement``, or, where that is None, the few moves that the recent loads of all ranks ask for. It is done
        between two calls of the model, never within one. The result is what this took; ``report().rebalancing`` is
        the sum.

        Raises ParallelError on every rank when they are given different placements, PlacementError for one of another
        model or number of ranks, OptionError where this process has all experts.
        """
        if self._rebalancer is None or not self.active:
            raise OptionError("placement", "this process has all experts of the model: there is nowhere to move them")
        return self._rebalancer.by_loads() if placement is None else self._rebalancer.to(placement)

    def reset(self) -> None:
        """Set all counters to zero."""
        self._seconds = 0.0
        for layer in self._installed.layers:
            layer.counters.reset()
        if self._dense is not None:
            self._dense.reset()
        if self._device().type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device())

    def undo(self) -> None:
        """Make the model exactly what it was: forwards, signatures, parameters' storage. A second call does nothing.

        A profile that the options ask for is written before.
        """
        if self._profiler is not None and self._profiler.is_attached:
            atexit.unregister(self.write_profile)
            self.write_profile()
            self._profiler.detach()
        self._installed.patches.undo()

    def finish_call(self, seconds: float) -> None:
        """Note the wall time of a generate call, and write the report and the trace where the options ask for them."""
        self._seconds = seconds
        if self._profiler is not None and self._profiler.current is not None:
            self._profiler.current.seconds += seconds
        if self.options.report is not None:
            write_report(self.report(), own_file(self.options.report, self.number))
        if self.options.trace is not None and self._recorder is not None:
            write_trace(self._recorder.trace(), own_file(self.options.trace, self.number))

    def record(self, *, choices_limit: int = 0) -> TraceRecorder:
        """A recorder of what the layers route from now on; its ``trace()`` is what it saw so far.

        With ``choices_limit``, so many choices of single tokens are kept too, besides counts (2 bytes each).
        """
        counters = [layer.counters for layer in self._installed.layers]
        layers = [TraceLayer(one.name, one.phase, one.num_experts) for one in counters]
        recorder = TraceRecorder(layers, choices_limit=choices_limit)
        for layer in self._installed.layers:
            layer.observe(recorder)
        return recorder

    def profiler(self) -> Profiler:
        """A profiler for this model, to be attached while something is to be looked at."""
        return profiler_for(self._model, self._installed.layers)

    def profile_of(self, profiler: Profiler) -> Profile:
        """What ``profiler`` saw, with what there is to say of the model."""
        installed = self._installed
        weights = weights_of(self._model, installed.expert_bytes, installed.buffer)
        return Profile.of(profiler, about(self._model, installed.family, self.options.to_dict()), weights)

    @contextmanager
    def profile_input(self, label: str) -> Iterator[None]:
        """What is generated in the ``with`` block is profiled as the input ``label``, to be compared with others.

        OptionError unless the option ``profile`` names a folder.
        """
        if self._profiler is None:
            raise OptionError("profile", "names no folder, so that nothing is profiled: give it one when optimising")
        with self._profiler.input(label):
            yield

    def write_profile(self) -> None:
        """Write the profile of everything so far, if anything ran, to the folder that the option ``profile`` names.

        One of several processes writes to a folder of its own in there, ``rank-1``. The same happens when the model is
        undone, and when the process ends.
        """
        folder = self.options.profile_folder
        if folder is None or self._profiler is None:
            return
        profile = self.profile_of(self._profiler)
        if profile.inputs:
            write_profile(profile, own_folder(folder, self.number))

    @property
    def patches(self) -> Patches:
        """What was changed in the model, to be added to by whoever changes more."""
        return self._installed.patches

    def __repr__(self) -> str:
        state = "active" if self.active else "undone"
        return f"Handle({self._installed.family}, {len(self._installed.layers)} layers, {self.options}, {state})"

    def _device(self) -> torch.device:
        return next(self._model.parameters()).device


class _Generate:
    """``model.generate`` that leaves a report of each call."""

    def __init__(self, model: GenerationMixin, handle: Handle) -> None:
        self._model, self._handle = model, handle
        functools.update_wrapper(self, model.generate)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._handle.reset()
        start = time.perf_counter()
        generate = self._handle.decoding or functools.partial(type(self._model).generate, self._model)
        result = generate(*args, **kwargs)
        self._handle.finish_call(time.perf_counter() - start)
        return result


def optimize(model: nn.Module, **options: Any) -> Handle:
    """Run the Mixture-of-Experts layers of a loaded ``model`` through the engine, in place.

    ``options`` are the fields of :class:`~fairseq_moe_opt.options.MoEOptions`, and ``preset``, the name or file of a
    preset whose values count where no other option says more. The handle is also ``model.moe``. State
    dict, parameter objects and module names stay; ``handle.undo()`` takes everything back. Of a ``PeftModel`` it is
    the model inside that is optimised.

    Raises NoMoELayerError when no known layer is found, OptionError for a wrong option or a model that already is
    optimised, KernelError when the kernel asked for cannot run on the model's device and dtype, CheckpointError for
    int8 experts that were not loaded by :func:`~hf_integration.from_pretrained`.
    """
    wanted = MoEOptions.from_kwargs(**with_preset(options))
    require_ranks(wanted)
    if hasattr(model, "get_base_model"):
        model = cast(nn.Module, model.get_base_model())  # type: ignore[operator]
    if isinstance(getattr(model, "moe", None), Handle):
        raise OptionError("model", "this model is already optimised; call model.moe.undo() first to change options")
    if wanted.buffered:
        raise OptionError(
            "expert_memory",
            f"{wanted.expert_memory!r} would save nothing: the experts of this model are in memory already; load it "
            "with hf_integration.from_pretrained(folder, expert_memory=...)",
        )
    return install(model, wanted)


def install(
    model: nn.Module,
    options: MoEOptions,
    buffer: ExpertBuffer | None = None,
    spread: ExpertSpread | None = None,
) -> Handle:
    """``optimize`` with options that are checked, over ``buffer`` where the experts are not in the model.

    With ``spread``, only this rank's experts are its own, and ``generate`` is one work of all ranks.
    """
    family = family_of(model)
    require_scales(model)
    installed = family.install(model, options, buffer, spread)
    decoding: Decoding | None = None
    rebalancer: Rebalancer | None = None
    if spread is not None:
        layers = {layer.counters.name: layer for layer in installed.layers}
        rebalancer = Rebalancer(spread, layers, installed.shares, options.rebalance_every)
    if spread is not None and isinstance(model, GenerationMixin):
        if spread.kind == ALL_REDUCE:
            decoding = SharedDecoding(model, spread.ranks, installed.masks)
        else:
            decoding = SyncedDecoding(model, spread.ranks, installed.masks, rebalancer)
        decoding.install(installed.patches)
    dense = install_dense(model, options, installed.patches)
    install_roomy_caches(model, installed.patches)
    number = own_number(None if spread is None else spread.ranks)
    handle = Handle(model, installed, options, decoding, rebalancer, number, dense)
    if isinstance(model, GenerationMixin):
        installed.patches.set_attribute(model, "generate", _Generate(model, handle))
    installed.patches.set_attribute(model, "moe", handle)
    return handle
