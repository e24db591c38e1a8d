"""Recorded traces: from files, and from the demo checkpoint over its three languages."""

from __future__ import annotations

import gzip
from pathlib import Path

from _placement_results import Trace

from fairseq_moe_opt.moe.trace import read_trace
from fairseq_moe_opt.placement import history_of, read_history

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo"
SOURCE, TARGETS = "eng_Latn", ("fra_Latn", "deu_Latn", "spa_Latn")
BATCH_SIZE = 8
"""Sentences computed together."""


def traces_of_file(path: Path) -> list[Trace]:
    """One trace for a ``.npz`` file of counts; of a trace file one a phase."""
    if path.suffix == ".npz":
        return [Trace(path.name, read_history(path))]
    trace = read_trace(path)
    phases = dict.fromkeys(layer.phase for layer in trace.layers)
    return [Trace(f"{path.name}-{phase}", history_of(trace, phase)) for phase in phases]


def demo_traces(lines: int) -> list[Trace]:
    """Greedy translations of the first ``lines`` demo sentences: the encoder's trace, and the decoder's by language.

    Which experts are correlated is not known of a real model, so none is marked so.
    """
    from hf_integration import from_pretrained
    from hf_integration.translate import load_tokenizer, quiet_host, translate_lines

    quiet_host()
    model, tokenizer = from_pretrained(DEMO / "model", dtype="float32"), load_tokenizer(DEMO / "model")
    found: list[Trace] = []
    for target in TARGETS:
        recorder = model.moe.record()
        text = _sentences(target)[:lines]
        for _ in translate_lines(
            model, tokenizer, text, SOURCE, target, batch_size=BATCH_SIZE, generation={"num_beams": 1}
        ):
            pass
        trace = recorder.trace()
        if not found:  # the encoder reads the same English sentences each time
            found.append(Trace("demo-encoder", history_of(trace, "encoder")))
        found.append(Trace(f"demo-{target[:3]}-decoder", history_of(trace, "decoder")))
    return found


def _sentences(target: str) -> list[str]:
    with gzip.open(DEMO / "demo.tsv.gz", "rt", encoding="utf-8") as stream:
        rows = [line.rstrip("\n").split("\t") for line in stream]
    return [row[1] for row in rows if row[0] == target]
