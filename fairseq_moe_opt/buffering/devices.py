"""Getting an expert's weights into a slot: at once on a CPU, on a stream of its own on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from fairseq_moe_opt.moe.protocols import ExpertSource
from fairseq_moe_opt.moe.types import ExpertKey, ExpertRead, ExpertWeights


@dataclass(frozen=True)
class Mark:
    """A point in the work of one stream of a device."""

    stream: int
    event: torch.cuda.Event


class DeviceLink(Protocol):
    """How slots of one device are filled, and how it is known that they may be filled again."""

    def fetch(self, source: ExpertSource, key: ExpertKey, into: ExpertWeights, after: Iterable[Mark]) -> ExpertRead:
        """Fill ``into`` from ``source`` once all of ``after`` have been reached; returns when it is filled."""

    def mark(self) -> Mark | None:
        """A mark behind everything the caller has asked the device to compute; None where that is done by now."""


class CpuLink:
    """Slots in main memory: whoever has finished computing is done with them."""

    def fetch(self, source: ExpertSource, key: ExpertKey, into: ExpertWeights, after: Iterable[Mark]) -> ExpertRead:
        """Read straight into the slot."""
        with torch.no_grad():
            return source.load(key, into)

    def mark(self) -> None:
        """Nothing to wait for."""


class CudaLink:
    """Slots in GPU memory, filled on a stream of each reader's own that waits for events, never for the device.

    The thread that fetches waits for its own stream, so a load that is done has arrived: streams that compute need not
    wait for it. Weights only ever go to the device; they are never copied back.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams = threading.local()

    def fetch(self, source: ExpertSource, key: ExpertKey, into: ExpertWeights, after: Iterable[Mark]) -> ExpertRead:
        """Copy on this thread's stream, behind the events ``after``."""
        stream = self._stream()
        for mark in after:
            stream.wait_event(mark.event)
        with torch.cuda.stream(stream), torch.no_grad():
            read = source.load(key, into)
        stream.synchronize()
        return read

    def mark(self) -> Mark:
        """An event on the stream that is computing."""
        stream, event = torch.cuda.current_stream(self._device), torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        return Mark(stream.cuda_stream, event)

    def _stream(self) -> torch.cuda.Stream:
        stream: torch.cuda.Stream | None = getattr(self._streams, "stream", None)
        if stream is None:
            stream = self._streams.stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return stream


def link_to(device: torch.device) -> DeviceLink:
    """The link for slots on ``device``."""
    return CudaLink(device) if device.type == "cuda" else CpuLink()
