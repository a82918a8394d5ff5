"""What a situation is, and how one is drawn: `situation(seed)`."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from situations.batches import CALLS, LABELS, MASKS, POSITIONS
from situations.models import ADAPTERS, FAMILIES, HEADED, HEADS, SPECIFIED, VIRTUAL_TOKENS, variants_of
from situations.settings import SETTINGS
from situations.sites import INNER
from situations.steps import BACKWARDS, BETWEEN, MODES, OBJECTIVES, READINGS
from situations.surgery import GLOBAL_HOOKS, PARTS_OF

WHENS = ("before", "after", "step")
"""A change is done before the model is patched, after that, or after a first training step."""
ENGINES: dict[str, dict[str, Any]] = {
    "patch_hf_training": {},
    "patch_model": {},
    "keep": {"placement": "keep"},
    "mlp": {"placement": "mlp"},
    "full": {"placement": "full"},
    "small chunks": {"loss_chunk_tokens": 5, "mlp_chunk_tokens": 4, "placement": "mlp"},
}
"""How the model is patched; what is not the first one are arguments of `patch_model`."""
_BY_PLACEMENT = ("keep", "mlp", "full", "small chunks")
CHECKPOINTINGS = ("off", "on", "reentrant", "before the adapter")
DTYPES = ("fp32", "bf16", "fp64")
_MASKS_BY_KIND = ("qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3")
"""Families that take a dictionary of masks."""


class Change(NamedTuple):
    """Something done to the model."""

    what: str
    part: str = ""
    """Of `sites.PARTS`, for a surgery."""
    where: str = "all"
    when: str = "after"

    def __str__(self) -> str:
        about = f" of {self.part}" * bool(self.part) + f" ({self.where})" * (self.where != "all")
        return f"{self.what}{about}, {self.when}"


@dataclass(frozen=True, kw_only=True)
class Situation:
    """One way in which a model is used; every field's default is the usual thing."""

    seed: int
    family: str = "llama"
    attention: str = "sdpa"
    config: str = "plain"
    head: str = "causal"
    adapter: str = "all-linear"
    engine: str = "patch_hf_training"
    mask: str = "none"
    positions: str = "none"
    labels: str = "all"
    inputs: str = "ids"
    call: tuple[str, ...] = ()
    mode: str = "train"
    dtype: str = "fp32"
    checkpointing: str = "off"
    objective: str = "loss"
    backward: str = "once"
    reading: str = "attributes"
    between: str = "sgd"
    steps: int = 1
    changes: tuple[Change, ...] = ()

    def unusual(self) -> list[str]:
        """The fields that are not as usual."""
        return [each.name for each in fields(self) if each.name != "seed" and getattr(self, each.name) != each.default]

    @property
    def rounds(self) -> bool:
        """Whether something is computed in bf16."""
        casts = any("bfloat16" in change.what for change in self.changes)
        return self.dtype == "bf16" or "autocast" in self.mode or casts

    @property
    def size(self) -> int:
        """How many unusual things there are; a change counts more at some layers, or at another time."""
        values = [getattr(self, name) for name in self.unusual()]
        count = sum(len(value) if isinstance(value, tuple) else 1 for value in values)
        return count + sum((change.where != "all") + (change.when != "after") for change in self.changes)

    def simpler(self) -> Iterator["Situation"]:
        """This situation with one thing less that is unusual, in each way."""
        usual = {each.name: each.default for each in fields(self)}
        for name in self.unusual():
            value = getattr(self, name)
            if isinstance(value, tuple):
                yield from (replace(self, **{name: value[:i] + value[i + 1 :]}) for i in range(len(value)))
            else:
                yield replace(self, **{name: usual[name]})
        for index, change in enumerate(self.changes):
            for other in (change._replace(where="all"), change._replace(when="after")):
                if other != change:
                    yield replace(self, changes=(*self.changes[:index], other, *self.changes[index + 1 :]))

    def __str__(self) -> str:
        values = {name: getattr(self, name) for name in self.unusual()}
        shown = {
            name: " + ".join(map(str, value)) if isinstance(value, tuple) else value for name, value in values.items()
        }
        return f"{self.seed}: {self.family}" + "".join(
            f" | {name}: {value}" for name, value in shown.items() if name != "family"
        )


Drawn = dict[str, Any]
"""Fields of a situation."""


def _one_of(field: str, values: Any, usual: str) -> Callable[[random.Random, Drawn], Drawn]:
    others = [value for value in values if value != usual]
    return lambda rng, drawn: {field: rng.choice(others)}


def _config(rng: random.Random, drawn: Drawn) -> Drawn:
    return {"config": rng.choice(variants_of(drawn["family"]))}


def _head(rng: random.Random, drawn: Drawn) -> Drawn:
    return {"head": rng.choice([head for head in HEADS if head != "causal"]), "family": rng.choice(HEADED)}


def _call(rng: random.Random, drawn: Drawn) -> Drawn:
    return {"call": tuple(rng.sample(list(CALLS), rng.choice([1, 1, 2])))}


def _inputs(rng: random.Random, drawn: Drawn) -> Drawn:
    return {"inputs": rng.choice(["embeddings", "embeddings with a gradient"])}


def _dtype(rng: random.Random, drawn: Drawn) -> Drawn:
    return {"dtype": rng.choice(["bf16", "bf16", "fp64"])}


def _mode(rng: random.Random, drawn: Drawn) -> Drawn:
    # A first step in training mode is what an engine remembers.
    return {"mode": rng.choice([mode for mode in MODES if mode != "train"]), "steps": rng.choice([1, 2, 2])}


