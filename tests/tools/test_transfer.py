"""Starting from a checkpoint beats training from scratch for as long."""

import pytest
import transfer


@pytest.mark.slow
@pytest.mark.parametrize(('kind', 'seed'), [('labels', 2), ('masked', 0)])  # of middling effect: see docs/finetune.md
def test_a_checkpoint_helps(kind, seed, tmp_path):
    tuned, scratch = transfer.compare(kind, seed, tmp_path)
    assert tuned > scratch + 2
