"""Fetching experts before they are asked for: which layer comes next, and what it will want."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fairseq_moe_opt.buffering.pool import ExpertPool, PooledLayer

LAYERS, PREVIOUS, ROUTER, OFF = "layers", "previous", "router", "off"
PREDICTORS = (LAYERS, PREVIOUS, ROUTER)
"""What predicts a layer's experts where not all are wanted: nothing, its last forward, or its router, applied to the
tokens of the layer before."""

Predict = Callable[[Tensor], Sequence[int]]
"""(T, D) tokens to the experts that a layer's router would choose for them, ascending."""


class RouterGuess:
    """What a layer's router would choose for tokens that are not yet its own: (T, D) to ids, ascending.

    ``gate`` gives (T, E) logits, of which the ``top_k`` largest a token count. Costs one host synchronisation.
    """

    def __init__(self, gate: Callable[[Tensor], Tensor], top_k: int) -> None:
        self._gate, self._top_k = gate, top_k

    def __call__(self, tokens: Tensor) -> tuple[int, ...]:
        with torch.inference_mode():
            chosen = self._gate(tokens).topk(self._top_k, dim=1).indices
            return tuple(torch.unique(chosen).tolist())


class Prefetcher:
    """Knows the order of a model's layers and has experts of the next one fetched while this one's result is used.

    Args:
        pool: of all layers.
        predictor: ``layers``, ``previous`` or ``router``.
    """

    def __init__(self, pool: ExpertPool, predictor: str) -> None:
        self._pool = pool
        self._next = next_layers(tuple(pool.layers.values()))
        self.predictor = predictor
        self._routers: dict[str, Predict] = {}

    def set_router(self, layer: str, predict: Predict) -> None:
        """Tell how ``layer`` routes."""
        self._routers[layer] = predict

    def after(self, layer: PooledLayer, rows: int | None) -> None:
        """A forward of ``layer`` with so many routed rows has its experts: see to those of the next layer."""
        following = self._next[layer.name]
        if wants_all(layer, following, rows):
            with self._pool.changed:
                self._pool.fetch_ahead(following, following.held, certain=True)
        elif self.predictor == PREVIOUS:
            with self._pool.changed:
                self._pool.fetch_ahead(following, sorted(self._pool.last_needed(following)), certain=False)

    def look_ahead(self, layer: PooledLayer, tokens: Tensor, rows: int) -> None:
        """The same with the router of the next layer, on the (T, D) tokens that ``layer`` was given."""
        following = self._next[layer.name]
        predict = self._routers.get(following.name)
        if predict is None or following.phase != layer.phase or wants_all(layer, following, rows):
            return
        predicted = predict(tokens)
        with self._pool.changed:
            self._pool.fetch_ahead(following, predicted, certain=False)


def wants_all(layer: PooledLayer, following: PooledLayer, rows: int | None) -> bool:
    """Whether the next layer is going to want nearly all of its experts, as in the encoder: 2 E rows or more."""
    return rows is not None and following.phase == layer.phase and rows >= 2 * following.num_experts


def next_layers(layers: Sequence[PooledLayer]) -> Mapping[str, PooledLayer]:
    """The layer that comes after each; after a decoder's last layer its first one, for the next token."""
    after: dict[str, PooledLayer] = {}
    for layer, following in zip(layers, [*layers[1:], layers[0]], strict=True):
        after[layer.name] = following
    decoder = [layer for layer in layers if layer.phase == "decoder"]
    if decoder:
        after[decoder[-1].name] = decoder[0]
    return after
