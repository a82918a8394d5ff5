"""Attention through the library's kernels; `library.ATTENTION` is the table of implementations."""