def _between(rng: random.Random, drawn: Drawn) -> Drawn:
    return {"between": rng.choice(list(BETWEEN)), "steps": rng.choice([2, 2, 3])}


def _when(rng: random.Random, drawn: Drawn) -> tuple[str, Drawn]:
    when = rng.choices(WHENS, [2, 3, 4])[0]
    return when, {"steps": max(drawn.get("steps", 1), 2)} if when == "step" else {}


def _with(drawn: Drawn, change: Change) -> Drawn:
    return {"changes": (*drawn.get("changes", ()), change)}


def _surgery(rng: random.Random, drawn: Drawn) -> Drawn:
    what = rng.choice(list(PARTS_OF))
    part = rng.choice(PARTS_OF[what])
    when, more = _when(rng, drawn)
    where = rng.choice(["all", "all", "first", "last"]) if part in INNER else "all"
    return {**more, **_with(drawn, Change(what, part, where, when))}


def _setting(rng: random.Random, drawn: Drawn) -> Drawn:
    when, more = _when(rng, drawn)
    where = rng.choice(["all", "all", "first", "last"])
    return {**more, **_with(drawn, Change(rng.choice(list(SETTINGS)), "", where, when))}


def _global_hook(rng: random.Random, drawn: Drawn) -> Drawn:
    when, more = _when(rng, drawn)
    return {**more, **_with(drawn, Change(rng.choice(list(GLOBAL_HOOKS)), "", "all", when))}


def _dropout(rng: random.Random, drawn: Drawn) -> Drawn:
    when, more = _when(rng, drawn)
    return {**more, "adapter": "dropout 0.5", **_with(drawn, Change("dropouts to 0", "", "all", when))}


AXES: dict[str, tuple[float, Callable[[random.Random, Drawn], Drawn]]] = {
    "config": (4, _config),
    "head": (0.4, _head),
    "adapter": (4, _one_of("adapter", ADAPTERS, "all-linear")),
    "engine": (2, _one_of("engine", ENGINES, "patch_hf_training")),
    "mask": (5, _one_of("mask", MASKS, "none")),
    "positions": (3.5, _one_of("positions", POSITIONS, "none")),
    "labels": (3, _one_of("labels", LABELS, "all")),
    "inputs": (1.5, _inputs),
    "call": (3.5, _call),
    "mode": (2, _mode),
    "dtype": (1.5, _dtype),
    "checkpointing": (1.5, _one_of("checkpointing", CHECKPOINTINGS, "off")),
    "objective": (1.5, _one_of("objective", OBJECTIVES, "loss")),
    "backward": (1.5, _one_of("backward", BACKWARDS, "once")),
    "reading": (2, _one_of("reading", READINGS, "attributes")),
    "between": (1.5, _between),
    "surgery": (7, _surgery),
    "setting": (8, _setting),
    "global hook": (0.7, _global_hook),
    "dropout": (0.4, _dropout),
}
"""What may be unusual: how often, and how."""
_AGAIN = ("surgery", "setting")
"""What may be unusual twice in one situation."""


def situation(seed: int) -> Situation:
    """The situation of this seed: always the same one, most often with one to three unusual things."""
    rng = random.Random(seed)
    others = [family for family in FAMILIES if family not in SPECIFIED]
    drawn: Drawn = {
        "family": rng.choice(SPECIFIED if rng.random() < 0.92 else others),
        "attention": rng.choice(["sdpa", "sdpa", "eager"]),
        "engine": rng.choice(["patch_hf_training", "patch_model"]),
    }
    left = dict(AXES)
    for _ in range(rng.choices(range(6), [3, 27, 36, 22, 8, 4])[0]):
        name = rng.choices(list(left), [weight for weight, _ in left.values()])[0]
        drawn |= left[name][1](rng, drawn)
        if name not in _AGAIN:
            del left[name]
    return sensible(Situation(seed=seed, **drawn))


def sensible(given: Situation) -> Situation:
    """The situation without what stock refuses, or what makes two stock runs differ."""
    changed: Drawn = {}
    if given.family == "gemma2":
        changed["attention"] = "eager"
    if given.config not in ("plain", *variants_of(given.family)):
        changed["config"] = "plain"
    if given.mask == "dict" and given.family not in _MASKS_BY_KIND:
        changed["mask"] = "4-D bool"
    if given.family not in SPECIFIED or given.head != "causal":
        # Placements are for layers that the engine knows.
        changed |= {"engine": "patch_model"} if given.engine in _BY_PLACEMENT else {}
    if given.head != "causal":
        changed["call"] = tuple(name for name in given.call if not name.startswith("keep"))
        changed |= {"adapter": "all-linear"} if given.adapter in VIRTUAL_TOKENS else {}
    if given.adapter in VIRTUAL_TOKENS:
        changed |= {"positions": "none", "call": (), "inputs": "ids"}
        changed |= {"mask": "right"} if given.mask not in ("none", "ones", "left") else {}
    if any(name.startswith("keep") for name in given.call):
        # Logits and labels must be of the same tokens.
        changed["labels"] = "none"
    if given.adapter == "layers shared" and given.family not in ("llama", "mistral", "granite"):
        # The others look into lists that have an entry a layer.
        changed["adapter"] = "rslora"
    if any(change.what == "config.output_attentions" for change in given.changes):
        changed["attention"] = "eager"
    if given.adapter == "dropout 0.5":
        changed["between"] = "nothing"
    return replace(given, **changed)
