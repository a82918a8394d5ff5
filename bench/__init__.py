"""bench: measures, and writes `fastft.record.Record`s.

    scenarios.py    what is measured: model, data, batch, steps, arms
    arms.py         the ways to train that are compared
    weights.py      adapter and frozen tensors: saved, loaded, compared
    parity.py       the gate before any timing: an arm's gradients against an fp32 reference
    messages.py     what runner and worker say to each other
    worker.py       one gate or one repetition, in its own process
    runner.py       gates first, then repetitions interleaved over the arms; records on disk after each
    provenance.py   which commit and command made a record

Nothing here is public API; `fastft bench` and `fastft demo` are the way in.
"""
