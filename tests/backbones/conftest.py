"""Makes the golden recipe importable, and one seed for every test."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / 'golden'))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
