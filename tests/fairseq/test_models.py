"""Building models under fairseq's names: dense ones stay fairseq's own, sparse ones follow every argument."""

from __future__ import annotations

import copy
from argparse import Namespace
from typing import Any

import pytest
import torch

pytest.importorskip("fairseq", reason="fairseq is not installed")

from fairseq import options
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY, build_model
from fairseq.models.transformer.transformer_legacy import TransformerModel
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig
from fairseq.modules.checkpoint_activations import unwrap_checkpoint
from fairseq.tasks.fairseq_task import FairseqTask
from omegaconf import OmegaConf

import fairseq_moe_opt
from fairseq_moe_opt.errors import OptionError
from fairseq_moe_opt.models._arguments import read_batch_sizes
from fairseq_moe_opt.models._losses import collect_gate_losses
from fairseq_moe_opt.models._plan import SparsePlan
from fairseq_moe_opt.models._registry import LanguageModelConfig
from fairseq_moe_opt.options import MoEOptions
from tests.helpers.compare import relative_difference

fairseq_moe_opt.register_fairseq()

D, F, E = 16, 32, 4


class Task(FairseqTask):
    """A task with a small joined dictionary and nothing else."""

    def __init__(self) -> None:
        self.dictionary = Dictionary()
        for number in range(20):
            self.dictionary.add_symbol(f"w{number}")

    @property
    def source_dictionary(self) -> Dictionary:
        return self.dictionary

    @property
    def target_dictionary(self) -> Dictionary:
        return self.dictionary


def translation_arguments(**changes: Any) -> Namespace:
    """A 2 + 2 layer model, dense unless ``changes`` say otherwise."""
    values: dict[str, Any] = {"_name": "transformer", "share_all_embeddings": True, "dropout": 0.0}
    for side in ("encoder", "decoder"):
        values |= {f"{side}_layers": 2, f"{side}_embed_dim": D, f"{side}_ffn_embed_dim": F}
        values |= {f"{side}_attention_heads": 2, f"{side}_normalize_before": True}
    args = Namespace(**(values | changes))
    ARCH_CONFIG_REGISTRY["transformer"](args)
    return args


def sparse(**changes: Any) -> Namespace:
    """The same with experts in every second layer."""
    return translation_arguments(moe_freq=2, moe_expert_count=E, moe_second_expert_policy="all", **changes)


def build(args: Namespace, seed: int = 3) -> Any:
    torch.manual_seed(seed)
    return build_model(args, Task()).eval()


def tokens(batch: int = 3, length: int = 5) -> torch.Tensor:
    return torch.randint(4, 24, (batch, length), generator=torch.Generator().manual_seed(1))


def run(model: Any) -> torch.Tensor:
    source = tokens()
    with torch.no_grad():
        logits: torch.Tensor = model(source, torch.full((3,), 5), source)[0]
    return logits


@pytest.mark.parametrize("name", ["transformer", "transformer_tiny", "transformer_wmt_en_de_big"])
def test_a_dense_translation_model_is_fairseqs_own(name: str) -> None:
    args = translation_arguments(arch=name, _name=name)
    model = build(copy.deepcopy(args))
    assert type(model) is TransformerModel
    torch.manual_seed(3)
    stock = TransformerModel.build_model(args, Task()).eval()
    assert list(model.state_dict()) == list(stock.state_dict())
    assert torch.equal(run(model), run(stock))
    assert not hasattr(model, "moe")


def test_models_derived_by_others_are_left_alone() -> None:
    """Only entries of exactly fairseq's classes are replaced."""
    assert ARCH_MODEL_REGISTRY["bart_large"].__module__.startswith("fairseq.")
    assert ARCH_MODEL_REGISTRY["transformer_align"].__module__.startswith("fairseq.")


def language_model_cfg(name: str = "transformer_lm", **changes: Any) -> Any:
    cfg = OmegaConf.structured(TransformerLanguageModelConfig)
    values = {"decoder_layers": 2, "decoder_embed_dim": D, "decoder_input_dim": D, "decoder_output_dim": D}
    values |= {"decoder_ffn_embed_dim": F, "decoder_attention_heads": 2, "dropout": 0.0}
    values |= {"add_bos_token": False, "tokens_per_sample": 16, "max_target_positions": 16, "tpu": False}
    plain = {key: OmegaConf.to_container(cfg, resolve=False)[key] for key in cfg}
    return OmegaConf.create({**plain, "_name": name, **values, **changes})


