"""The scripts in examples/ run as they stand: all fused, the measure on held-out rows better, an adapter saved."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastft.training.methods import METHODS

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_every_method_of_trls_has_a_short_example() -> None:
    assert {path.stem for path in EXAMPLES} == METHODS.keys() - {"ppo"}
    for path in EXAMPLES:
        text = path.read_text()
        assert len(text.splitlines()) <= 40
        assert "patch_hf_training()  # the one line" in text


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_trains_fused_and_saves_an_adapter(path: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = (float(re.search(rf"held out, {when}:\s+(\S+)", done.stdout)[1]) for when in ("before", "after"))  # type: ignore[index]
    assert (after < before) if path.stem == "sft" else (after > before)
    assert "decoder_layer: fused (eager)" in done.stdout
    assert "stock" not in done.stdout
    assert (tmp_path / f"{path.stem}-adapter" / "adapter_model.safetensors").exists()
