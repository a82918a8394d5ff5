"""The engine: fastft's own forward and backward of a model's layers, so that it chooses what the backward keeps.

A forward of a model of a known family (`fastft.models.spec`) goes straight through these:

    head.py           is the `forward` of the model with head: head and loss together
    backbone.py       is the `forward` of the decoder: embedding, all layers as one function, the final norm
    inputs.py         gathers what stock's loop would hand to its layers, and compares it with that loop once a model
    padding.py        says what an attention mask hides
    packed.py         says where packed documents start
    context.py        makes of that what one forward tells layers of one kind
    stack.py          is the autograd function of all layers
    runs.py           runs layers one after the other, forward and backward
    layer.py          is one decoder layer: forward, backward, and what each policy saves
    variants.py       resolves adapters that are variants of LoRA before a layer, and makes their gradients behind it
    tiles.py          runs its MLP over some rows at a time
    norm.py           is the final norm
    loss.py           is head and cross-entropy, in chunks of labelled rows
    log_probs.py      is head and log-probabilities, of the same rows
    trl_head.py       answers what TRL's trainers ask of the head that they add
    adapters_off.py   turns adapters off and on for a reference, as PEFT does and faster
    last_hidden.py    gives the last hidden states, for values and scores made of them
    precision.py      says which dtype is computed in
    deferred.py       makes what an output holds and training did not compute, when somebody looks
    first_order.py    makes a derivative of a derivative, or of several at once, an error

Where the layers have to be called one by one, or a model has no layer specification:

    forwards.py       is the `forward` of a decoder layer in stock's own loop
    generic.py        finds the parts that run fused by themselves, and is the `forward` of RMSNorms
    linear.py         is a LoRA linear by itself
    logits.py         runs head and loss together in models whose `forward` is their own

What may run fused, and what was read of it:

    support.py        says why a module cannot run fused; whose code it is says `fastft.models.identity`
    parts.py          holds what is read of a layer, and what a forward tells it
    reading.py        keeps what was read of a model's layers
    watch.py          notices cheaply that something changed since
    ledger.py         tells which path each module's last call took, and why

Memory and launches:

    saved.py          holds the intermediates of a layer, by policy
    offload.py        keeps in host memory what waits for its backward
    host_embedding.py keeps the input embedding there
    resident.py       keeps dense copies of quantized weights, and 16-bit ones of fp32 weights
    bank.py           keeps all adapters in one buffer
    optimizer_step.py updates that buffer at once
    clipping.py       clips its gradients at once
    graphs.py         records layers as CUDA graphs, and replays them
    aside.py          asks the device while it works
    streams.py        has the streams beside the one that computes

The model around it:

    patch.py          puts the engine into a Hugging Face model, and takes it out again
    attach.py         puts attributes on a module; copies, replicas and pickles stay what people expect
    state.py          holds what patched modules know
    walks.py          answers what a training loop asks at every step, without a walk through the modules

Placement policies, from most to least memory: `keep` saves every intermediate that the backward reads, `light`
recomputes some norms and activations (bytes, not FLOPs), `mlp` recomputes the gate and up projections too, `full` saves
the layer's input only; `offload_mlp` and `offload` keep what `mlp` and `full` do in host memory.
"""
