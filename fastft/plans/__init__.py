"""Plans that come with fastft, what became of them on this machine, and what a saved adapter says of its plan.

The `*.json` files in this folder are part of the wheel.  Each is a plan that `fastft tune` found on the GPU that it
names, byte for byte as `fastft plan export` wrote it; none is written by hand.  A maintainer adds one by

    fastft tune llama-3-8b                      # on the GPU; any flags that belong to the key
    fastft plan export ID plan.json
    python -m fastft.plans plan.json            # checks it, and puts it here under its name

and runs it again after a change of the kernels: a shipped plan is then still followed (see `shipped.MAY_DIFFER`), but
without its launches of kernels.
"""
