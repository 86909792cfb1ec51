"""Against the released models: tensor names and shapes of all seven, outputs and gradients of the tiny ones."""

import json

import golden
import pytest
import torch
from models import GOLDEN

from vision_rwkv.backbones import VRWKV, VRWKV6

POST_NORM = {'post_norm': True, 'init_values': 1e-5}
MODELS = {
    'vrwkv_t': (VRWKV, {'embed_dims': 192}),
    'vrwkv_s': (VRWKV, {'embed_dims': 384, **POST_NORM}),
    'vrwkv_b': (VRWKV, {'embed_dims': 768, **POST_NORM}),
    'vrwkv_l_384': (VRWKV, {'embed_dims': 1024, 'depth': 24, 'img_size': 192, 'key_norm': True, **POST_NORM}),
    'vrwkv6_t': (VRWKV6, {'embed_dims': 192, 'num_heads': 3}),
    'vrwkv6_s': (VRWKV6, {'embed_dims': 384, 'num_heads': 6, **POST_NORM}),
    'vrwkv6_b': (VRWKV6, {'embed_dims': 768, 'num_heads': 12, **POST_NORM}),
}
SIZES = [('vrwkv_t', 224, 224), ('vrwkv_t', 160, 256), ('vrwkv_t', 100, 75)]
SIZES += [('vrwkv6_t', 224, 224), ('vrwkv6_t', 160, 256)]
STATE_DICTS = json.loads((GOLDEN / 'state_dicts.json').read_text())


def build(name):
    version, arguments = MODELS[name]
    model = version(**arguments).eval()
    golden.fill(model)
    return model


@pytest.mark.parametrize('name', MODELS)
def test_state_dict_has_the_published_names_and_shapes(name):
    version, arguments = MODELS[name]
    with torch.device('meta'):
        model = version(**arguments)
    published = STATE_DICTS[name]
    got = [(key, list(value.shape)) for key, value in model.state_dict().items()]
    assert sorted(got) == sorted((key, list(shape)) for key, shape in dict(published).items())


def test_every_published_classification_model_is_checked():
    assert set(MODELS) == {name for name in STATE_DICTS if not name.startswith('adapter')}


@pytest.mark.parametrize(('name', 'height', 'width'), SIZES)
def test_output(name, height, width):
    model = build(name)
    with torch.no_grad():
        outputs = model(golden.image(height, width))
    assert golden.worst_error(str(GOLDEN / f'{name}.npz'), f'{height}x{width}', outputs) < 1e-4


@pytest.mark.parametrize('name', ['vrwkv_t', 'vrwkv6_t'])
def test_gradients(name):
    model = build(name)
    golden.gradient_loss(model(golden.image(224, 224))[-1]).backward()
    gradients = {key: value.grad for key, value in model.named_parameters()}
    assert golden.worst_gradient_error(str(GOLDEN / f'{name}.npz'), gradients) < 1e-3
