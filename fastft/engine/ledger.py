"""The path ledger: for each module, which path its last call ran on and, where it was not the fused one, why."""

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from fastft.errors import BackendError

log = logging.getLogger("fastft")

_REMEDIES = (
    ("hooks", "remove the hooks"),
    ("computes in", "load the model in the dtype that it trains in, dtype=torch.bfloat16 say"),
    ("forward was replaced", "call the module's own forward"),
    ("is trained", "leave what is no adapter frozen"),
    ("hidden states are asked for", "ask for them in the calls that need them only"),
    ("attention weights are asked for", "ask for them in the calls that need them only"),
    ("adapters are active at once", "activate one, or merge them"),
    ("a tuple", "leave out return_dict=False"),
    ("sdpa leaves out its soft-cap", "load it with attn_implementation='eager'"),
    ("not sdpa or eager", "load it with attn_implementation='sdpa'"),
    ("nn.DataParallel", "start one process a GPU, torchrun --nproc-per-node=2 script.py say"),
)
"""What would let a module run fused, by what its reason says."""


class Path(NamedTuple):
    """What one module runs on."""

    kind: str
    """decoder_layer, norm, linear, adapter, head_and_loss; attention only where it is not the one asked for."""
    path: str
    """`fused (triton)`, `stock`, or the attention that runs instead."""
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.path}" + (f", because {self.reason}" if self.reason else "")


class Ledger:
    """Module name → path.  Nothing falls back in silence: new reasons are logged, in one line a forward."""

    def __init__(self, *, strict: bool = False, model: str = "model") -> None:
        """`model` is what the lines call it."""
        self.strict = strict
        self.model = model
        self.paths: dict[str, Path] = {}
        self._told: set[tuple[str, str]] = set()
        self._new: dict[tuple[str, str, str], list[str]] = defaultdict(list)
        self._all_fused: tuple[str, int] | None = None

    def fused(self, name: str, kind: str, backend: str) -> None:
        """Note that module `name` runs on the fused path; its parts, if it ran stock before, no longer count."""
        before = self.paths.get(name)
        if before is not None and before.path == f"fused ({backend})" and not before.reason:
            return
        self.paths[name] = Path(kind, f"fused ({backend})")
        if kind == "decoder_layer" and before is not None and before.path == "stock":
            for part in [part for part, path in self.paths.items() if path.kind in ("linear", "norm", "adapter")]:
                if part.startswith(f"{name}."):
                    del self.paths[part]

    def all_layers_fused(
        self, backend: str, prefix: str, layers: int, notes: Mapping[int, tuple[str, str]] | None = None
    ) -> None:
        """Note that the decoder layers `prefix`.0 and so on, so many, ran as one.

        `notes` are layers whose attention is not the one asked for: what runs, and why.
        """
        if self._all_fused == (backend, layers) and not notes:
            return
        for index in range(layers):
            self.fused(f"{prefix}.{index}", "decoder_layer", backend)
            attention = f"{prefix}.{index}.attention"
            if notes and index in notes:
                self.replaced(attention, "attention", *notes[index])
            else:
                self.paths.pop(attention, None)
        self._all_fused = None if notes else (backend, layers)

    def whole(self, reason: str) -> None:
        """Note that nothing of the model ran fused in this forward.

        Raises:
            BackendError: the ledger is strict.
        """
        for name, path in list(self.paths.items()):
            if path.kind in ("decoder_layer", "head_and_loss", "norm", "linear"):
                self.stock(name, path.kind, reason)

    def stock(self, name: str, kind: str, reason: str) -> None:
        """Note that module `name` runs as Hugging Face wrote it.

        Raises:
            BackendError: the ledger is strict.
        """
        self.replaced(name, kind, "stock", reason)

    def replaced(self, name: str, kind: str, path: str, reason: str) -> None:
        """Note that `name` runs on `path` instead of what was asked for.

        Raises:
            BackendError: the ledger is strict.
        """
        if self.strict:
            raise BackendError(
                f"{name} cannot run as asked",
                got=reason,
                fix=f"remove the cause, or drop `strict` to let it run as {path}",
            )
        self._note(name, kind, path, reason)
        if (kind, reason) not in self._told:
            self._new[kind, path, reason].append(name)

    def beyond(self, name: str, kind: str, reason: str) -> None:
        """Note that `name` runs stock because the engine has nothing for it: no error even where strict, no line."""
        self._note(name, kind, "stock", reason)

    def expected(self, name: str, kind: str, reason: str) -> None:
        """Note that `name` runs stock because of how it was called, not of what it is: no error, no line."""
        self._note(name, kind, "stock", reason)

    def tell(self) -> None:
        """Log what is new since the last time, in one line."""
        if not self._new:
            return
        told: dict[tuple[str, str], list[str]] = defaultdict(list)
        for (kind, path, reason), names in self._new.items():
            self._told.add((kind, reason))
            total = sum(each.kind == kind for each in self.paths.values())
            what = names[0] if len(names) == 1 else f"{len(names)} of {max(total, len(names))} ({names[0]}, …)"
            told[path, reason].append(f"{kind.replace('_', ' ')} {what}")
        parts = []
        for (path, reason), modules in told.items():
            remedy = next((fix for text, fix in _REMEDIES if text in reason), None)
            advice = f"; to change that: {remedy}" if remedy is not None else ""
            verb = "runs" if len(modules) == 1 else "run"
            parts.append(f"{', '.join(modules)} {verb} as {path}, because {reason}{advice}")
        self._new.clear()
        log.warning("%s: %s", self.model, " | ".join(parts))

    def _note(self, name: str, kind: str, path: str, reason: str) -> None:
        self.paths[name] = Path(kind, path, reason)
        self._all_fused = None

    def counts(self) -> dict[str, int]:
        """How many modules run on each path: `{"decoder_layer: fused (eager)": 28}`."""
        return dict(sorted(Counter(str(path) for path in self.paths.values()).items()))

    @property
    def fallbacks(self) -> dict[str, Path]:
        """What does not run as asked."""
        return {name: path for name, path in self.paths.items() if path.reason}
