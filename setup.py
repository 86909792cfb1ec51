"""Builds the native operators of kernels/ into vision_rwkv/_native*.so: no Python ABI, loaded through torch.ops.

CPU code needs a C++ compiler, CUDA code nvcc and a CUDA build of PyTorch; what is missing is left out with a warning
and the PyTorch implementation serves. TORCH_CUDA_ARCH_LIST is honoured. VISION_RWKV_CUDA=0 leaves the CUDA code out,
VISION_RWKV_CUDA=1 makes a build without it an error.
"""

import glob
import os
import sys
import sysconfig
import warnings

from setuptools import setup

CUDA_ARCHITECTURES = '8.0;8.6;8.9;9.0;12.0+PTX'  # where no GPU is visible and the user names none


def import_torch():
    """torch.utils.cpp_extension, or None. An isolated build hides the environment's PyTorch: look where it lives."""
    try:
        from torch.utils import cpp_extension
    except ImportError:
        sys.path.append(sysconfig.get_path('purelib'))
        try:
            from torch.utils import cpp_extension
        except ImportError:
            return None
    return cpp_extension


def cuda_sources(cpp_extension) -> list[str]:
    """The CUDA files, if they can be compiled here for this PyTorch."""
    import torch

    wish = os.environ.get('VISION_RWKV_CUDA', 'auto')
    problem = None
    if not torch.version.cuda:
        problem = 'this PyTorch was built without CUDA'
    elif not cpp_extension.CUDA_HOME:
        problem = 'nvcc was not found'
    if wish == '1' and problem:
        raise SystemExit(f'VISION_RWKV_CUDA=1, but {problem}')
    if wish == '0' or problem:
        return []
    if not torch.cuda.is_available():
        os.environ.setdefault('TORCH_CUDA_ARCH_LIST', CUDA_ARCHITECTURES)
    return sorted(glob.glob('kernels/*/*_cuda*.cu'))


def native_build() -> dict:
    """setup() arguments that build the library, or none where PyTorch is not in sight."""
    cpp_extension = import_torch()
    if cpp_extension is None:
        warnings.warn('PyTorch not found: building vision_rwkv without native operators', stacklevel=1)
        return {}
    gpu = cuda_sources(cpp_extension)
    openmp = [] if sys.platform == 'darwin' else ['-fopenmp']
    extension = cpp_extension.CppExtension(
        'vision_rwkv._native',
        sorted(glob.glob('kernels/*/*_cpu*.cpp')) + gpu,
        include_dirs=[os.path.abspath('kernels')],
        libraries=['c10_cuda'] if gpu else [],
        # No -march: the kernels choose their vector width at run time. Whoever loads the library has loaded PyTorch.
        extra_compile_args={'cxx': ['-O3', '-g0', '-fno-math-errno', *openmp], 'nvcc': ['-O3', '--threads=2']},
        extra_link_args=openmp,
        py_limited_api=True,
    )

    class BuildNative(cpp_extension.BuildExtension):
        """Builds what the machine can build; a failure is a warning unless the CUDA code was asked for."""

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                if os.environ.get('VISION_RWKV_CUDA') == '1':
                    raise
                warnings.warn(
                    f'no native operators, the PyTorch implementation will serve (slower): {error}', stacklevel=1
                )
                self.extensions = []

    return {
        'ext_modules': [extension],
        'cmdclass': {'build_ext': BuildNative.with_options(no_python_abi_suffix=True)},
        'options': {'bdist_wheel': {'py_limited_api': 'cp310'}},
    }


setup(**native_build())
