"""The commands of docs/finetune.md, on a data set of a few images; its experiments are tested in test_transfer.py."""

import re
import shlex
import sys

import torch
from PIL import Image
from scripts import ROOT, call
from transfer import EXPERIMENTS

sys.path.insert(0, str(ROOT / 'tests/checkpoints'))
from released import tensors_of  # noqa: E402

PAGE = (ROOT / 'docs/finetune.md').read_text()
COMMANDS = [line for block in re.findall(r'```bash\n(.*?)```', PAGE, re.DOTALL) for line in block.splitlines()]
SHORT = ['train_cfg.max_epochs=1', 'train_dataloader.batch_size=4', 'train_dataloader.num_workers=0']


def test_fine_tuning(tmp_path):
    plain, frozen = (shlex.split(line) for line in COMMANDS if 'finetune_384' in line)
    assert plain == frozen[:3] and frozen[3] == '--cfg-options'
    for name in 'abcde':
        for side in ('train', 'val'):
            path = tmp_path / 'data/flowers' / side / name / 'image.png'
            path.parent.mkdir(parents=True)
            Image.new('RGB', (40, 30), (ord(name), 90, 30)).save(path)
    tensors = tensors_of('vrwkv_t')
    tensors['backbone.pos_embed'] = tensors['backbone.pos_embed'].contiguous()  # it is resized
    torch.save({'meta': {'epoch': 300}, 'state_dict': tensors}, tmp_path / 'vrwkv_t_in1k_224.pth')
    script, config, gpus, *options = frozen
    options += [*SHORT, 'load_from=vrwkv_t_in1k_224.pth', 'val_dataloader.num_workers=0', 'val_dataloader.batch_size=5']
    said = call(ROOT / script, ROOT / config, gpus, *options, cwd=tmp_path, OMP_NUM_THREADS=1)
    assert '2 tensors keep their initial values: head.fc.weight, head.fc.bias' in said.output
    assert 'accuracy/top1: ' in said.output
    (saved,) = tmp_path.glob('work_dirs/*/epoch_1.pth')
    state = torch.load(saved, weights_only=False)['state_dict']
    assert not any(value.any() for name, value in state.items() if name.startswith('backbone.'))  # as in the file
    assert state['head.fc.weight'].shape == (5, 192)


def test_masked_pre_training(tiny):
    (command,) = (shlex.split(line) for line in COMMANDS if 'mae' in line)
    script, config, _ = command
    options = ('--cfg-options', 'train_cfg.max_epochs=1', 'default_hooks.logger.interval=1')
    said = call(ROOT / script, ROOT / config, 1, *options, cwd=tiny, OMP_NUM_THREADS=1)
    assert re.search(r'Epoch\(train\) +\[1\]\[2/2\].* loss: \d', said.output)
    assert (tiny / 'work_dirs/vrwkv_mae_digits/epoch_1.pth').exists()


def test_experiments_are_those_of_the_slow_tests():
    kinds = [shlex.split(line)[2] for line in COMMANDS if 'transfer.py' in line]
    assert kinds == list(EXPERIMENTS)


def test_links_resolve():
    links = [link.partition('#')[0] for link in re.findall(r'\]\(([^)]+)\)', PAGE) if '://' not in link]
    assert len(links) >= 6 and all((ROOT / 'docs' / link).exists() for link in links)
