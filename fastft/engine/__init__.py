"""The engine: one decoder layer is one `autograd.Function`, so fastft chooses what the backward keeps.

    layer.py     the decoder layer: forward, backward, and what each policy saves
    loss.py      head and cross-entropy together, in chunks of labelled rows
    norm.py      the final norm
    patch.py     puts the engine into a Hugging Face model, and takes it out again
    ledger.py    which path each module runs, and why where it is not the fused one

Placement policies, from most to least memory: `keep` saves every intermediate, `light` recomputes norms and
activations (bytes, not FLOPs), `mlp` recomputes the gate and up projections too, `full` saves the layer's input only.
"""
