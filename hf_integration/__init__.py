"""Transformers side: ``optimize``, ``from_pretrained``, and the translation pipeline that Transformers 5 dropped.

Importing this package registers the translation task, fairseq's language models and the tokenizers of converted
checkpoints with Transformers; ``unregister()`` takes the task out again.
"""

from fairseq_moe_opt.environment import check_torchaudio

check_torchaudio()  # a broken one makes every model import of Transformers fail with a long trace

from hf_integration.expert_parallel import ExpertParallel  # noqa: E402
from hf_integration.fairseq_lm import FairseqMoELMConfig, FairseqMoELMForCausalLM, FairseqMoELMModel  # noqa: E402
from hf_integration.lm_tokenization import MoELanguageModelTokenizer  # noqa: E402
from hf_integration.loading import from_pretrained  # noqa: E402
from hf_integration.optimize import Handle, optimize  # noqa: E402
from hf_integration.pipelines import TranslationPipeline, pipeline, register, unregister  # noqa: E402
from hf_integration.synced import generate_batches  # noqa: E402
from hf_integration.tokenization import MoETranslationTokenizer  # noqa: E402

register()

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
    "register",
    "unregister",
]
