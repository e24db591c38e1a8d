"""What one front end records of the demo checkpoint places and warms the same checkpoint in the other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fairseq", reason="fairseq is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from fairseq_moe_opt.build.spread import slot_maps_for
from fairseq_moe_opt.checkpoints import convert
from fairseq_moe_opt.errors import CheckpointError, PlacementError
from fairseq_moe_opt.moe.trace import TraceLayer, read_trace, write_trace
from fairseq_moe_opt.placement import Cluster, Placement, history_of, place, read_placement, write_placement
from hf_integration import from_pretrained
from tests.helpers.fairseq_runs import load

EXAMPLE = Path(__file__).parents[2] / "examples" / "demo" / "model"
LANGUAGES = ("eng_Latn", "fra_Latn", "deu_Latn", "spa_Latn")
IDS = torch.arange(20, 80).view(4, 15)
BUFFERED = {"expert_memory": "50%", "prefetch": "off"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo checkpoint as fairseq has it, with a dictionary for each language."""
    folder = tmp_path_factory.mktemp("demo")
    convert(EXAMPLE, folder / "x.pt", to="fairseq")
    for code in LANGUAGES:
        shutil.copy(folder / "dict.txt", folder / f"dict.{code}.txt")
    return folder


def in_fairseq(folder: Path, **options: str) -> Any:
    """After one forward of the decoder and the encoder."""
    model, _ = load(folder / "x.pt", folder, **{f"moe_{name}": value for name, value in options.items()})
    with torch.no_grad():
        model(IDS, torch.full((4,), 15), IDS)
    return model


def in_transformers(**options: str) -> Any:
    """The same in Transformers."""
    model = from_pretrained(EXAMPLE, dtype="float32", **options)
    with torch.no_grad():
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS), decoder_input_ids=IDS)
    return model


def traced(folder: Path, host: str) -> tuple[Path, tuple[TraceLayer, ...]]:
    """A trace recorded in ``host``, and the layers it has there."""
    path = folder / f"{host}.json"
    if host == "fairseq":
        model = in_fairseq(folder, trace=str(path))
        model.moe._write(None, str(path), model)
    else:
        model = from_pretrained(EXAMPLE, dtype="float32")
        recorder = model.moe.record()
        with torch.no_grad():
            model(input_ids=IDS, attention_mask=torch.ones_like(IDS), decoder_input_ids=IDS)
        write_trace(recorder.trace(), path)
    return path, read_trace(path).layers


def misses(model: Any) -> int:
    return sum(layer.cache.misses for layer in model.moe.report().layers)


def test_a_trace_and_a_placement_of_either_fit_the_other(folder: Path) -> None:
    (fairseq, there), (transformers, here) = traced(folder, "fairseq"), traced(folder, "transformers")
    assert {one.name for one in there}.isdisjoint(one.name for one in here)
    for path, own, others in ((fairseq, there, here), (transformers, here, there)):
        trace = read_trace(path)
        made = place(history_of(trace), Cluster.even(3, 16), fingerprint=trace.fingerprint)
        write_placement(made, folder / "placement.json")
        found = read_placement(folder / "placement.json", num_ranks=3)
        assert list(slot_maps_for(own, 3, found)) == [one.name for one in own]
        maps = slot_maps_for(others, 3, found)
        for one, other in zip(own, others, strict=True):
            assert [sorted(rank) for rank in maps[other.name].by_rank] == [
                sorted(rank) for rank in found.layers[one.name]
            ]
    cold, warm = in_fairseq(folder, **BUFFERED), in_fairseq(folder, **BUFFERED, warm_start=str(transformers))
    assert misses(warm) < misses(cold)
    assert misses(in_transformers(**BUFFERED, warm_start=str(fairseq))) < misses(in_transformers(**BUFFERED))


def test_another_model_is_refused(folder: Path) -> None:
    path, own = traced(folder, "fairseq")
    trace = read_trace(path)
    other = type(trace)((*trace.layers[:3], TraceLayer("decoder.layers.5.moe_layer", "decoder", 16)), ())
    assert other.fingerprint != trace.fingerprint
    write_trace(other, folder / "other.json")
    with pytest.raises(CheckpointError, match="another model"):
        in_transformers(**BUFFERED, warm_start=str(folder / "other.json"))
    slots = {one.name: ((*range(8),), (*range(8, 16),)) for one in other.layers}
    with pytest.raises(PlacementError, match="made for the model"):
        slot_maps_for(own, 2, Placement(slots, 16, 2, "contiguous", other.fingerprint))
