"""fairseq's language models in Transformers: the golden's own logits and tokens, and the engine in every disguise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_integration
from fairseq_moe_opt.checkpoints import convert
from fairseq_moe_opt.errors import CheckpointError, InputError, OptionError
from hf_integration.continuation import continue_lines
from tests.helpers.fairseq_language_models import (
    GOLDEN,
    SMALL,
    converted_golden,
    language_model_folder,
    tiny_language_model,
)
from tests.helpers.goldens import FAIRSEQ_GOLDENS, read_arrays, read_json

PAD, EOS = 1, 2
PROMPTS = ["the file", "", "a window is"]


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted_golden(tmp_path_factory.mktemp("golden") / "model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return language_model_folder(tmp_path_factory.mktemp("tiny") / "model")


def logits_of(model: Any, ids: Tensor) -> Tensor:
    mask = (ids != PAD).long()
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, attention_mask=mask).logits
    return logits.masked_fill(mask.unsqueeze(-1) == 0, 0.0)


def padded_batch() -> Tensor:
    ids = torch.randint(4, 60, (3, 7), generator=torch.Generator().manual_seed(2))
    ids[1, :3] = ids[2, :5] = PAD
    return ids


@pytest.mark.parametrize("name", ["cap1.00", "eos_cap1.00"])
def test_logits_are_those_of_fairseqs_branch(golden: Path, name: str) -> None:
    recorded = dict(read_arrays(FAIRSEQ_GOLDENS / GOLDEN / "tf" / f"{name}.npz"))
    for model in (hf_integration.from_pretrained(golden), AutoModelForCausalLM.from_pretrained(golden)):
        for batch in ("b0", "b1"):
            ids = recorded[f"{batch}.src_tokens"]
            wanted = recorded[f"{batch}.logits"].masked_fill((ids == PAD).unsqueeze(-1), 0.0)
            torch.testing.assert_close(logits_of(model, ids), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["cap0.05", "cap0.25"])
def test_capacity_of_the_checkpoint_drops_what_the_branch_drops(golden: Path, tmp_path: Path, name: str) -> None:
    recorded = dict(read_arrays(FAIRSEQ_GOLDENS / GOLDEN / "tf" / f"{name}.npz"))
    overrides = read_json(FAIRSEQ_GOLDENS / GOLDEN / "tf" / f"{name}.json")["overrides"]
    model = AutoModelForCausalLM.from_pretrained(golden)
    model.config.eval_capacity_token_fraction = overrides["moe_eval_capacity_token_fraction"]
    handle = hf_integration.optimize(model, capacity="checkpoint")
    for batch in ("b0", "b1"):
        ids = recorded[f"{batch}.src_tokens"]
        torch.testing.assert_close(logits_of(model, ids), recorded[f"{batch}.logits"], rtol=0, atol=1e-5)
    assert sum(layer.dropped_rows for layer in handle.report().layers) > 0


@pytest.mark.parametrize("name", ["cap1.00", "eos_cap1.00"])
def test_greedy_tokens_are_those_of_fairseqs_generator(golden: Path, name: str) -> None:
    recorded = dict(read_arrays(FAIRSEQ_GOLDENS / GOLDEN / "tf" / f"{name}.npz"))
    generated = read_json(FAIRSEQ_GOLDENS / GOLDEN / "tf" / f"{name}.json")["generation"]
    model = hf_integration.from_pretrained(golden)
    compared = 0
    for batch in ("b0", "b1"):
        prompt = recorded[f"{batch}.src_tokens"][:, :4]
        prefix = prompt[:, 1:] if int(prompt[0, 0]) == EOS else prompt  # as the goldens were made
        prompt = torch.cat([torch.full((len(prompt), 1), EOS), prefix], dim=1)
        for row, hypotheses in zip(prompt, generated[f"{batch}.beam1"], strict=True):
            ids = row[row != PAD].unsqueeze(0)  # fairseq forces no token where the prompt is padding
            (output,) = model.generate(ids, attention_mask=torch.ones_like(ids), max_length=21, do_sample=False)
            tokens = hypotheses[0]["tokens"]
            whole = tokens if len(tokens) < 20 else tokens[:-1]  # the end that the longest length forces
            assert output[1 : len(whole) + 1].tolist() == whole
            compared += len(whole)
    assert compared > 40


VARIANTS: dict[str, dict[str, Any]] = {
    "pre-norm": {},
    "post-norm, learned positions": {"pre_norm": False, "learned_positions": True, "layernorm_embedding": True},
    "other widths": {"embedding_size": 12, "output_size": 12, "scale_embedding": False},
    "top-1, masked": {"top1": True, "expert_masking": 0.2, "final_masking": 0.1},
    "no positions, untied": {"use_positions": False, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_engine_computes_what_the_plain_model_does(name: str, tmp_path: Path) -> None:
    model, ids = tiny_language_model(**VARIANTS[name]), padded_batch()
    plain = logits_of(model, ids)
    alone = logits_of(model, ids[1:2, 3:])
    torch.testing.assert_close(plain[1:2, 3:], alone, rtol=0, atol=1e-5)
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long(), "max_new_tokens": 6, "do_sample": False}
    tokens, beams = model.generate(**inputs), model.generate(**inputs, num_beams=3)
    without_cache = model.generate(**inputs, use_cache=False)
    assert torch.equal(tokens, without_cache)
    model.save_pretrained(tmp_path / "model")
    handle = hf_integration.optimize(model)
    buffered = hf_integration.from_pretrained(tmp_path / "model", expert_memory="40%")
    for one in (model, buffered):
        torch.testing.assert_close(logits_of(one, ids), plain, rtol=0, atol=1e-5)
        assert torch.equal(one.generate(**inputs), tokens)
        assert torch.equal(one.generate(**inputs, num_beams=3), beams)
    (layer,) = buffered.moe.report().layers
    assert layer.cache is not None and 0 < len(layer.cache.resident) < 8
    handle.undo()
    assert torch.equal(logits_of(model, ids), plain)


def test_padding_goes_to_no_expert() -> None:
    model, ids = tiny_language_model(), padded_batch()
    handle = hf_integration.optimize(model)
    logits_of(model, ids)
    (layer,) = handle.report().layers
    assert layer.routed_rows == 2 * int((ids != PAD).sum())


def test_both_attention_implementations_agree_and_gradients_flow() -> None:
    model, ids = tiny_language_model(), padded_batch()
    with torch.no_grad():
        sdpa = model(ids).logits
        model.set_attn_implementation("eager")
        eager = model(ids, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(eager.logits, sdpa, rtol=0, atol=1e-5)
    assert len(eager.hidden_states) == 3 and eager.attentions[0].shape == (3, 2, 7, 7)
    model.train()
    model(ids, labels=ids).loss.backward()
    assert all(one.grad is not None for one in model.decoder.layers[1].moe_layer.gate.parameters())


def test_a_text_beyond_the_table_of_positions_is_refused() -> None:
    model = tiny_language_model(learned_positions=True)
    with pytest.raises(InputError, match="more tokens than the 40 positions"):
        model(torch.full((1, 41), 7))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("moe_cmr", True, "moe_cmr"), ("activation_fn", "linear", "'linear'"), ("base_layers", 2, "base_layers")],
)
def test_what_cannot_be_expressed_is_refused_by_name(option: str, value: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint_last.pt"
    convert(FAIRSEQ_GOLDENS / GOLDEN, path, to="fairseq")
    content = torch.load(path, weights_only=False)
    content["cfg"]["model"][option] = value
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_folder_holds_every_tensor_bit_for_bit_and_int8_experts_load(golden: Path, tmp_path: Path) -> None:
    single = converted_golden(tmp_path / "shards", shard_bytes=100_000)
    assert len(list(single.glob("*.safetensors"))) > 5
    one, other = AutoModelForCausalLM.from_pretrained(golden), AutoModelForCausalLM.from_pretrained(single)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    ids = torch.randint(4, 60, (2, 8), generator=torch.Generator().manual_seed(1))
    converted = hf_integration.from_pretrained(converted_golden(tmp_path / "int8", expert_dtype="int8"))
    now = hf_integration.from_pretrained(golden, expert_dtype="int8")
    assert torch.equal(logits_of(converted, ids), logits_of(now, ids))


def test_the_tokenizer_gives_fairseqs_ids(folder: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", reason="sentencepiece is not installed")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(SMALL / "spm.model"))
    words = [line.rsplit(" ", 1)[0] for line in (SMALL / "dict.txt").read_text(encoding="utf-8").splitlines()]
    known = {word: number for number, word in enumerate(words, start=4)}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("Save the file.", "  odd   spaces ", "a </s> is text", "été"):
        pieces = processor.encode(text, out_type=str)
        assert tokenizer(text)["input_ids"] == [EOS, *(known.get(piece, 3) for piece in pieces)]
    ids = tokenizer("Save the file.")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Save the file."
    assert tokenizer.decode(ids[2:]) == " the file."


def test_a_dictionary_of_numbers_is_refused(tmp_path: Path) -> None:
    numbers = tmp_path / "dict.txt"
    numbers.write_text("".join(f"{number} 1\n" for number in range(60)), encoding="utf-8")
    with pytest.raises(CheckpointError, match="GPT-2's byte-level BPE"):
        converted_golden(tmp_path / "out", spm=SMALL / "spm.model", dictionary=numbers)


def test_transformers_pipeline_continues_text(folder: Path) -> None:
    pipe = transformers.pipeline("text-generation", model=str(folder))
    model, tokenizer = hf_integration.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    (one,) = continue_lines(model, tokenizer, ["the file"], generation={"max_new_tokens": 5})
    (found,) = pipe("the file", max_new_tokens=5, do_sample=False)
    assert found["generated_text"] == "the file" + one.text != "the file"


def test_lines_are_continued_as_they_are_alone(folder: Path) -> None:
    model, tokenizer = hf_integration.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    how: dict[str, Any] = {"generation": {"max_new_tokens": 6}}
    together = list(continue_lines(model, tokenizer, PROMPTS, **how))
    assert [one.prompt for one in together] == PROMPTS
    alone = [next(continue_lines(model, tokenizer, [prompt], **how)) for prompt in PROMPTS]
    assert together == alone


def test_drawn_tokens_depend_on_the_seed_and_the_line_alone(folder: Path) -> None:
    model, tokenizer = hf_integration.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    how: dict[str, Any] = {"generation": {"max_new_tokens": 6, "do_sample": True}, "batch_size": 1}
    first = list(continue_lines(model, tokenizer, PROMPTS, seed=1, **how))
    assert list(continue_lines(model, tokenizer, PROMPTS, seed=1, **how)) == first
    assert list(continue_lines(model, tokenizer, PROMPTS[1:], seed=1, lines_before=1, **how)) == first[1:]
    assert list(continue_lines(model, tokenizer, PROMPTS, seed=2, **how)) != first


def test_a_long_prompt_keeps_its_end_and_room_is_asked_for(folder: Path) -> None:
    model, tokenizer = hf_integration.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    cuts: list[Any] = []
    how = {"generation": {"max_new_tokens": 10}, "on_truncated": cuts.append}
    (one,) = continue_lines(model, tokenizer, ["x", "the file is " * 20][1:], **how)
    assert one.text and cuts[0].limit == 30 and cuts[0].line == 1
    with pytest.raises(OptionError, match="leave no room for a prompt: this model has 40 positions"):
        continue_lines(model, tokenizer, PROMPTS, generation={"max_new_tokens": 40})


def test_config_json_says_what_the_checkpoint_says(golden: Path) -> None:
    config = json.loads((golden / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "fairseq_moe_lm" and config["bos_token_id"] == EOS
    assert (config["num_experts"], config["moe_freq"], config["activation_function"]) == (8, 2, "gelu")
    assert config["max_position_embeddings"] == 32 and config["tie_word_embeddings"] is True
