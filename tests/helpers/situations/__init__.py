"""Random situations in which a patched model must do what the stock model does.

`situation(seed)` draws one, `run` runs it with both models and gives what differs, `smallest` leaves out what does not
matter for that.  `python tools/situations.py` runs many.
"""

from situations.axes import Change, Situation, situation
from situations.comparing import Result, run, smallest

__all__ = ["Change", "Result", "Situation", "run", "situation", "smallest"]
