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

from fairseq_moe_opt.build import require_ranks
from fairseq_moe_opt.checkpoints import CheckpointIndex
from fairseq_moe_opt.checkpoints.lazy import LazyStateDict
from fairseq_moe_opt.errors import MoEError, OptionError
from fairseq_moe_opt.models._arguments import IMPLIED_BY
from fairseq_moe_opt.models._block import MoEBlock
from fairseq_moe_opt.models._file_experts import FileExperts, locate
from fairseq_moe_opt.models._profiling import started_profiler, weights_of
from fairseq_moe_opt.models._rebalancing import TurnRebalancing
from fairseq_moe_opt.models._sharing import AgreedKernel, ExpertSharing, current_sharing
from fairseq_moe_opt.models._turns import Turns
from fairseq_moe_opt.moe.report import Report, peak_memory, tokens_by_phase, write_report
from fairseq_moe_opt.moe.trace import TraceLayer, TraceRecorder, write_trace
from fairseq_moe_opt.options import MoEOptions
from fairseq_moe_opt.parallel import own_file, own_folder, own_number
from fairseq_moe_opt.profiling import Profile, Profiler, check_folder, write_profile

FAMILY = "fairseq-transformer"


class ModelHandle:
    """``model.moe``: the options a model runs with, its sparse blocks, and reports of what they did.

    Attributes:
        options: how the runtime was asked to run.
        checkpoint: where each tensor of the checkpoint lies in its files; None before one is loaded by this package.
        sharing: the ranks that the experts are spread over; None where this process has them all.
        rebalancing: what moves experts between these ranks; None where they stay.
    """

    def __init__(self, model: nn.Module, options: MoEOptions, implied_by: str | None = None) -> None:
        self.options = options
        self.checkpoint: CheckpointIndex | None = None
        self.sharing: ExpertSharing | None = None
        self._number: int | None = None
        self._implied_by = implied_by
        self._model = weakref.ref(model)
        self.rebalancing: TurnRebalancing | None = None
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

    def spread_over(self, sharing: ExpertSharing) -> None:
        """Leave to each of the ranks its part of the experts; every rank calls this."""
        self.sharing, blocks = sharing, self.blocks
        spread = sharing.spread(self._layers(), self.options)
        kernel = AgreedKernel(sharing.ranks)
        for block in blocks:
            block.spread_over(spread, kernel)
        if self.options.rebalance_every:
            self.rebalancing = TurnRebalancing(spread, blocks, self.options.rebalance_every)

    def loading(self, tensors: LazyStateDict) -> None:
        """The model's weights are about to be read from ``tensors``: from the same ones on every rank."""
        if self.sharing is not None:
            self.sharing.agree_on(tensors.index)

    def loaded(self, tensors: LazyStateDict) -> None:
        """The model's weights have come from ``tensors``; where experts are buffered, theirs are still there."""
        self.checkpoint = tensors.index
        if not self.options.buffered:
            return
        layers = [locate(block.spec.layer, block.held, tensors) for block in self.blocks]
        self._files = FileExperts(layers, self.options)
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
            rebalancing=None if self.rebalancing is None else self.rebalancing.report,
        )

    def reset(self) -> None:
        """Set all counters to zero."""
        self._start = time.perf_counter()
        for block in self.blocks:
            block.engine.counters.reset()

    def run_as(self, options: MoEOptions) -> None:
        """Run the same weights as ``options`` say from now on; counters start anew.

        Raises OptionError, with nothing changed, when experts that are buffered would have to come into memory, or the
        other way round: that is decided when a model is loaded. So it is which rank holds which expert.
        """
        if self.sharing is not None:
            raise OptionError("moe_*", "ranks that share experts have agreed on them; load the model again")
        for block in self.blocks:
            block.run_as(options)
        if self._files is not None:
            self._files.run_as(options)
        self.options, self._implied_by = options, None
        self.reset()

    def write_at_exit(self) -> None:
        """Write report and trace where the options ask for them when the process ends: a command line is one."""
        if (self.options.report, self.options.trace, self.options.profile_folder) != (None, None, None):
            self._number = own_number(None if self.sharing is None else self.sharing.ranks)
            atexit.register(self._write, self.options.report, self.options.trace, self._model())

    def _layers(self) -> list[TraceLayer]:
        layers = [(block.spec.layer, block.num_experts) for block in self.blocks]
        return [TraceLayer(layer.name, layer.phase, count) for layer, count in layers]

    def _record(self) -> TraceRecorder:
        recorder = TraceRecorder(self._layers())
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
            write_trace(self._recorder.trace(), own_file(trace, self._number))
        # A model whose experts could not be buffered has nothing to report, and has said why.
        with suppress(MoEError):
            if report is not None:
                write_report(self.report(), own_file(report, self._number))
            profile = self.profile()
            if self._profile_folder is not None and profile is not None and profile.inputs:
                write_profile(profile, own_folder(self._profile_folder, self._number))

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # A copied or pickled model has no handle of its own: this one looks after its own model only.
        return type(None), ()


def enter_turns(model: nn.Module, turns: Turns, rebalancing: TurnRebalancing | None) -> None:
    """Let each stack of ``model`` with sparse layers wait for its turn to run; before the first, experts may move."""
    before = [] if rebalancing is None else [rebalancing.run_begins]
    for stack in (getattr(model, name, None) for name in ("encoder", "decoder")):
        layers = [module for module in stack.modules() if isinstance(module, MoEBlock)] if stack is not None else []
        if layers:
            stack.__dict__["take_turn"] = turns.enter(layers, *before)
            before = []


def attach(model: Any, options: MoEOptions, implied_by: str | None) -> Any:
    """Give a freshly built ``model`` its handle and return it."""
    handle = ModelHandle(model, options, implied_by)
    model.__dict__["moe"] = handle
    sharing = current_sharing()
    if sharing is None:
        require_ranks(options)
    else:
        handle.spread_over(sharing)
        if not sharing.same_batch:
            enter_turns(model, sharing.turns, handle.rebalancing)
    handle.write_at_exit()
    return model
