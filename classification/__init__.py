"""Image classification: Vision-RWKV in MMPretrain. Importing this registers what the configs name."""

from importlib.metadata import PackageNotFoundError, version


def _check_transformers() -> None:
    """MMPretrain imports transformers wherever it is installed, and fails on version 5 with an unrelated message."""
    try:
        installed = version('transformers')
    except PackageNotFoundError:
        return
    if int(installed.split('.')[0]) >= 5:
        raise ImportError(
            f'MMPretrain works with transformers < 5, but {installed} is installed: pip install "transformers<5"'
        )


_check_transformers()

from mmpretrain.datasets.transforms import TRANSFORMS  # noqa: E402  # which now has all of MMPretrain's
from mmpretrain.registry import OPTIM_WRAPPER_CONSTRUCTORS  # noqa: E402

from openmmlab import LayerDecayConstructor, LoadImageFromFile  # noqa: E402

from .mae import MaskedVRWKV, VRWKVDecoder  # noqa: E402
from .models import VRWKV, VRWKV6, HiddenLayerClsHead  # noqa: E402

OPTIM_WRAPPER_CONSTRUCTORS.register_module(module=LayerDecayConstructor)
TRANSFORMS.register_module(module=LoadImageFromFile, force=True)

__all__ = ['VRWKV', 'VRWKV6', 'HiddenLayerClsHead', 'MaskedVRWKV', 'VRWKVDecoder']
