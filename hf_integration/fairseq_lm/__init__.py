"""fairseq's sparse language models in Transformers, which has no model of their kind.

``moe-opt convert`` makes their folders. Importing ``hf_integration`` registers them with ``AutoConfig``,
``AutoModel`` and ``AutoModelForCausalLM``.
"""

from hf_integration.fairseq_lm.configuration import FairseqMoELMConfig
from hf_integration.fairseq_lm.modeling import FairseqMoELMForCausalLM, FairseqMoELMModel, register_models

__all__ = ["FairseqMoELMConfig", "FairseqMoELMForCausalLM", "FairseqMoELMModel", "register_models"]
