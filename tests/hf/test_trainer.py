"""A model trained with Transformers' own Trainer: its sharded checkpoint loads and gives the same logits."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset
from transformers import NllbMoeForConditionalGeneration, Seq2SeqTrainer, Seq2SeqTrainingArguments

from fairseq_moe_opt.checkpoints import convert, open_index, read_tensor
from hf_integration import from_pretrained, optimize, pipeline
from tests.helpers.compare import relative_difference
from tests.helpers.translation_models import LANGUAGES, TEXTS, nllb_moe, nllb_tokenizer

pytest.importorskip("accelerate")

TOLERANCE = 1e-6


class Sentences(Dataset[dict[str, torch.Tensor]]):
    """Twelve random sentences of six tokens."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        source, target = torch.randint(4, 33, (2, 6), generator=generator)
        return {"input_ids": source, "attention_mask": torch.ones_like(source), "labels": target}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[NllbMoeForConditionalGeneration, Path]:
    """Three steps of training through this project's layers, and the folder that the Trainer saved, in shards."""
    model = nllb_moe()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimize(model)
    folder = tmp_path_factory.mktemp("trainer")
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        seed=1,
    )
    trainer = Seq2SeqTrainer(model=model, args=arguments, train_dataset=Sentences(), processing_class=nllb_tokenizer())
    trainer.train()
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert {name.split(".experts.expert_")[1].split(".")[0] for name in moved if ".experts." in name} == set("01234567")
    assert any(name.endswith("router.classifier.weight") for name in moved)
    model.eval()
    # The Trainer hands no shard size on; this is how it would shard a model that is larger than one shard.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "save_pretrained", partial(model.save_pretrained, max_shard_size="60kB"))
        trainer.save_model(str(folder / "model"))
    return model, folder / "model"


def logits(model: NllbMoeForConditionalGeneration) -> torch.Tensor:
    tokens = torch.stack([Sentences()[index]["input_ids"] for index in range(3)])
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=tokens, decoder_input_ids=tokens).logits
    return result


def test_the_folder_is_sharded(trained: tuple[NllbMoeForConditionalGeneration, Path]) -> None:
    assert len(list(trained[1].glob("model-*.safetensors"))) > 3
    assert {"model.safetensors.index.json", "training_args.bin", "tokenizer.json"} <= {
        path.name for path in trained[1].iterdir()
    }


def test_it_loads_with_from_pretrained(trained: tuple[NllbMoeForConditionalGeneration, Path]) -> None:
    assert relative_difference(logits(from_pretrained(trained[1])), logits(trained[0])) <= TOLERANCE


def test_it_loads_with_pipeline(trained: tuple[NllbMoeForConditionalGeneration, Path]) -> None:
    model, folder = trained
    translator = pipeline("translation", model=str(folder), **LANGUAGES)
    assert relative_difference(logits(translator.model), logits(model)) <= TOLERANCE
    assert all(isinstance(result["translation_text"], str) for result in translator(TEXTS, max_length=8))


def test_it_converts_to_fairseq_and_back(trained: tuple[NllbMoeForConditionalGeneration, Path], tmp_path: Path) -> None:
    convert(trained[1], tmp_path / "x.pt", to="fairseq", ranks=2)
    convert(tmp_path / "x.pt", tmp_path / "hf")
    one, other = open_index(trained[1]), open_index(tmp_path / "hf")
    assert one.keys() == other.keys()
    assert all(torch.equal(read_tensor(one[name]), read_tensor(other[name])) for name in one)
