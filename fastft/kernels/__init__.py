"""The operations of the backends, one folder each.

`<op>/reference.py` is plain PyTorch: the truth, and the `eager` backend on every device.  `<op>/triton.py`
has the same names, signatures and rounding as fused kernels.  Signatures: docs/design.md, "Operations of
a backend".  Nothing here imports Triton until a `triton.py` is imported.

Letters in names: T tokens, D model width, F feed-forward width, H heads, d head size, S rows of the
rotary tables, N labelled rows, V vocabulary.
"""
