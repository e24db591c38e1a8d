"""fairseq's side of the tasks: fairseq imports every file here whose name does not begin with ``_``."""
