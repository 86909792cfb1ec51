"""Write the classifier or segmentation model of a config and checkpoint as ONNX, torch.export program or AOTInductor.

The file takes images (B, 3, H, W), float32, RGB from 0 to 255, any B, and gives scores before softmax: (B, classes), or
(B, classes, H, W). Normalisation is part of it. It is compared with PyTorch before it is put in place, and both are
timed.
"""

import statistics
import sys
import time
from pathlib import Path

if __name__ == '__main__':
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the repository, in place of this folder

import torch  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import MODELS, init_default_scope  # noqa: E402
from mmengine.runner.checkpoint import CheckpointLoader  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from openmmlab import fit_and_tell  # noqa: E402
from tools.cli import ConfigParser, UserError, check_file, read_config, run  # noqa: E402
from tools.files import whole_file  # noqa: E402
from vision_rwkv.export import FORMATS, ExportError, size_step, smallest_side, to_program  # noqa: E402

CLOSE = 1e-4  # how far scores may be off, where the largest is 1 or less; in proportion where it is more
BATCHES = (1, 3)


class Exported(nn.Module):
    """A model of MMPretrain or MMSegmentation from pixels to scores."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        preprocessor = model.data_preprocessor
        channels = torch.zeros(3, 1, 1)
        self.register_buffer('mean', getattr(preprocessor, 'mean', channels).clone(), persistent=False)
        self.register_buffer('std', getattr(preprocessor, 'std', channels + 1).clone(), persistent=False)
        # MMPretrain's name and MMSegmentation's for turning what OpenMMLab reads, blue first, into RGB.
        self.takes_rgb = getattr(preprocessor, 'to_rgb', getattr(preprocessor, '_channel_conversion', True))
        self.segments = hasattr(model, 'decode_head')

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), RGB from 0 to 255 -> scores (B, classes), or (B, classes, H, W) of segmentation."""
        x = ((images if self.takes_rgb else images.flip(1)) - self.mean) / self.std
        if not self.segments:
            return self.model(x, mode='tensor')
        scores = self.model.decode_head(self.model.extract_feat(x))
        return F.interpolate(scores, images.shape[2:], mode='bilinear', align_corners=self.model.align_corners)


def parse_args():
    """The command line. Raises UserError."""
    parser = ConfigParser(__doc__)
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('--format', choices=FORMATS, required=True)
    parser.add_argument('--out', type=Path, metavar='FILE', help='default: CHECKPOINT with the ending of the format')
    parser.add_argument('--shape', nargs=2, type=int, metavar=('H', 'W'), help="image size (default: the model's)")
    parser.add_argument('--dynamic-size', type=int, metavar='MAX', help='for any size up to MAX a side')
    parser.add_argument('--device', choices=['cpu', 'cuda'], default='cpu', help='of the program; ONNX: cpu')
    parser.add_argument('--runs', type=int, default=10, metavar='N', help='timed ones (%(default)s)')
    args = parser.parse_args()
    suffix = FORMATS[args.format][0]
    name = args.checkpoint.rpartition('/')[2] if '://' in args.checkpoint else args.checkpoint
    args.out = args.out or Path(name).with_suffix(suffix)
    if args.out.suffix != suffix:
        raise UserError(f'--out expects a name that ends in {suffix}, got {args.out}')
    if args.device == 'cuda' and (args.format == 'onnx' or not torch.cuda.is_available()):
        raise UserError('--device cuda: ' + ('ONNX is made on the CPU' if args.format == 'onnx' else 'there is no GPU'))
    if args.runs < 1:
        raise UserError(f'--runs must be at least 1, got {args.runs}')
    return args


