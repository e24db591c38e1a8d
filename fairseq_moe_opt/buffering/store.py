"""The engine's expert store over a pool: a layer asks for experts and gets them in waves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fairseq_moe_opt.buffering.host_compute import HostCompute
from fairseq_moe_opt.buffering.pool import ExpertPool, PooledLayer
from fairseq_moe_opt.buffering.prefetch import Prefetcher
from fairseq_moe_opt.buffering.visit import Visit
from fairseq_moe_opt.errors import MoEError
from fairseq_moe_opt.moe.types import ExpertWave


class BufferedExperts:
    """The experts of one layer, in the slots that it shares with other layers.

    Waves are split by expert, never within one, and what is resident comes first; a wave's weights are overwritten
    after the next one was asked for. May be used by several threads at once.

    Args:
        pool: of all layers.
        layer: this one.
        prefetcher: what fetches for the next layer, if anything does.
        host_compute: what has missing experts computed in main memory, if anything does.
    """

    def __init__(
        self,
        pool: ExpertPool,
        layer: PooledLayer,
        prefetcher: Prefetcher | None = None,
        host_compute: HostCompute | None = None,
    ) -> None:
        self.pool, self.layer = pool, layer
        self._prefetcher, self._host_compute = prefetcher, host_compute
        self._is_shared = False

    @property
    def num_experts(self) -> int:
        """E, or E_local."""
        return self.layer.num_experts

    @property
    def dtype(self) -> torch.dtype:
        """Of the experts' matrices in their slots."""
        return self.layer.layout.expert_dtype

    @property
    def trainable(self) -> bool:
        """False: weights are only ever read."""
        return False

    @property
    def transient(self) -> bool:
        """True: slots are used again."""
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of all experts, were they all in slots."""
        return self.layer.num_experts * self.layer.layout.expert_bytes

    def waves(
        self, needed: Sequence[int], rows: int | None = None, counts: Sequence[int] | None = None
    ) -> Iterator[ExpertWave]:
        """Give every expert of ``needed`` exactly once; CheckpointError when one cannot be fetched."""
        if not needed:
            return
        prefetcher = self._prefetcher
        # The pool knows logical experts, in ascending order; a layer asks by the place in what it holds.
        held = self.layer.held
        places = sorted(needed, key=held.__getitem__)
        place_of = {held[place]: place for place in places}
        rows_of = None if counts is None else dict(zip(needed, counts, strict=True))
        sizes = None if rows_of is None else [rows_of[place] for place in places]
        for wave in Visit(self.pool, self.layer, tuple(place_of), self._host_compute, sizes).waves():
            if prefetcher is not None:  # once, when what this forward misses is on its way
                prefetcher.after(self.layer, rows)
                prefetcher = None
            yield replace(wave, experts=tuple(place_of[expert] for expert in wave.experts))

    def hold(self, held: Sequence[int]) -> None:
        """Have the logical experts ``held`` from now on, in this order; each is read when it is first asked for.

        No forward may be running. Raises MoEError where a copy of the model uses the same slots.
        """
        if self._is_shared:
            raise MoEError(
                f"{self.layer.name}: a copy of this model uses the same buffered experts, and would find others in "
                "their place: move experts before the model is copied, or load it a second time"
            )
        self.pool.hold(self.layer, held)

    def look_ahead(self, tokens: Tensor, rows: int) -> None:
        """Tell what (T, D) ``tokens`` the layer was given, and how many rows it routed: predicts the next layer."""
        if self._prefetcher is not None:
            self._prefetcher.look_ahead(self.layer, tokens, rows)

    def __deepcopy__(self, memo: dict[int, object]) -> BufferedExperts:
        # Experts never change, so a copied model shares them, and their pool.
        self._is_shared = True
        return self
