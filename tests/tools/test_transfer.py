"""Starting from a checkpoint beats training from scratch for as long."""

import pytest
import transfer


@pytest.mark.slow
@pytest.mark.parametrize('kind', transfer.EXPERIMENTS)
def test_a_checkpoint_helps(kind, tmp_path):
    tuned, scratch = transfer.compare(kind, 0, tmp_path)
    assert tuned > scratch + 2
