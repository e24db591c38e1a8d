"""The paper's tables and figures, measured on this machine: ``paper | here | ratio``, each with its setting.

One file a section (``sections/``): what the paper says as a table of values, a function that measures, one that draws.
What is scaled down, and what never is, stands in ``configs/reproduce.yaml``.
"""

from fairseq_moe_opt.reproduction.config import Plan, read_plan
from fairseq_moe_opt.reproduction.context import Context
from fairseq_moe_opt.reproduction.results import Line, PaperValue, Section
from fairseq_moe_opt.reproduction.runner import reproduce
from fairseq_moe_opt.reproduction.sections import section_names

__all__ = ["Context", "Line", "PaperValue", "Plan", "Section", "read_plan", "reproduce", "section_names"]
