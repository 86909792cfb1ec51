"""The effective receptive field of models whose field is known, and what the command writes and refuses."""

import json

import numpy as np
import pytest
import torch
import untrained
from PIL import Image
from torch import nn

from tools import erf
from tools.cli import UserError
from vision_rwkv.backbones import VRWKV
from vision_rwkv.checkpoints import CheckpointError


class Convolution(nn.Conv2d):
    """A "backbone" whose field is its kernel."""

    def forward(self, x):
        return (super().forward(x),)


def test_contribution_of_a_convolution():
    torch.manual_seed(0)
    kernel = torch.randn(2, 3, 3, 5)
    backbone = Convolution(3, 2, (3, 5), padding=(1, 2), bias=True)
    backbone.weight.data, backbone.bias.data = kernel.clone(), torch.tensor([1e3, -1e3])  # the second one is cut off
    field = erf.contribution(backbone, torch.randn(1, 3, 9, 12))
    expected = torch.zeros(9, 12)
    expected[3:6, 4:9] = kernel[0].relu().sum(0)  # around the centre, row 4, column 6
    torch.testing.assert_close(field, expected)


def test_contribution_of_a_backbone_by_finite_differences():
    torch.manual_seed(0)
    backbone = VRWKV(img_size=8, patch_size=2, embed_dims=16, depth=2).double().eval()
    nn.init.normal_(backbone.pos_embed)
    x = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    field = erf.contribution(backbone, x.clone())

    def centre(image):
        with torch.no_grad():
            return backbone(image)[0][0, :, 2, 2].relu().sum()

    for y, column in ((4, 4), (0, 0), (7, 2)):
        slopes = []
        for channel in range(3):
            step = torch.zeros_like(x)
            step[0, channel, y, column] = 1e-5
            slopes.append((centre(x + step) - centre(x - step)) / 2e-5)
        assert field[y, column] == pytest.approx(sum(max(0.0, float(slope)) for slope in slopes), rel=1e-4, abs=1e-8)
    assert (field > 0).sum() > 50  # every token reaches the centre


def test_area_ratios():
    size = 100
    even = erf.area_ratios(np.ones((size, size)))
    assert [side for side, _ in even] == [45, 55, 71, 100]  # the first odd sides whose squares hold more than t
    assert [ratio for _, ratio in even] == pytest.approx([0.2025, 0.3025, 0.5041, 1.0])
    point = np.zeros((size, size))
    point[50, 50] = 2
    assert erf.area_ratios(point) == [(1, 1e-4)] * 4
    corner = np.zeros((size, size))
    corner[0, 0] = 1
    assert erf.area_ratios(corner) == [(size, 1.0)] * 4
    half = point + 2 * corner  # exactly half is not more than half
    assert [side for side, _ in erf.area_ratios(half)] == [1, 1, 100, 100]


def test_no_gradient_is_refused():
    backbone = Convolution(3, 1, 1)
    backbone.weight.data.zero_()
    backbone.bias.data.fill_(1)
    with pytest.raises(UserError, match='the centre of the last map has no finite gradient other than 0'):
        erf.measure(backbone, [torch.ones(1, 3, 4, 4)], torch.device('cpu'))


def test_what_is_drawn():
    scores = np.zeros((64, 64))
    scores[24:41, 24:41] = 1
    figure = erf.draw({'before': scores, 'after': np.ones((64, 64))}, 64, 'title')
    before, after, _ = figure.axes
    assert before.get_title().startswith('before: 20% in ') and after.get_title().endswith('99% in 100%')
    assert before.get_xlabel() == 'input: 64 × 64 pixels' and list(before.get_xticks()) == [0, 16, 32, 48, 64]
    squares = [(patch.get_x(), patch.get_width()) for patch in before.patches]
    assert squares[3] == (24, 17) and [(p.get_x(), p.get_width()) for p in after.patches][3] == (0, 64)


@pytest.mark.parametrize(
    ('config', 'changed', 'factor'),
    [(untrained.CLASSIFICATION, 'layers.0.att.key', 100), (untrained.DETECTION, 'spm.fc4', 0)],
)
def test_command(config, changed, factor, photos, tmp_path, monkeypatch, capsys):
    checkpoint = untrained.write(config, tmp_path / 'model.pth')
    contents = torch.load(checkpoint)
    contents['state_dict'][f'backbone.{changed}.weight'] *= factor
    torch.save(contents, checkpoint)
    command = (config, checkpoint, photos, '--size', 64, '--out', tmp_path / 'out/erf.png')
    untrained.call(erf, monkeypatch, *command)
    told = json.loads((tmp_path / 'out/erf.json').read_text())
    assert (told['size'], len(told['images'])) == (64, 3)
    for name in ('before', 'after'):
        assert [row['holds'] for row in told[name]] == [0.2, 0.3, 0.5, 0.99]
        assert all(row['ratio'] == pytest.approx((row['side'] / 64) ** 2, abs=1e-6) for row in told[name])
    assert told['before'] != told['after']
    printed = capsys.readouterr().out
    assert f'{told["after"][2]["ratio"]:.2%}' in printed and '3 images of 64 x 64 pixels' in printed
    assert np.asarray(Image.open(tmp_path / 'out/erf.png')).std() > 10
    before = told['before']
    untrained.call(erf, monkeypatch, *command)
    assert json.loads((tmp_path / 'out/erf.json').read_text())['before'] == before  # always the same initial weights


def test_what_is_refused(photos, tmp_path, monkeypatch):
    config, out = untrained.CLASSIFICATION, ('--out', tmp_path / 'x.png', '--size', 32)
    checkpoint = untrained.write(config, tmp_path / 'model.pth')
    other = untrained.write(untrained.CLASSIFICATION6, tmp_path / 'other.pth')
    (tmp_path / 'text.png').write_text('text')
    (tmp_path / 'plain.py').write_text("model = dict(backbone=dict(type='mmpretrain.ResNet', depth=18))")
    (tmp_path / 'none.py').write_text("model = dict(type='GAN')")
    masked = untrained.CONFIGS / 'classification/mae/vrwkv_mae_digits.py'
    encoder = untrained.write(masked, tmp_path / 'encoder.pth')
    for arguments, message in (
        ((config, 'no.pth', photos, *out), 'checkpoint not found: no.pth'),
        ((config, other, photos, *out), r'other\.pth: it does not fit the model'),
        ((config, checkpoint, tmp_path / 'no*.png', *out), 'image not found: '),
        ((config, checkpoint, tmp_path / 'text.png', *out), 'text.png: not an image'),
        ((config, checkpoint, photos, *out, '--device', 'gpu'), '--device expects cpu, cuda or cuda:N, got gpu'),
        ((config, checkpoint, photos, *out, '--size', 0), '--size must be at least 1, got 0'),
        ((config, checkpoint, photos, '--out', 'x.jpg'), r'--out: expected a name that ends in \.png, got x\.jpg'),
        ((masked, encoder, photos, *out), 'expected a backbone that returns maps, got MaskedVRWKV'),
        (
            (tmp_path / 'plain.py', checkpoint, photos, *out),
            'expected a backbone of Vision-RWKV, got mmpretrain.ResNet',
        ),
        ((tmp_path / 'none.py', checkpoint, photos, *out), r'none\.py: it has no model\.backbone'),
    ):
        with pytest.raises((UserError, CheckpointError), match=message):
            untrained.call(erf, monkeypatch, *arguments)
    assert not list(tmp_path.glob('x.*'))
