"""Transformers side: ``optimize``, ``from_pretrained``, and the translation pipeline that Transformers 5 dropped.

Importing this package registers the translation task, fairseq's language models, the tokenizers of converted
checkpoints and the experts implementation ``moe_opt`` with Transformers; ``unregister()`` takes the task out again.
"""

from fairseq_moe_opt.environment import check_torchaudio, check_transformers

check_transformers()
check_torchaudio()  # a broken one makes every model import of Transformers fail with a long trace

from hf_integration.expert_parallel import ExpertParallel  # noqa: E402
from hf_integration.experts_function import register_experts_function  # noqa: E402
from hf_integration.fairseq_lm import FairseqMoELMConfig, FairseqMoELMForCausalLM, FairseqMoELMModel  # noqa: E402
from hf_integration.lm_tokenization import MoELanguageModelTokenizer  # noqa: E402
from hf_integration.loading import from_pretrained  # noqa: E402
from hf_integration.optimize import Handle, optimize  # noqa: E402
from hf_integration.pipelines import TranslationPipeline, pipeline, register, unregister  # noqa: E402
from hf_integration.placed_experts import place_experts, register_ep_implementation  # noqa: E402
from hf_integration.synced import generate_batches  # noqa: E402
from hf_integration.tokenization import MoETranslationTokenizer  # noqa: E402

register()
register_experts_function()
register_ep_implementation()

__all__ = [
    "ExpertParallel",
    "FairseqMoELMConfig",
    "FairseqMoELMForCausalLM",
    "FairseqMoELMModel",
    "Handle",
    "MoELanguageModelTokenizer",
    "MoETranslationTokenizer",
    "TranslationPipeline",
    "from_pretrained",
    "generate_batches",
    "optimize",
    "pipeline",
    "place_experts",
    "register",
    "unregister",
]