@pytest.mark.parametrize("name", ["transformer_lm", "transformer_lm_gpt"])
def test_a_dense_language_model_is_fairseqs_own(name: str) -> None:
    torch.manual_seed(3)
    model = build_model(language_model_cfg(name), Task(), from_checkpoint=True)
    assert type(model) is TransformerLanguageModel


@pytest.mark.parametrize("name", ["transformer_lm", "transformer_lm_gpt", "transformer_lm_moe"])
def test_a_language_models_arguments_survive_its_configuration(name: str) -> None:
    """fairseq deletes what the registered configuration does not declare."""
    cfg = language_model_cfg(name, moe_freq=2, moe_expert_count=E, moe_top1_expert=True, moe_gating="static")
    model = build_model(cfg, Task(), from_checkpoint=True)
    (block,) = model.moe.blocks
    assert block.spec.layer.name == "decoder.layers.1.moe_layer"
    assert block.spec.layer.router.top_k == 1
    assert model.moe.options.gating == "static"


def test_names_in_the_state_dict_are_the_branches_own() -> None:
    names = set(build(sparse()).state_dict())
    layer = "encoder.layers.1."
    assert {f"{layer}moe_layer.gate.wg.weight", f"{layer}moe_layer.experts.{E - 1}.fc2.bias"} <= names
    assert not [name for name in names if name.startswith((f"{layer}fc", f"{layer}activation"))]
    assert "encoder.layers.0.fc1.weight" in names


def test_conditional_routing_has_the_experts_twice_and_the_dense_network() -> None:
    model = build(sparse(moe_cmr=True))
    state = model.state_dict()
    for name in ("moe_layer.experts.0.fc1.weight", "moe_layer.gate.wg.weight"):
        first, second = (state[f"decoder.layers.1.{prefix}{name}"] for prefix in ("", "cmr_layer."))
        assert first.data_ptr() == second.data_ptr()
    assert {f"decoder.layers.1.{name}" for name in ("fc1.weight", "fc2.bias", "cmr_layer.gate.wg.bias")} <= set(state)
    state["decoder.layers.1.cmr_layer.lang_idx"] = torch.zeros(3)
    build(sparse(moe_cmr=True), seed=4).load_state_dict(state, strict=True)


@pytest.mark.parametrize(
    ("arguments", "layers"),
    [
        ({"moe_freq": 1}, ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1"]),
        ({"encoder_moe_freq": 2}, ["encoder.layers.1"]),
        ({"decoder_moe_freq": 1}, ["decoder.layers.0", "decoder.layers.1"]),
        ({"moe_freq": 1, "encoder_moe_freq": 2}, ["encoder.layers.1", "decoder.layers.0", "decoder.layers.1"]),
    ],
)
def test_which_layers_are_sparse(arguments: dict[str, int], layers: list[str]) -> None:
    model = build(translation_arguments(moe_expert_count=E, moe_second_expert_policy="all", **arguments))
    assert [block.spec.layer.name.removesuffix(".moe_layer") for block in model.moe.blocks] == layers


def test_alternate_widths_make_dense_layers() -> None:
    model = build(sparse(alternate_ffn_embed_dim=48, alternate_decoder_ffn_embed_dim=40, scale_fc=True))
    state = model.state_dict()
    assert state["encoder.layers.1.fc1.weight"].shape == (48, D)
    assert state["decoder.layers.1.fc2.weight"].shape == (D, 40)
    assert state["decoder.layers.1.ffn_layernorm.weight"].shape == (40,)
    assert not [name for name in state if "moe_layer" in name]
    assert run(model).shape == (3, 5, 24)


@pytest.mark.parametrize("conditional", [False, True])
def test_final_output_masking_scales_what_the_layer_adds(conditional: bool) -> None:
    """Pre-LN, experts in the last decoder layer alone: state after = state before it + 0.6 of its network."""
    states = []
    for masking in (0.0, 0.4):
        model = build(
            translation_arguments(
                decoder_moe_freq=2,
                moe_expert_count=E,
                moe_second_expert_policy="all",
                moe_fom=masking,
                moe_cmr=conditional,
            )
        )
        added = []
        model.decoder.layers[1].final_layer_norm.register_forward_pre_hook(
            lambda _m, args, kept=added: kept.append(args[0])
        )
        with torch.no_grad():
            inner = model(tokens(), torch.full((3,), 5), tokens())[1]["inner_states"][-1]
        states.append(inner - added[0])
    assert relative_difference(states[1], 0.6 * states[0]) < 1e-5


def test_normformer_norms_only_where_there_is_a_dense_network() -> None:
    names = set(build(sparse(scale_fc=True, scale_attn=True, scale_resids=True)).state_dict())
    assert "decoder.layers.0.ffn_layernorm.weight" in names
    assert "decoder.layers.1.ffn_layernorm.weight" not in names
    assert {"decoder.layers.1.attn_ln.weight", "decoder.layers.1.w_resid"} <= names


def test_capacity_of_the_maximal_length_grows_with_the_batch() -> None:
    model = build(
        sparse(
            moe_eval_capacity_max_seqlen=True,
            moe_eval_capacity_token_fraction=0.5,
            moe_capacity="checkpoint",
            max_source_positions=8,
            max_target_positions=6,
        )
    )
    run(model)
    capacities = [block.engine.router.capacity.capacity(15, E, 2, training=False) for block in model.moe.blocks]
    assert capacities == [12, 9]


def test_a_copied_model_runs_and_does_not_share_counters() -> None:
    model = build(sparse(moe_cmr=True))
    expected = run(model)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(run(twin), expected)


def test_padding_may_be_kept_from_the_experts() -> None:
    source = tokens()
    source[0, :2] = 1
    for masked, rows in ((True, 13), (False, 15)):
        model = build(sparse(use_moe_pad_mask=masked))
        with torch.no_grad():
            model.encoder(source, torch.tensor([3, 5, 5]))
        report = model.moe.report()
        assert report.layers[0].routed_rows == 2 * rows
        model.moe.reset()
        assert model.moe.report().layers[0].routed_rows == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"moe_gating": "eager"}, "moe_gating"),
        ({"moe_kernel": "loop", "moe_gating": "static"}, "moe_kernel"),
        ({"moe_expert_count": 0}, "moe_expert_count"),
        ({"activation_fn": "tanh"}, "activation_fn"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], named: str) -> None:
    args = sparse()
    vars(args).update(change)
    with pytest.raises(OptionError, match=named):
        build(args)


