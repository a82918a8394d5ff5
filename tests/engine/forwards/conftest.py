"""How a batch compares with stock."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastft import ledger_of, patch_model

TOLERANCE = 5e-5 if torch.cuda.is_available() else 1e-5  # ‖g − stock‖ / ‖stock‖ in fp32


@pytest.fixture
def equal_to_stock(step, error_of):
    """Asserts that loss and gradients equal stock's; gives the ledger's reasons."""

    def check(model: Any, batch: dict[str, Tensor], rows: int | None = None, **more: Any) -> dict[str, str]:
        loss, gradients = step(model, batch, rows, **more)
        patch_model(model, backend="eager", placement=["light", "mlp", "full"], loss_chunk_tokens=11)
        fused_loss, fused = step(model, batch, rows, **more)
        assert fused_loss == pytest.approx(loss, rel=1e-5)
        assert error_of(fused, gradients) < TOLERANCE
        return {name: path.reason for name, path in ledger_of(model).fallbacks.items()}

    return check
