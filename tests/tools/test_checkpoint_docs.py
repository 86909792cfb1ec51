"""What docs/checkpoints.md shows, run: commands on small models and released layouts, Python as it is."""

import os
import re
import shlex
import sys

import pytest
import torch
from scripts import ROOT, call, errors_in

from tools import convert_checkpoint, get_flops, reproduce_zoo
from tools.draw_predictions import read_log

sys.path.insert(0, str(ROOT / 'tests/checkpoints'))
from released import tensors_of  # noqa: E402
from server import Files, serve  # noqa: E402

PAGE = (ROOT / 'docs/checkpoints.md').read_text()
COMMANDS = [line for block in re.findall(r'```bash\n(.*?)```', PAGE, re.DOTALL) for line in block.splitlines()]
CODE = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)


class Evil:
    def __reduce__(self):
        return os.system, ('touch ran',)


@pytest.fixture(scope='module')
def files(trained, tiny):
    """released.pth in the layout of another code base, and evil.pth, of the tests' own run."""
    state = torch.load(trained.work_dir / 'best.pth', weights_only=False)['state_dict']
    torch.save({'model': {f'module.{name}': tensor for name, tensor in state.items()}}, tiny / 'released.pth')
    torch.save({'state_dict': state, 'meta': Evil()}, tiny / 'evil.pth')
    return tiny


def command(script: str) -> list[str]:
    (found,) = (line for line in COMMANDS if script in line)
    return shlex.split(found)


def test_every_command_is_run_below():
    scripts = ('dist_test.sh', 'dist_train.sh', 'convert_checkpoint.py', 'get_flops.py', 'reproduce_zoo.py')
    assert sorted(COMMANDS.index(' '.join(command(script))) for script in scripts) == list(range(len(COMMANDS)))


def test_an_address_on_the_command_line(files, trained, tmp_path):
    script, config, address, gpus = command('dist_test.sh')
    assert (ROOT / config).exists() and address.startswith('https://') and gpus == '8'
    contents = (files / 'released.pth').read_bytes()
    with serve(Files(contents, breaks=[len(contents) // 2])) as server:
        where = ('--work-dir', tmp_path / 'work')
        arguments = ('tiny.py', f'{server}/small.pth', 2, *where)
        said = call(ROOT / script, *arguments, cwd=files, TORCH_HOME=tmp_path, OMP_NUM_THREADS=1)
    assert (tmp_path / 'hub/checkpoints/small.pth').read_bytes() == contents
    assert f'accuracy/top1: {max(read_log(trained.work_dir)[1].values()):.4f}' in said.output


def test_load_from(files, tmp_path):
    script, config, _, *options = command('dist_train.sh')
    assert (ROOT / config).exists() and options == ['--cfg-options', 'load_from=vrwkv_l_in22k_192.pth']
    more = (
        'load_from=released.pth',
        'model.head.num_classes=12',
        'data_preprocessor.num_classes=12',
        'train_cfg.max_epochs=1',
    )
    said = call(ROOT / script, 'tiny.py', 1, '--work-dir', tmp_path, '--cfg-options', *more, cwd=files)
    assert 'released.pth: 2 tensors keep their initial values: head.fc.weight, head.fc.bias' in said.output
    said = call(
        'python', ROOT / 'tools/train.py', 'tiny.py', '--cfg-options', 'load_from=evil.pth', cwd=files, expect=2
    )
    (line,) = (line for line in errors_in(said.stderr) if 'error:' in line)
    assert line.startswith('train.py: error: checkpoint evil.pth: refused: ') and line.endswith(
        'asks for more: posix.system'
    )
    assert not (files / 'ran').exists() and 'Traceback' not in said.output


def in_process(module, monkeypatch, arguments) -> None:
    monkeypatch.setattr(sys, 'argv', [f'{module.__name__}.py', *map(str, arguments)])
    module.main()


def test_tools(files, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, script, source, out = command('convert_checkpoint.py')
    assert script == 'tools/convert_checkpoint.py' and source.endswith('.pth') and out.endswith('.safetensors')
    in_process(convert_checkpoint, monkeypatch, (files / 'whole/best.pth', 'clean.safetensors'))
    assert 'clean.safetensors: ' in capsys.readouterr().out
    _, script, config, *options = command('get_flops.py')
    in_process(get_flops, monkeypatch, (ROOT / config, *options))
    assert script == 'tools/get_flops.py' and 'published 1.2G' in capsys.readouterr().out
    _, script, *options = command('reproduce_zoo.py')
    in_process(reproduce_zoo, monkeypatch, options)  # no data here, so nothing is downloaded or tested
    assert script == 'tools/reproduce_zoo.py' and capsys.readouterr().out.count('| not tested: ') == 16


@pytest.mark.parametrize('code', CODE[1:])
def test_python(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path))
    (tmp_path / 'checkpoints').mkdir()
    for path in ('vrwkv_t_in1k_224.pth', 'checkpoints/vrwkv_t_in1k_224.pth'):
        torch.save({'state_dict': tensors_of('vrwkv_t')}, path)
    exec(compile(code, 'checkpoints.md', 'exec'), {})


def test_the_page_is_linked():
    assert 'docs/checkpoints.md' in (ROOT / 'README.md').read_text() and len(CODE) == 3
