"""RMSNorm, alone and after a residual addition, with its input gradient."""