def image_sizes(cfg: Config, args, model: nn.Module) -> list[tuple[int, int]]:
    """The sizes to check and time: that of the command line, or of the model, and, for any size, the smallest.

    Raises UserError.
    """
    size = args.shape or (cfg.model.get('test_cfg') or {}).get('crop_size') or cfg.model.backbone.get('img_size', 224)
    sizes = [(size, size) if isinstance(size, int) else tuple(size)]
    least, step, most = 1, 1, max(sizes[0])
    if args.dynamic_size:
        least, step, most = smallest_side(model), size_step(model), args.dynamic_size
        sizes.append((least, least + step))
    for height, width in sizes:
        if min(height, width) < least or max(height, width) > most or height % step or width % step:
            steps = f' in steps of {step}' if step > 1 else ''
            raise UserError(f'the image size must be from {least} to {most}{steps} a side, got {height} {width}')
    return sizes


def build(cfg: Config, checkpoint: str) -> nn.Module:
    """The model of a config with the weights of a checkpoint. Raises UserError, CheckpointError."""
    if cfg.get('model', {}).get('type') not in ('ImageClassifier', 'EncoderDecoder'):
        raise UserError(
            f'{cfg.filename}: only classifiers (ImageClassifier) and segmentation models (EncoderDecoder) can be '
            f'exported, got {cfg.get("model", {}).get("type")}'
        )
    init_default_scope(cfg.default_scope)
    if cfg.get('data_preprocessor'):
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    cfg.model.backbone.init_cfg = None  # the checkpoint has everything
    model = MODELS.build(cfg.model)
    contents = CheckpointLoader.load_checkpoint(checkpoint, 'cpu')
    model.load_state_dict(fit_and_tell(contents, model, checkpoint, start=False).tensors, strict=False)
    return Exported(model)


def check(model: nn.Module, function, sizes: list[tuple[int, int]], device: str) -> float:
    """The largest difference between the model and the file, over batches and sizes. Raises UserError if too large."""
    worst = 0.0
    for height, width in sizes:
        for batch in BATCHES:
            images = 255 * torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
            images = images.to(device)
            with torch.no_grad():
                expected, got = model(images), function(images)
            difference = (got - expected).abs().max().item()
            if got.shape != expected.shape or not difference <= CLOSE * max(1.0, expected.abs().max().item()):
                raise UserError(f'not written: at {batch} x {height} x {width} it differs from PyTorch by {difference}')
            worst = max(worst, difference)
    return worst


def milliseconds(function, images: Tensor, runs: int) -> float:
    """The median time of a call, after one to warm up."""
    times = []
    with torch.no_grad():
        for _ in range(runs + 1):
            start = time.perf_counter()
            function(images)
            if images.is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[1:])


def main() -> None:
    """Export, check, time."""
    args = parse_args()
    cfg = read_config(args)
    check_file(args.checkpoint, 'checkpoint')
    model = build(cfg, args.checkpoint).eval().to(args.device)
    sizes = image_sizes(cfg, args, model)
    height, width = sizes[0]
    largest = (args.dynamic_size, args.dynamic_size) if args.dynamic_size else sizes[0]
    _, write, load = FORMATS[args.format]
    try:
        program = to_program(model, *largest, any_size=bool(args.dynamic_size))
        with whole_file(args.out) as partial:
            write(program, partial)
            function = load(partial)
            worst = check(model, function, sizes, args.device)
    except ExportError as error:
        raise UserError(str(error)) from error

    step, least = size_step(model), smallest_side(model)
    said = f'{height} x {width}'
    if args.dynamic_size:
        said = f'any size from {least} to {args.dynamic_size} a side' + (f' in steps of {step}' if step > 1 else '')
    megabytes = args.out.stat().st_size / 1e6
    print(f'{args.out}: {args.format}, {said}, {megabytes:.1f} MB, differs from PyTorch by {worst:.1e} at most')
    images = torch.zeros(1, 3, height, width, device=args.device)
    exported, own = (milliseconds(f, images, args.runs) for f in (function, model))
    threads = f', {torch.get_num_threads()} threads' if args.device == 'cpu' else ''
    print(f'1 x {height} x {width} on {args.device}{threads}: {exported:.1f} ms, PyTorch {own:.1f} ms')


if __name__ == '__main__':
    run(main)
