"""bench: measures, and writes `fastft.record.Record`s.

    scenarios.py    what is measured: model, data, batch, steps, arms
    arms.py         the ways to train that are compared
    weights.py      adapter and frozen tensors: saved, loaded, compared
    parity.py       the gate before any timing: an arm's gradients against an fp32 reference
    messages.py     what runner and worker say to each other
    worker.py       one gate, one repetition or one series of trials, in its own process
    runner.py       gates first, then repetitions interleaved over the arms; records on disk after each
    provenance.py   which commit and command made a record

and, to judge the tuner, the measures against memory, the real loop and the peers (`python -m bench`):

    grid.py         every configuration of a run
    rig.py          one loaded model on which one after another is measured
    trial_file.py   the file that the trials are appended to
    trials.py       a series of them in a worker, begun, gone on with, started again
    results.py      what such a series came to, as one file
    turns.py        configurations measured again and again, there and back
    regret.py       tuned plans against the best of the grid, under memory caps
    repeats.py      the same run tuned several times
    measures.py     each measure against memory, alone and all together
    loop.py         `fastft train` against a plain loop
    peers.py        Unsloth, stock PEFT and fastft on the same work
    peer_loop.py    the plain loop of one of them, run by its own interpreter
    trl_run.py      one of TRL's trainers on random work, stock or fastft, as one line (a command of its own)
    flags.py        the command line's flags
    tables.py       what it prints
    __main__.py     the command line of these

Nothing here is public API; `fastft bench`, `fastft demo` and `python -m bench` are the way in.
"""
