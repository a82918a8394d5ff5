import subprocess
import sys
from pathlib import Path

import pytest

from fastft.errors import ConfigError
from fastft.siblings import ROOT, import_sibling


def test_a_sibling_is_found_beside_fastft() -> None:
    module = import_sibling("autotune.solver")
    assert Path(str(module.__file__)) == ROOT / "autotune" / "solver.py"


def test_an_absent_sibling_is_named() -> None:
    with pytest.raises(ConfigError, match="package autotuna is not found"):
        import_sibling("autotuna.search")


@pytest.mark.parametrize("place", ["bench/__init__.py", "bench.py"])
@pytest.mark.parametrize("loaded", [False, True])
def test_a_shadowing_package_is_named_and_not_run(place: str, loaded: bool, tmp_path: Path) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text("print('ran')\n")
    code = f"""
import sys
sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]
{"import bench" if loaded else ""}
from fastft.siblings import import_sibling
from fastft.errors import ConfigError
try:
    import_sibling("bench.worker")
except ConfigError as error:
    print("refused:", error)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "refused:" in done.stdout, done.stderr
    assert str(tmp_path) in done.stdout
    assert ("ran" in done.stdout) == loaded
