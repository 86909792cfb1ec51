"""What the pages of docs/ show: Python blocks run, commands name what there is, Dockerfile and versions agree."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools import zoo  # noqa: E402

NAMES = ('install', 'data', 'models', 'operators', 'versions', 'zoo', 'faq', 'tutorial')
PAGES = {name: (ROOT / f'docs/{name}.md').read_text() for name in NAMES} | {
    'contributing': (ROOT / 'CONTRIBUTING.md').read_text()
}
MAKEFILE = (ROOT / 'Makefile').read_text()


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf'^```{language}\n(.*?)^```$', PAGES[page], re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    'code',
    [
        pytest.param(code, id=f'{name}-{i}')
        for name in ('models', 'operators', 'faq')
        for i, code in enumerate(blocks(name, 'python'))
    ],
)
def test_python_examples_run(code):
    exec(compile(code, 'example', 'exec'), {})


def test_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    """All blocks in order, as typed; by one thread, whose time does not depend on the neighbours of the others."""
    monkeypatch.chdir(tmp_path)
    threads, state = torch.get_num_threads(), {'__name__': 'tutorial'}
    torch.set_num_threads(1)
    try:
        for code in blocks('tutorial', 'python'):
            exec(compile(code, 'tutorial.md', 'exec'), state)
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().out
    assert '[(1, 192, 27, 40), (1, 192, 27, 40)]' in said
    reached, enlarged = map(float, re.search(r'([\d.]+) at 32 pixels, ([\d.]+) at 64', said).groups())
    assert reached >= 0.9 and enlarged >= 0.4  # chance: 0.1
    assert (state['predicted'] == state['labels'][state['shown']]).sum() >= 6
    assert (tmp_path / 'digits.png').stat().st_size > 10_000


def commands() -> list[tuple[str, str]]:
    return [
        (name, line.partition('   #')[0])
        for name in PAGES
        for block in blocks(name, 'bash')
        for line in block.splitlines()
    ]


def targets() -> set[str]:
    return set(re.findall(r'^([a-z-]+):', MAKEFILE, re.MULTILINE))


@pytest.mark.parametrize('page, line', commands(), ids=lambda value: value[:40])
def test_commands_name_what_there_is(page, line):
    """CI runs the make targets, other tests the scripts; `python -c` runs here."""
    program, *arguments = shlex.split(line)
    if program == 'make':
        assert set(arguments) <= targets(), line
    elif program == 'python' and arguments[0] == '-c':
        exec(compile(arguments[1], page, 'exec'), {})
    elif program in ('pip', 'docker', 'nvcc'):
        files = [word for word in arguments if word.startswith('requirements/')]
        extras = re.findall(r"'\.\[(\w+)\]'", line)
        assert all((ROOT / file).is_file() for file in files)
        assert all(f'\n{extra} = ' in (ROOT / 'pyproject.toml').read_text() for extra in extras)
    else:
        script = arguments[0] if program == 'python' else program
        assert script.startswith('tools/') and (ROOT / script).is_file(), line
        assert all((ROOT / word).is_file() for word in arguments if word.startswith('configs/')), line
        for option in (word for word in arguments if word.startswith('--')):
            sources = [path.read_text() for path in (ROOT / script, ROOT / 'tools/train.py', ROOT / 'tools/cli.py')]
            assert any(f"'{option}'" in source for source in sources), f'{line}: {option}'


def test_make_targets_in_the_text_exist():
    for name, text in PAGES.items():
        named = set(re.findall(r'`make ([a-z-]+)[` ]', text))
        assert named <= targets(), f'{name}: {named - targets()}'


def test_errors_in_the_table_are_those_of_the_code():
    """The words before the first dots of each message that is ours stand in some source file."""
    ours = (
        'vision_rwkv runs',
        'PyTorch not found',
        'the adapter takes',
        'MMPretrain works',
        'mixed precision',
        'data folder',
    )
    folders = ('vision_rwkv', 'classification', 'detection', 'segmentation', 'dense', 'openmmlab', 'tools')
    files = [ROOT / 'setup.py', *(path for folder in folders for path in (ROOT / folder).rglob('*.py'))]
    sources = '\n'.join(path.read_text() for path in files)
    for start in ours:
        (message,) = re.findall(rf'^\| `({re.escape(start)}[^`]*)`', PAGES['install'], re.MULTILINE)
        for part in message.split('...'):
            assert part.strip(' ,()') in re.sub(r"'\n +f?'|\{.*?\}", '', sources), message


def test_versions_are_those_of_the_requirements():
    pinned = dict(
        re.findall(
            r'^([\w-]+)==([\d.]+)$',
            '\n'.join(path.read_text() for path in ROOT.glob('requirements/*.txt')),
            re.MULTILINE,
        )
    )
    for package in (
        'torch',
        'torchvision',
        'timm',
        'onedl-mmengine',
        'onedl-mmpretrain',
        'onedl-mmdetection',
        'onedl-mmsegmentation',
    ):
        line = next(
            line
            for line in PAGES['versions'].splitlines()
            if f'({package})' in line or line.lower().startswith((f'| {package} ', f'| py{package} '))
        )
        assert f'| {pinned[package]} |' in line, line
    mmcv = re.search(r'package=onedl-mmcv==(\S+)', (ROOT / 'tools/install_mmcv.sh').read_text())[1]
    assert f'(onedl-mmcv) | {mmcv} |' in PAGES['versions']


def test_figures_cited_are_those_of_the_zoo():
    cited = re.findall(r'\b([TSB]) ([\d.]+) to ([\d.]+)', PAGES['faq'])
    top1 = {row.alias: row.metrics.get('Top 1 Accuracy') for row in zoo.read('classification')}
    assert len(cited) == 3
    assert all((float(six), float(plain)) == (top1[f'VRWKV6-{x}'], top1[f'VRWKV-{x}']) for x, six, plain in cited)


def test_the_dockerfile_names_what_there_is():
    lines = re.sub(r'\\\n', ' ', (ROOT / 'Dockerfile').read_text())
    instructions = [line.split(maxsplit=1) for line in lines.splitlines() if line and not line.startswith('#')]
    assert {word for word, _ in instructions} == {'FROM', 'RUN', 'ENV', 'WORKDIR', 'COPY', 'CMD'}
    copied = [rest.split()[:-1] for word, rest in instructions if word == 'COPY']
    assert all((ROOT / source).exists() for sources in copied for source in sources)
    for target in re.findall(r'\bmake (\S+)', ' '.join(rest for word, rest in instructions if word == 'RUN')):
        assert target in targets() or target.replace('.venv/', '$(VENV)/') + ':' in MAKEFILE, target
    (cuda,) = re.findall(r'^FROM nvidia/cuda:(\d+\.\d+)\.\d+-devel-ubuntu24\.04$', lines, re.MULTILINE)
    if torch.version.cuda:
        assert cuda == torch.version.cuda
    architectures = re.search(r"^CUDA_ARCHITECTURES = '(.*?)'", (ROOT / 'setup.py').read_text(), re.MULTILINE)[1]
    assert f'TORCH_CUDA_ARCH_LIST="{architectures}"' in lines
    assert json.loads(dict(instructions)['CMD']) == ['bash']


def test_every_page_has_a_place():
    """In the nav, or among those that are being written."""
    text = re.sub(r'!ENV', '', (ROOT / 'mkdocs.yml').read_text())
    config = yaml.safe_load(text)
    waiting = config.get('not_in_nav', '').split()
    for path in (ROOT / 'docs').glob('*.md'):
        assert f': {path.name}\n' in text or f'- {path.name}\n' in text or f'/{path.name}' in waiting
