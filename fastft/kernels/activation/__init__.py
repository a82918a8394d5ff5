"""The MLP's activation, gated (`act(gate) · up`, SwiGLU and GeGLU) or not, with its gradients."""

from typing import Literal

ActivationKind = Literal["silu", "gelu", "gelu_tanh"]
"""`silu`: x·sigmoid(x).  `gelu`: x·Φ(x), exact.  `gelu_tanh`: its tanh approximation (Hendrycks and Gimpel,
arXiv:1606.08415)."""
