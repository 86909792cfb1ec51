"""Models as files that run without their code: torch.export programs, AOTInductor packages and ONNX."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vision_rwkv.backbones.adapter import STRIDES, Adapter
from vision_rwkv.export.lowering import POINTWISE

ONNX_LIMIT = 2_000_000_000  # of weights: protobuf ends at 2 GiB
MOST_IMAGES = 2**20  # in a batch: no limit in practice
BI_WKV, WKV6 = torch.ops.vision_rwkv.bi_wkv.default, torch.ops.vision_rwkv.wkv6.default

Function = Callable[[Tensor], Tensor]


class ExportError(Exception):
    """A model that cannot be written in a format, or a package that is missing for it."""


def size_step(model: nn.Module) -> int:
    """What the sides of images must be multiples of in an export for any size: 32 with the adapter, else 1."""
    return STRIDES[-1] if any(isinstance(part, Adapter) for part in model.modules()) else 1


def smallest_side(model: nn.Module) -> int:
    """The smallest side of an image in an export for any size: two patches of 16, two steps."""
    return max(32, 2 * size_step(model))


def _side(name: str, least: int, most: int, step: int) -> Any:
    if step == 1:
        return Dim(name, min=least, max=most)
    return step * Dim(f'{name}_by_{step}', min=least // step, max=most // step)


def to_program(model: nn.Module, height: int, width: int, any_size: bool = False) -> ExportedProgram:
    """The program of ``model``, which takes float32 images (B, 3, H, W) and returns a tensor, for inference.

    Any number of images, of height x width or, with ``any_size``, of sides from `smallest_side` to these in steps of
    `size_step`. The model becomes one for inference: in evaluation mode and without gradients.
    """
    model.eval().requires_grad_(False)
    sizes: dict[int, Any] = {0: Dim('batch', min=1, max=MOST_IMAGES)}
    if any_size:
        step, least = size_step(model), smallest_side(model)
        sizes |= {2: _side('height', least, height, step), 3: _side('width', least, width, step)}
        # An example that suggests nothing: neither square nor of the size of the position embedding.
        height, width = height // step * step, (width - 1) // step * step
    example = torch.zeros(2, 3, height, width, device=next(model.parameters()).device)
    with torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=(sizes,), strict=False)


def write_torch_export(program: ExportedProgram, path: Path) -> None:
    """A file for torch.export.load. It calls the operators of vision_rwkv.ops, which whoever loads it imports."""
    torch.export.save(program, path)


def write_aot_inductor(program: ExportedProgram, path: Path) -> None:
    """A package, compiled for the device of the model, for torch._inductor.aoti_load_package.

    It calls bi_wkv and wkv6 of vision_rwkv.ops, which whoever loads it imports; what is around them is compiled.
    Raises ExportError where there is no C++ compiler.
    """
    from torch._inductor import aoti_compile_and_package, exc

    try:
        with torch.no_grad():
            aoti_compile_and_package(program.run_decompositions(POINTWISE), package_path=str(path))
    except exc.InvalidCxxCompiler as error:
        raise ExportError(f'AOTInductor needs a C++ compiler, and none was found: {error}') from error


def _most_tokens(program: ExportedProgram) -> int:
    """The most tokens that a WKV operator of the program can meet."""
    most = 1
    for node in program.graph.nodes:
        if node.target in (BI_WKV, WKV6):
            size = node.meta['val'].shape[1]
            if isinstance(size, torch.SymInt):
                size = int(size.node.shape_env.bound_sympy(size.node.expr).upper)
            most = max(most, size)
    return most


def write_onnx(program: ExportedProgram, path: Path) -> None:
    """An ONNX file of standard operators, with input ``images`` and output ``scores``.

    Raises ExportError where onnx or onnxscript is missing, or for a model of ONNX_LIMIT bytes.
    """
    try:
        import onnx  # noqa: F401

        from vision_rwkv.export import wkv
    except ImportError as error:
        raise ExportError(f"ONNX needs pip install 'vision-rwkv[export]', {error.name} is not here") from error
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    if size > ONNX_LIMIT:
        raise ExportError(f'an ONNX file holds {ONNX_LIMIT} bytes at most, and the weights have {size}')
    most = _most_tokens(program)
    table: dict[Any, Callable] = {
        BI_WKV: lambda w, u, k, v: wkv.bi_wkv(w, u, k, v, most),
        WKV6: lambda r, k, v, w, u: wkv.wkv6(r, k, v, w, u, most),
    }
    with torch.no_grad():
        lowered = program.run_decompositions(POINTWISE)
        made = torch.onnx.export(
            lowered,
            dynamo=True,
            verbose=False,
            input_names=['images'],
            output_names=['scores'],
            custom_translation_table=table,
        )
    assert made is not None  # as with dynamo=True
    made.save(path, external_data=False)


def load_torch_export(path: Path) -> Function:
    """The program as a function of images (B, 3, H, W)."""
    return torch.export.load(path).module()


def load_aot_inductor(path: Path) -> Function:
    """The package as a function of images."""
    from torch._inductor import aoti_load_package

    return aoti_load_package(str(path))


def load_onnx(path: Path) -> Function:
    """The file in ONNX Runtime on the CPU, with as many threads as PyTorch, as a function of images.

    Raises ExportError where onnxruntime is missing.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError("ONNX Runtime is missing: pip install 'vision-rwkv[export]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run(None, {'images': images.numpy()})[0])


FORMATS: dict[str, tuple[str, Callable[[ExportedProgram, Path], None], Callable[[Path], Function]]] = {
    'onnx': ('.onnx', write_onnx, load_onnx),
    'torch-export': ('.pt2', write_torch_export, load_torch_export),
    'aot-inductor': ('.pt2', write_aot_inductor, load_aot_inductor),
}
