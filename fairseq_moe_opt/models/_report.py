"""What the sparse layers of a fairseq model did."""

from __future__ import annotations

import atexit
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fairseq_moe_opt.checkpoints import CheckpointIndex
from fairseq_moe_opt.checkpoints.lazy import LazyStateDict
from fairseq_moe_opt.errors import MoEError
from fairseq_moe_opt.models._arguments import IMPLIED_BY
from fairseq_moe_opt.models._block import MoEBlock
from fairseq_moe_opt.models._file_experts import FileExperts, locate
from fairseq_moe_opt.models._profiling import started_profiler, weights_of
from fairseq_moe_opt.moe.report import Report, peak_memory, tokens_by_phase, write_report
from fairseq_moe_opt.moe.trace import TraceLayer, TraceRecorder, write_trace
from fairseq_moe_opt.options import MoEOptions
from fairseq_moe_opt.profiling import Profile, Profiler, check_folder, write_profile

FAMILY = "fairseq-transformer"


class ModelHandle:
    """``model.moe``: the options a model runs with, its sparse blocks, and reports of what they did.

    Attributes:
        options: how the runtime was asked to run.
        checkpoint: where each tensor of the checkpoint lies in its files; None before one is loaded by this package.
    """

    def __init__(self, model: nn.Module, options: MoEOptions, implied_by: str | None = None) -> None:
        self.options = options
        self.checkpoint: CheckpointIndex | None = None
        self._implied_by = implied_by
        self._model = weakref.ref(model)
        self._files: FileExperts | None = None
        self._recorder = None if options.trace is None else self._record()
        self._profiler: Profiler | None = None
        self._profile_folder = options.profile_folder
        if options.profile_folder is not None:
            check_folder(Path(options.profile_folder), "--moe-profile")
            self._profiler = started_profiler(model, self.blocks)
        self._start = time.perf_counter()

    @property
    def blocks(self) -> tuple[MoEBlock, ...]:
        """The sparse blocks in the model's order."""
        model = self._model()
        modules: Any = () if model is None else model.modules()
        return tuple(module for module in modules if isinstance(module, MoEBlock))

    def loaded(self, tensors: LazyStateDict) -> None:
        """The model's weights have come from ``tensors``; where experts are buffered, theirs are still there."""
        self.checkpoint = tensors.index
        if not self.options.buffered:
            return
        specs = [(block.spec.layer, block.num_experts) for block in self.blocks]
        self._files = FileExperts([locate(one.name, one.phase, count, tensors) for one, count in specs], self.options)
        for block in self.blocks:
            block.keep_in(self._files)

    def report(self) -> Report:
        """What the layers did since the model was built or the counters were last reset."""
        blocks = self.blocks
        layers = tuple(block.engine.counters.snapshot() for block in blocks)
        weight = blocks[0].gate.wg.weight
        peak, kind = peak_memory(weight.device)
        options = self.options.to_dict()
        if self._implied_by is not None:
            options[IMPLIED_BY.removeprefix("moe_")] = self._implied_by
        return Report(
            family=FAMILY,
            options=options,
            layers=layers,
            tokens=tokens_by_phase(layers),
            expert_bytes=sum(block.expert_bytes for block in blocks),
            peak_memory_bytes=peak,
            peak_memory_kind=kind,
            seconds=time.perf_counter() - self._start,
            buffer=None if self._files is None else self._files.buffer(weight.device, weight.dtype).report,
        )

    def reset(self) -> None:
        """Set all counters to zero."""
        self._start = time.perf_counter()
        for block in self.blocks:
            block.engine.counters.reset()

    def run_as(self, options: MoEOptions) -> None:
        """Run the same weights as ``options`` say from now on; counters start anew.

        Raises OptionError, with nothing changed, when experts that are buffered would have to come into memory, or the
        other way round: that is decided when a model is loaded.
        """
        for block in self.blocks:
            block.run_as(options)
        if self._files is not None:
            self._files.run_as(options)
        self.options, self._implied_by = options, None
        self.reset()

    def write_at_exit(self) -> None:
        """Write report and trace where the options ask for them when the process ends: a command line is one."""
        if (self.options.report, self.options.trace, self.options.profile_folder) != (None, None, None):
            atexit.register(self._write, self.options.report, self.options.trace, self._model())

    def _record(self) -> TraceRecorder:
        layers = [(block.spec.layer, block.num_experts) for block in self.blocks]
        recorder = TraceRecorder([TraceLayer(layer.name, layer.phase, count) for layer, count in layers])
        for block in self.blocks:
            block.observe(recorder)
        return recorder

    def profile(self) -> Profile | None:
        """Everything that ran so far; None unless the option ``profile`` names a folder."""
        if self._profiler is None:
            return None
        model, weight = self._model(), self.blocks[0].gate.wg.weight
        buffer = None if self._files is None else self._files.buffer(weight.device, weight.dtype).report
        experts = sum(block.expert_bytes for block in self.blocks)
        weights = weights_of(model, experts, None if buffer is None else buffer.arena_bytes)
        about = {
            "model": type(model).__name__ if self.checkpoint is None else str(self.checkpoint.path),
            "family": FAMILY,
            "dtype": str(weight.dtype).removeprefix("torch."),
            "device": str(weight.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "options": self.options.to_dict(),
        }
        return Profile.of(self._profiler, about, weights)

    def _write(self, report: str | None, trace: str | None, _model: nn.Module | None) -> None:
        # The last argument keeps the model alive until then.
        if not self.blocks:
            return
        if trace is not None and self._recorder is not None:
            write_trace(self._recorder.trace(), trace)
        # A model whose experts could not be buffered has nothing to report, and has said why.
        with suppress(MoEError):
            if report is not None:
                write_report(self.report(), report)
            profile = self.profile()
            if self._profile_folder is not None and profile is not None and profile.inputs:
                write_profile(profile, Path(self._profile_folder))

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # A copied or pickled model has no handle of its own: this one looks after its own model only.
        return type(None), ()


def attach(model: Any, options: MoEOptions, implied_by: str | None) -> Any:
    """Give a freshly built ``model`` its handle and return it."""
    handle = ModelHandle(model, options, implied_by)
    model.__dict__["moe"] = handle
    handle.write_at_exit()
    return model
