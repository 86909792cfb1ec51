"""Makes the golden recipe importable, and one seed for every test."""

import sys
from pathlib import Path

import pytest
import torch

GOLDEN = Path(__file__).parent.parent / 'golden'
sys.path.insert(0, str(GOLDEN))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
