"""Make ``tests/data/hf_goldens``: what Transformers 4.57.1 says of random NLLB-MoE models.

The 4.x line computes NLLB-MoE right; 4.57.1 cannot share an environment with 5.x, so it lives in a side
folder that is put before everything else on ``sys.path``; torch and numpy come from the environment
itself::

    pip install --target SIDE --no-deps transformers==4.57.1 'huggingface-hub>=0.34,<1' \
        'tokenizers>=0.22,<=0.23.0' safetensors requests urllib3 charset-normalizer idna certifi \
        regex pyyaml filelock packaging tqdm fsspec
    OMP_NUM_THREADS=1 python tests/goldens/make_hf_goldens.py SIDE tests/data/hf_goldens

For each model of ``MODELS`` a folder is written: ``model/`` as ``save_pretrained`` writes it (float16
numbers, to be loaded and computed in float32), ``goldens.npz`` (arrays named ``inputs.<side>.<name>`` and
``<setting>.<side>.<name>``) and ``goldens.json`` (settings, versions, and the checks below).

Weights come from numpy's ``RandomState``, whose stream is frozen, so a second run writes the same
numbers. The models are wide awake: embeddings, router and experts are scaled so that (nearly) every
expert is used and greedy decoding does not fall into one token. A setting whose float64 run differs from
its float32 run in any token, or by more than 1e-5, is too close to a tie to be a golden, and the script
stops.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

VERSION = "4.57.1"
MODELS: dict[str, dict[str, int]] = {
    "experts8": {"num_experts": 8, "d_model": 64, "ffn_dim": 128, "seed": 3},
    "experts16": {"num_experts": 16, "d_model": 32, "ffn_dim": 64, "seed": 11},
}
VOCAB = 128
FORCED_BOS = 5
NEW_TOKENS = 20
SOURCE_LENGTHS = (11, 5, 8, 2, 9)
TARGET_LENGTHS = (6, 8, 3, 5, 7)
PAD, EOS = 1, 2


def settings() -> dict[str, dict[str, Any]]:
    """Name to the configuration entries it changes; fraction 1 drops nothing, so order is moot there."""
    found: dict[str, dict[str, Any]] = {}
    for pads in (False, True):
        suffix = "_padrouted" if pads else ""
        routed = {"router_ignore_padding_tokens": pads}
        found[f"cap1.00{suffix}"] = {"moe_eval_capacity_token_fraction": 1.0, **routed}
        for bpr in (False, True):
            for before in (False, True):
                name = "cap0.25" + "_bpr" * bpr + "_normbefore" * before + suffix
                found[name] = {
                    "moe_eval_capacity_token_fraction": 0.25,
                    "batch_prioritized_routing": bpr,
                    "normalize_router_prob_before_dropping": before,
                    **routed,
                }
    return found


def scale_of(name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of a weight: generous where a healthy network has structure."""
    if "embed" in name or "shared" in name or "lm_head" in name:
        return 0.25
    if "router.classifier" in name:
        return 1.0 / shape[-1] ** 0.5
    if ".experts." in name:
        return 2.0 / shape[-1] ** 0.5
    if ".ffn." in name:
        return 1.2 / shape[-1] ** 0.5
    # Weak attention: tokens stay different from each other, so that they want different experts.
    return 0.8 / shape[-1] ** 0.5


