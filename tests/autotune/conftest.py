from pathlib import Path

import pytest

from fastft.plan_store import PlanStore


@pytest.fixture
def store(tmp_path: Path) -> PlanStore:
    return PlanStore(tmp_path)