def test_the_published_sizes() -> None:
    """NLLB-200's experts hold 51.5 billion parameters, the language models' 14.5, 51.5, 206 and 1,099.5."""

    def expert_parameters(layers: int, args: Namespace, side: str) -> float:
        width, ffn = getattr(args, f"{side}_embed_dim"), getattr(args, f"{side}_ffn_embed_dim")
        return layers // args.moe_freq * args.moe_expert_count * (2 * width * ffn + ffn + width) / 1e9

    nllb = Namespace()
    ARCH_CONFIG_REGISTRY["transformer_moe_nllb200_54b"](nllb)
    total = sum(expert_parameters(24, nllb, side) for side in ("encoder", "decoder"))
    assert total == pytest.approx(51.5, abs=0.1)
    for name, billions in (("15b", 14.5), ("52b", 51.5), ("207b", 206.1), ("1_1t", 1099.5)):
        args = Namespace()
        ARCH_CONFIG_REGISTRY[f"transformer_lm_moe_{name}"](args)
        assert expert_parameters(args.decoder_layers, args, "decoder") == pytest.approx(billions, rel=0.01)
        assert args.activation_fn == "gelu"


def test_a_model_runs_as_other_options_say_from_then_on() -> None:
    model = build(sparse())
    dynamic = run(model)
    model.moe.run_as(MoEOptions(gating="static"))
    static = run(model)
    report = model.moe.report()
    assert report.options["gating"] == "static"
    assert [(layer.calls, layer.kernels) for layer in report.layers] == [(1, ("static",))] * 2
    assert relative_difference(static, dynamic) < 1e-5
    model.moe.run_as(MoEOptions())
    assert torch.equal(run(model), dynamic)


def meta_parameters(architecture: str, vocabulary: int, **values: Any) -> tuple[float, float]:
    """Billions of parameters in all and in experts of a preset, built without memory."""
    args = Namespace(arch=architecture, _name=architecture, **values)
    ARCH_CONFIG_REGISTRY[architecture](args)
    task = Task()
    for number in range(vocabulary - len(task.source_dictionary)):
        task.source_dictionary.add_symbol(f"more{number}")
    with torch.device("meta"):
        model = ARCH_MODEL_REGISTRY[architecture].build_model(args, task)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return sum(sizes.values()) / 1e9, sum(size for name, size in sizes.items() if ".experts." in name) / 1e9


def test_nllb_has_54_billion_parameters() -> None:
    """256,206 symbols: pieces, 202 languages, three data tags."""
    total, experts = meta_parameters("transformer_moe_nllb200_54b", 256206)
    assert total == pytest.approx(54.5, abs=0.05)
    assert experts == pytest.approx(51.5, abs=0.1)


