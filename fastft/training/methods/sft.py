"""Supervised fine-tuning, by fastft's own loop: the method of `fastft train` where none is named."""

from fastft.training.methods.method import Method, MethodSettings

METHOD = Method(
    name="sft", trainer="", arguments="", rows=None, examples=None, settings=MethodSettings,
    measures=("loss",), learning_rate=2e-4,
)  # fmt: skip
