"""Greedy and beam search over the branches' checkpoints in stock fairseq, token for token."""

from __future__ import annotations

import pytest

pytest.importorskip("fairseq", reason="fairseq is not installed")

from tests.helpers.fairseq_runs import BATCHES, MODELS, arrays, generate, golden_names, load_golden, record

SCORE_TOLERANCE = 1e-4
CASES = [
    (model, name)
    for model in MODELS
    for name in golden_names(model)
    if record(model, name).get("generation") and not record(model, name)["half"]
]


@pytest.mark.parametrize("beam", [1, 5])
@pytest.mark.parametrize(("model_name", "name"), CASES)
def test_tokens_and_scores_are_the_branches_own(model_name: str, name: str, beam: int) -> None:
    model, task = load_golden(model_name, name)
    for batch in BATCHES:
        expected = record(model_name, name)["generation"][f"{batch}.beam{beam}"]
        found = generate(model, task, arrays(model_name, name), batch, beam)
        assert len(found) == len(expected)
        for hypotheses, golden in zip(found, expected, strict=True):
            kept = hypotheses[: len(golden)]
            assert [list(map(int, each["tokens"])) for each in kept] == [each["tokens"] for each in golden]
            for each, other in zip(kept, golden, strict=True):
                assert float(each["score"]) == pytest.approx(other["score"], abs=SCORE_TOLERANCE)
