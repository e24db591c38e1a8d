"""LoRA adapters of peft on layers that are no experts: the same logits with this runtime as without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

pytest.importorskip("peft", reason="peft is not installed")
import peft

from fairseq_moe_opt.errors import MoEError, OptionError
from hf_integration import from_pretrained, optimize
from hf_integration.families import family_of
from tests.helpers.compare import assert_close_relative
from tests.helpers.language_models import greedy, language_model, logits_of

FAMILIES = ("Mixtral", "GptOss")


def adapted(model: Any) -> Any:
    """``model`` in a PeftModel with adapters on two of attention's projections, which change its logits."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return wrapped


def expected(family: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits without adapters, logits with them, and the tokens of greedy decoding, all by Transformers."""
    plain = logits_of(language_model(family))
    model = adapted(language_model(family))
    return plain, logits_of(model), greedy(model)


def check(model: Any, logits: Tensor, tokens: Tensor) -> None:
    assert_close_relative(logits_of(model), logits)
    assert torch.equal(greedy(model), tokens)


def forwards_of(model: nn.Module) -> set[str]:
    """Modules whose forward is not their class's."""
    return {name for name, module in model.named_modules() if "forward" in vars(module)}


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_over_an_optimised_model(family: str) -> None:
    plain, logits, tokens = expected(family)
    assert float((plain - logits).abs().max()) > 1e-2
    model = language_model(family)
    handle = optimize(model)
    wrapped = adapted(model)
    check(wrapped, logits, tokens)
    assert all(layer.routed_rows > 0 for layer in handle.report().layers)
    with wrapped.disable_adapter():
        assert_close_relative(logits_of(wrapped), plain)
    handle.undo()
    check(wrapped, logits, tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_optimising_a_model_with_adapters(family: str) -> None:
    _, logits, tokens = expected(family)
    wrapped = adapted(language_model(family))
    before = forwards_of(wrapped)
    handle = optimize(wrapped)
    assert handle is wrapped.moe
    check(wrapped, logits, tokens)
    report = handle.report()  # of the last call of generate
    assert report.seconds > 0
    assert [layer.name for layer in report.layers] == [f"model.layers.{layer}.mlp.experts" for layer in (0, 1)]
    assert all(layer.routed_rows > 0 for layer in report.layers)
    with pytest.raises(OptionError, match="already optimised"):
        optimize(wrapped)
    handle.undo()
    assert forwards_of(wrapped) == before
    assert getattr(wrapped, "moe", None) is None and "generate" not in vars(wrapped.get_base_model())
    check(wrapped, logits, tokens)


@pytest.mark.parametrize("buffered", [False, True], ids=["resident", "buffered"])
def test_adapters_of_a_folder_over_a_loaded_model(buffered: bool, tmp_path: Path) -> None:
    _, logits, tokens = expected("Mixtral")
    language_model("Mixtral").save_pretrained(tmp_path / "model")
    adapted(language_model("Mixtral")).save_pretrained(tmp_path / "adapter")
    model = from_pretrained(tmp_path / "model", **({"expert_memory": "25%"} if buffered else {}))
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    check(wrapped, logits, tokens)
    assert any(".experts." in name for name in wrapped.state_dict()) is not buffered
    wrapped.save_pretrained(tmp_path / "again")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    if buffered:
        with pytest.raises(MoEError, match="buffered, so it has no complete state dict"):
            model.state_dict()
    merged = wrapped.merge_and_unload()
    check(merged, logits, tokens)
    assert merged.moe.active
    assert not any("lora" in name for name, _ in merged.named_parameters())
    merged.moe.undo()
    check(merged, logits, tokens)


def test_adapters_are_trained_and_experts_are_not() -> None:
    wrapped = adapted(language_model("Mixtral"))
    ids = torch.arange(3, 15).view(2, 6)
    gradients = []
    for _ in range(2):
        wrapped.zero_grad()
        wrapped(input_ids=ids, labels=ids).loss.backward()
        found = {name: one.grad.clone() for name, one in wrapped.named_parameters() if one.grad is not None}
        assert found and all("lora_" in name for name in found)
        gradients.append(found)
        if len(gradients) == 1:
            optimize(wrapped)
    for name, gradient in gradients[0].items():
        assert_close_relative(gradients[1][name], gradient, 1e-4)


def test_the_family_is_seen_through_the_wrapper() -> None:
    assert family_of(adapted(language_model("Mixtral"))).NAME == "experts-interface"
