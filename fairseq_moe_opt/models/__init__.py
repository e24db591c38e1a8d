"""fairseq's side of the models: fairseq imports every file here whose name does not begin with ``_``."""
