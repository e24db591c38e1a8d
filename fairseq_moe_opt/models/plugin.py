"""Importing this file, as fairseq's ``--user-dir`` does, registers everything; so does ``register_fairseq()``."""

from fairseq_moe_opt.models import _criteria as _criteria
from fairseq_moe_opt.models._command_line import patch_command_lines
from fairseq_moe_opt.models._launching import patch_launching
from fairseq_moe_opt.models._loading import patch_loading
from fairseq_moe_opt.models._registry import register_models
from fairseq_moe_opt.models._repairs import repair
from fairseq_moe_opt.models._saving import patch_saving

repair()
register_models()
patch_loading()
patch_saving()
patch_command_lines()
patch_launching()