def fill(model: Any, seed: int) -> None:
    """Give ``model`` its weights, rounded to float16 so that the stored ones are these."""
    import numpy as np
    import torch

    stream = np.random.RandomState(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = stream.standard_normal(tuple(parameter.shape))
            if name == "model.decoder.layer_norm.weight":
                # Random signs: with tied embeddings, a positive gain would make every token predict itself.
                noise = np.sign(noise)
            elif "layer_norm" in name or name.endswith("bias"):
                noise = 0.1 * noise + (1.0 if name.endswith("layer_norm.weight") else 0.0)
            else:
                noise = noise * scale_of(name, tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(noise.astype(np.float16).astype(np.float32)))


def batch(seed: int, side: str) -> dict[str, Any]:
    """Five sentences, source (5, 11) padded on ``side``, target (5, 8) padded on the right; int64."""
    import numpy as np
    import torch

    stream = np.random.RandomState(seed)

    def rows(lengths: tuple[int, ...], start: int | None, end: int | None, where: str) -> Any:
        out = np.full((len(lengths), max(lengths)), PAD, dtype=np.int64)
        for row, length in enumerate(lengths):
            tokens = stream.randint(8, VOCAB, size=length)
            if start is not None:
                tokens[0] = start
            if end is not None:
                tokens[-1] = end
            out[row, slice(None, length) if where == "right" else slice(-length, None)] = tokens
        return torch.from_numpy(out)

    source = rows(SOURCE_LENGTHS, 4, EOS, side)
    target = rows(TARGET_LENGTHS, EOS, None, "right")
    return {
        "input_ids": source,
        "attention_mask": (source != PAD).long(),
        "decoder_input_ids": target,
        "decoder_attention_mask": (target != PAD).long(),
    }


def run(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Everything recorded for one setting and batch, as torch tensors."""
    import torch

    source = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        out = model(**inputs, output_router_logits=True)
        common = {"forced_bos_token_id": FORCED_BOS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
        greedy = model.generate(**source, num_beams=1, **common)
        beam = model.generate(**source, num_beams=4, **common)
    found = {"logits": out.logits, "encoder": out.encoder_last_hidden_state, "greedy": greedy, "beam4": beam}
    for side in ("encoder", "decoder"):
        states = [state for state in getattr(out, f"{side}_router_logits") if state is not None]
        for number, (combine, _) in enumerate(states):
            # (tokens, experts) final combine weights, 0 where dropped; layers 1 and 3 are the sparse ones.
            found[f"combine.{side}.{2 * number + 1}"] = combine
    return found


def check_steady(name: str, single: dict[str, Any], double: dict[str, Any], inputs: dict[str, Any]) -> float:
    """Largest relative difference of the float32 and float64 runs at real positions; stops on a near tie."""
    import torch

    worst = 0.0
    for key, mask in (("logits", "decoder_attention_mask"), ("encoder", "attention_mask")):
        real = inputs[mask].bool()
        one, two = single[key][real].double(), double[key][real]
        worst = max(worst, float((one - two).abs().max() / two.abs().max()))
    tokens = all(torch.equal(single[key], double[key]) for key in ("greedy", "beam4"))
    if worst > 1e-5 or not tokens:
        sys.exit(f"{name}: float32 and float64 differ by {worst:.1e}, tokens equal: {tokens}; choose another seed")
    return worst


def build(options: dict[str, int], changes: dict[str, Any]) -> Any:
    """The random model under one setting, in the default dtype."""
    from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration

    config = NllbMoeConfig(
        vocab_size=VOCAB,
        d_model=options["d_model"],
        encoder_layers=4,
        decoder_layers=4,
        encoder_ffn_dim=options["ffn_dim"],
        decoder_ffn_dim=options["ffn_dim"],
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        num_experts=options["num_experts"],
        max_position_embeddings=64,
        moe_token_dropout=0.2,
        **changes,
    )
    model = NllbMoeForConditionalGeneration(config).eval()
    fill(model, options["seed"])
    return model


def spread(result: dict[str, Any]) -> dict[str, int]:
    """Experts that served at least one token, by layer."""
    return {key: int(value.bool().any(0).sum()) for key, value in result.items() if key.startswith("combine.")}


def make(name: str, options: dict[str, int], target: Path) -> None:
    """Write one model's folder."""
    import numpy as np
    import torch
    import transformers

    batches = {side: batch(options["seed"] + 100, side) for side in ("left", "right")}
    arrays = {f"inputs.{side}.{key}": value for side, inputs in batches.items() for key, value in inputs.items()}
    notes: dict[str, Any] = {}
    for setting, changes in settings().items():
        for side, inputs in batches.items():
            single = run(build(options, changes), inputs)
            # The default must be float64 too, or the masks of 4.57.1 overflow.
            torch.set_default_dtype(torch.float64)
            double = run(build(options, changes), inputs)
            torch.set_default_dtype(torch.float32)
            worst = check_steady(f"{name} {setting} {side}", single, double, inputs)
            notes[f"{setting}.{side}"] = {"float64_difference": worst, "experts_used": spread(single)}
            # Padding positions mean nothing: zero. Combine weights of one side are enough, and half the size.
            single["logits"] *= inputs["decoder_attention_mask"].unsqueeze(-1)
            single["encoder"] *= inputs["attention_mask"].unsqueeze(-1)
            kept = {key: value for key, value in single.items() if side == "left" or "combine" not in key}
            arrays.update({f"{setting}.{side}.{key}": value for key, value in kept.items()})
    folder = target / name
    folder.mkdir(parents=True, exist_ok=True)
    build(options, {}).half().save_pretrained(folder / "model")
    np.savez_compressed(folder / "goldens.npz", **{key: value.numpy() for key, value in arrays.items()})
    facts = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "forced_bos_token_id": FORCED_BOS,
        "max_new_tokens": NEW_TOKENS,
        "settings": settings(),
        "checks": notes,
    }
    (folder / "goldens.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n")


def main() -> None:
    """Read the two folders from the command line and write all models."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("side", type=Path, help="folder with transformers 4.57.1")
    parser.add_argument("target", type=Path, help="folder to write")
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.side.resolve()))
    import torch
    import transformers

    if transformers.__version__ != VERSION:
        sys.exit(f"{arguments.side} holds transformers {transformers.__version__}, not {VERSION}")
    torch.set_num_threads(1)
    for name, options in MODELS.items():
        make(name, options, arguments.target)


if __name__ == "__main__":
    main()
