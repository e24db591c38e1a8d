"""One name for a layer in Transformers and in fairseq: traces of one front end speak of the other's model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fairseq_moe_opt.errors import CheckpointError
from fairseq_moe_opt.moe.trace import Trace, TraceLayer, TraceVisit, check_trace, portable_name

TRANSFORMERS = tuple(
    TraceLayer(f"model.{stack}.layers.{i}.ffn", stack, 16) for stack in ("encoder", "decoder") for i in (1, 3)
)
FAIRSEQ = tuple(
    TraceLayer(f"{stack}.layers.{i}.moe_layer", stack, 16) for stack in ("encoder", "decoder") for i in (1, 3)
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.encoder.layers.1.ffn", "encoder.layers.1"),
        ("encoder.layers.1.moe_layer", "encoder.layers.1"),
        ("decoder.layers.11.ffn", "decoder.layers.11"),
        ("my_encoder.layers.1.ffn", "my_encoder.layers.1.ffn"),
        ("model.layers.3.mlp", "model.layers.3.mlp"),
        ("layer", "layer"),
    ],
)
def test_a_layer_is_called_by_its_place(name: str, expected: str) -> None:
    assert portable_name(name) == expected


def test_a_model_has_one_fingerprint_and_another_one_another() -> None:
    one, other = Trace(TRANSFORMERS, ()), Trace(FAIRSEQ, ())
    assert one.fingerprint == other.fingerprint
    check_trace(one, FAIRSEQ, "t")
    for layers in (
        FAIRSEQ[:3],
        (*FAIRSEQ[:3], replace(FAIRSEQ[3], num_experts=8)),
        (*FAIRSEQ[:3], replace(FAIRSEQ[3], name="decoder.layers.5.moe_layer")),
        FAIRSEQ[::-1],
    ):
        with pytest.raises(CheckpointError, match="another model"):
            check_trace(one, layers, "t")


def test_a_trace_takes_the_names_of_the_model_it_is_for() -> None:
    trace = Trace(TRANSFORMERS, (TraceVisit(TRANSFORMERS[2].name, (1, 5), 3, (2, 4)),))
    named = trace.named_as(FAIRSEQ)
    assert named.layers == FAIRSEQ
    assert named.visits == (TraceVisit("decoder.layers.1.moe_layer", (1, 5), 3, (2, 4)),)
    assert named.named_as(TRANSFORMERS) == trace
