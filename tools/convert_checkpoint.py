"""Write the model of any checkpoint, and nothing else, as a clean file: our tensor names, no metadata to unpickle."""

import argparse
import sys
from pathlib import Path

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, in place of this folder

import torch  # noqa: E402

from tools.files import whole_file  # noqa: E402
from vision_rwkv.checkpoints import CheckpointError, read, to_our_names  # noqa: E402

SUFFIXES = ('.pth', '.safetensors')


def write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write ``tensors`` whole or not at all, as {'state_dict': tensors} or, by the suffix, as safetensors."""
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as partial:
        if path.suffix == '.safetensors':
            from safetensors.torch import save_file

            save_file(tensors, partial, metadata={'format': 'pt'})
        else:
            torch.save({'state_dict': tensors}, partial)


def main() -> None:
    """Read, rename, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('checkpoint', help='file or URL, in any layout')
    parser.add_argument('out', type=Path, help=f'file to write; its name ends in {" or ".join(SUFFIXES)}')
    args = parser.parse_args()
    try:
        if args.out.suffix not in SUFFIXES:
            raise CheckpointError(f'expected a name that ends in {" or ".join(SUFFIXES)}, got {args.out}')
        tensors = to_our_names(read(args.checkpoint))
        write(tensors, args.out)
    except (CheckpointError, OSError) as error:
        sys.exit(f'convert_checkpoint.py: error: {error}')
    print(
        f'{args.out}: {len(tensors)} tensors, {sum(tensor.numel() for tensor in tensors.values()) / 1e6:.1f}M numbers'
    )


if __name__ == '__main__':
    main()
