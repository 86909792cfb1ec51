"""Counts what lives while a model runs, without data and without a GPU: tensors of all calls, and those within ours."""

import weakref
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def within(name: str, args: tuple) -> int:
    """Bytes that one of our operators has at a time besides its results, as its code on CUDA has."""
    if name in ('mix_linear', 'mix_linear_backward'):  # inputs of the maps
        x, mixes = args[-len(args) + name.endswith('backward') :][:2]
        return len(mixes) * x.numel() * 2
    if name == 'squared_relu_mlp':  # hidden keys
        return args[0].shape[:2].numel() * args[1].shape[0] * 2
    if name in ('squared_relu_linear', 'gated_linear'):  # input of the map
        return args[0].nbytes
    if name in ('squared_relu_linear_backward', 'gated_linear_backward'):
        return args[1].nbytes
    if name == 'vrwkv6_block_backward':  # kernels/dynamic_mix, where it takes the inputs' gradients apart
        x, ranks = args[1], args[10]
        thin = (ranks[0].shape[1] + ranks[2].shape[1]) / x.shape[2]  # low-rank values: in float32, and rounded
        # Gradients of the middle and of its branch, the blend, deltas and their gradients, inputs, the raw decay's
        # gradient, parts; less that of x, which is there at the end.
        return int((2 + 1 + 1 + 5 + 5 + 5 + 1 + 3 - 2 + 3 * thin) * x.numel() * 2)
    if name in ('wkv6', 'wkv6_backward'):  # kernels/wkv6: states and decays of chunks
        batch, tokens, heads, _ = args[0].shape
        chunks, sets = -(-tokens // 64), 1 if name == 'wkv6' else 2
        return 4 * batch * heads * (2 * sets * (chunks - 1) * 64 * 64 + (1 + sets) * chunks * 64)
    return 0


class Live(TorchDispatchMode):
    """The most bytes alive at a time, in ``peak``."""

    def __init__(self, *tensors: Tensor):
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()
        for x in tensors:
            self.add(x)

    def add(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.live += size
            weakref.finalize(storage, self.drop, key, size)

    def drop(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self.add(x)
        library, name = func._schema.name.split('::')
        self.peak = max(self.peak, self.live + (within(name, args) if library == 'vision_rwkv' else 0))
        return out


def peak(make, batch: int, side: int, kind: str) -> int:
    """Bytes at the fullest moment of a pass of ``make()`` under bfloat16 autocast, weights and images included.

    Training is counted on a CPU, without a GPU PyTorch has no engine for CUDA's gradients; the layers are the same.
    """
    device = 'cuda' if kind == 'infer' else 'cpu'
    with FakeTensorMode():
        with torch.device(device):
            model: nn.Module = make()
            x = torch.empty(batch, 3, side, side)
        live = Live(x, *model.parameters())
        torch.set_autocast_dtype(device, torch.bfloat16)
        torch.set_autocast_enabled(device, True)  # torch.autocast refuses where there is no GPU
        try:
            with live, torch.set_grad_enabled(kind == 'train'), mock.patch.object(F, 'layer_norm', layer_norm):
                y = model.train(kind == 'train')(x)[-1]
                if kind == 'train':
                    y.float().square().mean().backward()
        finally:
            torch.set_autocast_enabled(device, False)
            torch.clear_autocast_cache()
    return live.peak


_layer_norm = F.layer_norm


def layer_norm(x: Tensor, *args) -> Tensor:
    """In float32, as autocast has it on CUDA."""
    return _layer_norm(x.float(), *args)
