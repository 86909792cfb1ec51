"""The zoo: its data, the tables made from it, and the figures counted anew."""

import json
import re
import sys
from types import SimpleNamespace

import pytest
import yaml
from scripts import ROOT, call

from tools import get_flops, reproduce_zoo, zoo
from tools.cli import UserError

# From the paper, written down independently: params (M), FLOPs (G), figures.
CLASSIFIERS = {
    'vrwkv_t_in1k_224': (6.2, 1.2, 75.1),
    'vrwkv_s_in1k_224': (23.8, 4.6, 80.1),
    'vrwkv_b_in1k_224': (93.7, 18.2, 82.0),
    'vrwkv_l_22kto1k_384': (334.9, 189.5, 86.0),
    'vrwkv6_t_in1k_224': (7.6, 1.6, 76.6),
    'vrwkv6_s_in1k_224': (27.7, 5.6, 81.1),
    'vrwkv6_b_in1k_224': (104.9, 20.9, 82.6),
}
DENSE = {
    'tiny': (8.4, 67.9, 16.6, 41.7, 38.0, 43.3),
    'small': (29.3, 189.9, 46.3, 44.8, 40.2, 47.2),
    'base': (106.6, 599.0, 146.0, 46.8, 41.7, 49.2),
    'large': (351.9, 1730.6, 421.9, 50.6, 44.9, 53.5),
}


def test_the_figures_are_the_published_ones():
    expected = {f'{name}.pth': (params, flops, [top1]) for name, (params, flops, top1) in CLASSIFIERS.items()}
    expected['vrwkv_l_in22k_192.pth'] = (None, None, [])
    for size, (params, flops_det, flops_seg, box, mask, miou) in DENSE.items():
        expected[f'mask_rcnn_vrwkv_adapter_{size}_fpn_1x_coco.pth'] = (params, flops_det, [box, mask])
        expected[f'upernet_vrwkv_adapter_{size}_512_160k_ade20k.pth'] = (params, flops_seg, [miou])
    found = {}
    for row in zoo.read_all():
        address, _, file = row.weights.rpartition('/')
        assert address == 'https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main'
        params, flops = (None, None) if row.params is None else (row.params / 1e6, row.flops / 1e9)
        found[file] = (params, flops, list(row.metrics.values()))
    assert found == expected


@pytest.mark.parametrize('task', zoo.TASKS)
def test_metafiles_have_openmmlabs_form(task):
    contents = yaml.safe_load((ROOT / 'configs' / task / 'metafile.yml').read_text())
    collections = {item['Name'] for item in contents['Collections']}
    for model in contents['Models']:
        assert model['In Collection'] in collections
        assert model['Name'] in model['Config'] and model['Config'].startswith(f'configs/{task}/')
        for result in model.get('Results', []):
            assert set(result) == {'Task', 'Dataset', 'Metrics'} and set(result['Metrics']) <= set(
                reproduce_zoo.METRICS
            )
        assert (ROOT / model['Config']).is_file()


def test_tables_are_up_to_date():
    said = call(sys.executable, ROOT / 'tools/zoo.py', '--check', cwd=ROOT)
    assert said.stdout == '16 models; all tables are up to date\n'
    readme = (ROOT / 'README.md').read_text()
    assert len(re.findall(r'<!-- zoo: \w+ -->', readme)) == 3
    for row in zoo.read_all():
        (line,) = (line for line in readme.splitlines() if row.weights in line)
        assert all(f'| {value:.1f} |' in line for value in row.metrics.values())
        assert f']({row.config})' in line


def test_a_stale_table_is_seen(monkeypatch, tmp_path, capsys):
    (tmp_path / 'README.md').write_text('a\n<!-- zoo: detection -->\nold\n<!-- end of zoo -->\nb\n')
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    monkeypatch.setattr(zoo, 'ROOT', tmp_path)
    monkeypatch.setattr(sys, 'argv', ['zoo.py', '--check'])
    with pytest.raises(SystemExit, match=r'README\.md not up to date'):
        zoo.main()
    monkeypatch.setattr(sys, 'argv', ['zoo.py'])
    zoo.main()
    text = (tmp_path / 'README.md').read_text()
    assert text.startswith('a\n<!-- zoo: detection -->\n\n| model |') and text.endswith('\n<!-- end of zoo -->\nb\n')
    zoo.main()
    assert capsys.readouterr().out.splitlines()[-1].endswith('all tables are up to date')


