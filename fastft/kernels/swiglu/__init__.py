"""SwiGLU, `silu(gate) · up`, with its gradients."""
