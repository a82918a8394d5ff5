"""How much memory and work a training step needs, and what to give up so that it fits: arithmetic, without torch.

layer.py    what one decoder layer saves, and what its backward needs
model.py    a whole step's peak
work.py     how long a step takes in comparison with others
fitting.py  the choices that fit a cap and do the least work
"""
