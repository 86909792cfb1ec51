"""Export: a model as a torch.export program, an AOTInductor package or an ONNX file, and each of them loaded again."""

from vision_rwkv.export.formats import FORMATS, ExportError, size_step, smallest_side, to_program

__all__ = ['FORMATS', 'ExportError', 'size_step', 'smallest_side', 'to_program']
