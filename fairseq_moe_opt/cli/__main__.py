"""``python -m fairseq_moe_opt.cli``: the command where its script is not on the path."""

import sys

from fairseq_moe_opt.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
