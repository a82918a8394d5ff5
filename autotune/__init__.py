"""Writes plans: search space, probes, memory model, placement solver, search.  Not a public API: `fastft tune` is."""
