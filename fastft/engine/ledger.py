"""The path ledger: for each module, which path runs and, where it is not the fused one, why."""

import logging
from collections import Counter
from typing import NamedTuple

from fastft.errors import BackendError

log = logging.getLogger("fastft")


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
    """Module name → path.  Nothing falls back in silence: the first fallback of a kind is logged."""

    def __init__(self, *, strict: bool = False) -> None:
        self.strict = strict
        self.paths: dict[str, Path] = {}
        self._told: set[tuple[str, str]] = set()

    def fused(self, name: str, kind: str, backend: str) -> None:
        """Note that module `name` runs on the fused path; its parts, if it ran stock before, no longer count."""
        before = self.paths.get(name)
        self.paths[name] = Path(kind, f"fused ({backend})")
        if kind == "decoder_layer" and before is not None and before.path == "stock":
            for part in [part for part, path in self.paths.items() if path.kind in ("linear", "norm")]:
                if part.startswith(f"{name}."):
                    del self.paths[part]

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

    def beyond(self, name: str, kind: str, reason: str) -> None:
        """Note that `name` runs stock because the engine has nothing for it; no error even where strict."""
        self._note(name, kind, "stock", reason)

    def _note(self, name: str, kind: str, path: str, reason: str) -> None:
        self.paths[name] = Path(kind, path, reason)
        if (kind, reason) not in self._told:
            self._told.add((kind, reason))
            log.warning("%s (%s) runs as %s, because %s", name, kind, path, reason)

    def counts(self) -> dict[str, int]:
        """How many modules run on each path: `{"decoder_layer: fused (eager)": 28}`."""
        return dict(sorted(Counter(str(path) for path in self.paths.values()).items()))

    @property
    def fallbacks(self) -> dict[str, Path]:
        """What does not run as asked."""
        return {name: path for name, path in self.paths.items() if path.reason}
