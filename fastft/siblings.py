"""Importing the packages beside `fastft`: `autotune`, `bench`, `reports`.

Their plain names can clash with a user's own folder or package.  The guard compares where a sibling was found
with where fastft is, before any of its code runs.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from fastft.errors import ConfigError

SIBLINGS = ("autotune", "bench", "reports")

ROOT = Path(__file__).resolve().parent.parent
"""The folder that holds fastft and its siblings."""


def import_sibling(name: str) -> ModuleType:
    """Import `name`, a sibling package or a module of one, e.g. `autotune.search`.

    Raises:
        ConfigError: the package is not installed, or another package of that name shadows it; the message
            says where that one is.
    """
    package = name.partition(".")[0]
    place = _where(package)
    if place is None:
        raise ConfigError(
            f"package {package} is not found", got=f"fastft in {ROOT}", allowed=f"{ROOT / package}",
            fix="install fastft again; its distribution contains all four packages",
        )  # fmt: skip
    if place.resolve() != ROOT / package:
        raise ConfigError(
            f"another package is called {package} and hides fastft's", got=str(place), allowed=str(ROOT / package),
            fix=f"start from another folder, rename {place}, or run `python -P -m fastft`",
        )  # fmt: skip
    return importlib.import_module(name)


def _where(package: str) -> Path | None:
    """The folder (or file) that `import package` takes, without running it."""
    loaded = sys.modules.get(package)
    if loaded is not None:
        file = getattr(loaded, "__file__", None)
        if file:
            return Path(file).parent if Path(file).name == "__init__.py" else Path(file)
        return next((Path(entry) for entry in getattr(loaded, "__path__", [])), None)
    spec = importlib.util.find_spec(package)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin) if spec.origin else None
