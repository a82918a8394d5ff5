"""The engine: fastft's own forward and backward of a model's layers, so that it chooses what the backward keeps.

A model of a known family (`fastft.models.spec`) runs layer by layer:

    forwards.py  what the backbone and its decoder layers call instead of Hugging Face's `forward`
    runtime.py   gathers the layers of one forward into runs, and remembers what it read of them
    parts.py     what is read of a layer, and what a forward tells it
    layer.py     one decoder layer: forward, backward, and what each policy saves
    saved.py     the intermediates of a layer, by policy;  tiles.py  its MLP over some rows at a time
    packed.py    where packed documents start
    runs.py      layers one after the other
    stack.py     a run as one autograd function
    bank.py      all adapters in one buffer;  optimizer_step.py  updates them at once
    graphs.py    CUDA graphs of a run
    offload.py   what waits for its backward in host memory;  host_embedding.py  the embedding there
    resident.py  dense copies of quantized weights
    watch.py     notices cheaply that a layer is no longer what was read

Any other model, and a layer that cannot run as a whole, runs part by part:

    generic.py   finds the parts;  linear.py  a LoRA linear alone;  logits.py  head and loss of any model

Both:

    patch.py     puts the engine into a Hugging Face model, and takes it out again
    walks.py     what a training loop asks a patched model at every step, without a walk through its modules
    state.py     what patched modules know;  aside.py  what the host asks the device while it works
    streams.py   streams beside the one that computes
    support.py   why a module cannot run fused;  ledger.py  which path each module runs
    head.py, loss.py, norm.py   the model with head, head and cross-entropy together, the final norm

Placement policies, from most to least memory: `keep` saves every intermediate that the backward reads, `light`
recomputes some norms and activations (bytes, not FLOPs), `mlp` recomputes the gate and up projections too, `full` saves
the layer's input only; `offload_mlp` and `offload` keep what `mlp` and `full` do in host memory.
"""