def test_normformer_runs_and_takes_gradients() -> None:
    names = ("scale_fc", "scale_attn", "scale_heads", "scale_resids")
    model = build(sparse(**dict.fromkeys(names, True)))
    plain = build(sparse())
    source = tokens()
    logits = model(source, torch.full((3,), 5), source)[0]
    logits.square().mean().backward()
    assert bool(logits.isfinite().all()) and not torch.equal(logits, run(plain))
    kinds = {"attn_ln", "ffn_layernorm", "c_attn", "w_resid"}
    missing = [name for name, one in model.named_parameters() if kinds & set(name.split(".")) and one.grad is None]
    assert not missing
    assert all(any(kind in name for name, _ in model.named_parameters()) for kind in kinds)


@pytest.mark.parametrize("conditional", [False, True])
def test_dropout_of_the_experts_is_applied_once(conditional: bool) -> None:
    """Each of two experts gives 1 and drops it half the time: a quarter is 0. Dropped again, 5/8 would be."""
    model = build(sparse(dropout=0.5, moe_cmr=conditional)).train()
    layer = model.encoder.layers[1]
    assert layer.moe_layer.spec.layer.dropout.output == 0.5
    for network in [*layer.moe_layer.experts, *([layer] if conditional else [])]:
        second = network._modules["fc2"]
        torch.nn.init.zeros_(second.weight)
        torch.nn.init.ones_(second.bias)
    kept = []
    layer.final_layer_norm.register_forward_pre_hook(lambda _m, args: kept.append(args[0]))
    with torch.no_grad():
        hidden = torch.randn(100, 20, D)
        added = layer(hidden, None) - kept[0]
    zeros = float((added.abs() < 1e-5).float().mean())
    # The dense network of conditional routing drops its own half.
    assert zeros == pytest.approx(0.125 if conditional else 0.25, abs=0.02)
    assert float((layer._dropout(torch.ones(1000)) == 0).float().mean()) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("architecture", ["transformer_lm_gpt", "transformer_lm_moe_15b", "transformer"])
@pytest.mark.parametrize(("flags", "expected"), [("--batch-size 4", (4, 4)), ("--max-tokens 64", (0, 0))])
@pytest.mark.parametrize(("more", "validation"), [("", None), ("--batch-size-valid 8", 8)])
def test_batch_sizes_reach_the_layers(
    architecture: str, flags: str, expected: tuple[int, int], more: str, validation: int | None
) -> None:
    task = "translation" if architecture == "transformer" else "language_modeling"
    line = f"data --arch {architecture} --task {task} --moe-freq 2 --moe-expert-count 4 {flags} {more}"
    args = options.parse_args_and_arch(options.get_training_parser(), line.split())
    plan = SparsePlan.of(convert_namespace_to_omegaconf(args).model)
    assert plan is not None
    assert plan.batch_sizes == (expected[0], validation or expected[1])


@pytest.mark.parametrize("changes", [{}, {"moe_cmr": True}, {"moe_top1_expert": True}])
def test_activation_checkpointing_changes_no_gradient(changes: dict[str, Any]) -> None:
    """Neither of the task's loss nor of the gates'."""
    found = []
    for checkpointed in (False, True):
        values = {"checkpoint_activations": checkpointed, "use_moe_pad_mask": True, "moe_eom": 0.2, "dropout": 0.1}
        model = build(sparse(**values, **changes)).train()
        source = tokens()
        source[0, :2] = 1
        torch.manual_seed(4)
        with collect_gate_losses() as losses:
            logits = model(source, torch.tensor([3, 5, 5]), source)[0]
        assert len(losses.balance) == 2 and len(losses.cmr_share) == len(losses.cmr_tokens) == 2 * (
            "moe_cmr" in changes
        )
        loss = logits.square().mean() + sum(losses.balance) + sum(losses.cmr_share)
        loss.backward()
        found.append({name: one.grad for name, one in model.named_parameters()})
    plain, recomputed = found
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert (gradient is None) == (recomputed[name] is None), name
        assert gradient is None or torch.allclose(gradient, recomputed[name], rtol=1e-5, atol=1e-7), name


def test_a_checkpointed_model_is_copied_and_unwrapped() -> None:
    model = build(sparse(checkpoint_activations=True))
    expected = run(model)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(run(twin), expected)
    assert torch.equal(run(unwrap_checkpoint(twin)), expected)


def test_a_configuration_by_itself_fills_no_batch_up() -> None:
    """A dataclass holds fairseq's references to another section as text."""
    assert str(LanguageModelConfig().batch_size).startswith("${")
    assert read_batch_sizes(LanguageModelConfig()) == (0, 0)