def test_counted_figures_are_the_published_ones(capsys):
    """Those of the small ones; `make zoo` looks at all."""
    rows = [row for row in zoo.read_all() if 'tiny' in row.name or 'small' in row.name]
    get_flops.measure_zoo(rows)
    said = capsys.readouterr().out
    assert 'FLOPs         1.17G   published 1.2G' in said and 'FLOPs         4.60G   published 4.6G' in said
    assert len(rows) == said.count('params') == said.count('published ') // 2 == 8


def test_a_model_that_is_not_as_published():
    rows = [row._replace(flops=1_100_000_000) if row.alias == 'VRWKV-T' else row for row in zoo.read('classification')]
    with pytest.raises(UserError, match='not as published: vrwkv_tiny_8xb128_in1k'):
        get_flops.measure_zoo(rows[:1])
    row = rows[0]._replace(alias='VRWKV6-T', params=100_000_000, flops=1_000_000_000)
    for params, flops, expected in ((100.05, 1.039, True), (100.07, 1.0, False), (100.0, 0.95, False)):
        assert get_flops.is_as_published(row, SimpleNamespace(params=params * 1e6, flops=flops * 1e9)) == expected
    row = row._replace(alias='VRWKV-T adapter')
    for flops, expected in ((1.014, True), (0.984, False)):
        assert get_flops.is_as_published(row, SimpleNamespace(params=1e8, flops=flops * 1e9)) == expected


def test_get_flops_of_a_config(monkeypatch, capsys):
    def say(*arguments):
        monkeypatch.setattr(sys, 'argv', ['get_flops.py', *map(str, arguments)])
        get_flops.main()
        return capsys.readouterr().out.splitlines()

    tiny = ROOT / 'configs/classification/vrwkv6/vrwkv6_tiny_8xb128_in1k.py'
    title, params, flops = say(tiny, '--shape', 224, 224)[-3:]
    assert title == f'{tiny} at 224x224' and 'published 7.6M, difference +0.5 %' in params
    assert 'published 1.6G, difference +3.6 %' in flops
    assert say(tiny, '--shape', 224, 448)[-1].endswith('3.32G   (published for 224x224: 1.6G)')
    options = ('--cfg-options', 'model.backbone.depth=1')
    assert 'published' not in say(tiny, *options)[-1]
    with pytest.raises(UserError, match='expected a config file, got no.py'):
        say('no.py')


def test_reproducing_a_row(trained, tiny, tmp_path, monkeypatch):
    """A checkpoint of the tests stands in for a released one; rows without checkpoint or data are left out."""
    monkeypatch.chdir(tiny)
    row = zoo.Row('classification', 'tiny', 'T', str(tiny / 'tiny.py'), 'https://a/best.pth', 32, 32, 1, 1, {})
    rows = [
        row._replace(metrics={'Top 1 Accuracy': 50.0}),
        row._replace(name='no figure'),
        row._replace(name='no file', metrics={'mIoU': 1.0}, weights='https://a/none.pth'),
        zoo.read('classification')[0]._replace(weights='https://a/best.pth'),
    ]
    settings = reproduce_zoo.Settings(trained.work_dir, False, 1, tmp_path)
    reproduce_zoo.reproduce(rows, settings, tmp_path / 'table.md')
    lines = (tmp_path / 'table.md').read_text().splitlines()[2:]
    reached = max(json.loads(line).get('accuracy/top1', 0) for line in log_of(trained.work_dir))
    assert lines == [
        f'| tiny | Top 1 Accuracy | 50.0 | {reached:.2f} | {reached - 50:+.2f} |',
        '| no figure | | | not tested: no published figure | |',
        f'| no file | | | not tested: no checkpoint {trained.work_dir}/none.pth | |',
        f'| vrwkv_tiny_8xb128_in1k | | | not tested: data folder not found: data/imagenet (from {tiny}) | |',
    ]
    (tmp_path / 'bad.pth').write_text('text')
    bad = rows[0]._replace(weights='https://a/bad.pth')
    with pytest.raises(UserError, match='testing tiny failed'):
        reproduce_zoo.reproduce([bad], settings._replace(checkpoints=tmp_path), tmp_path / 'table.md')
    assert '| tiny | | | failed | |' in (tmp_path / 'table.md').read_text()


def log_of(work_dir):
    return [line for path in work_dir.glob('*/vis_data/scalars.json') for line in path.read_text().splitlines()]


def test_names_of_the_zoo(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['reproduce_zoo.py', 'resnet'])
    with pytest.raises(UserError, match='no such model: resnet; known: vrwkv_tiny_8xb128_in1k, '):
        reproduce_zoo.main()
