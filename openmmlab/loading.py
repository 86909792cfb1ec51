"""Loads images, and refuses broken or enormous ones by name."""

import io
import warnings
from pathlib import Path
from typing import Any

from mmcv import transforms
from PIL import Image

ENDINGS = {b'\xff\xd8': b'\xff\xd9', b'\x89P': b'IEND\xaeB`\x82'}  # how JPEG and PNG files begin and end
MAX_PIXELS = 89_478_485  # where Pillow warns: a quarter of a gibibyte of colour


class DataError(ValueError):
    """A file of a data set is not what it should be; the message names it."""


class LoadImageFromFile(transforms.LoadImageFromFile):
    """mmcv's, but a broken image is an error that names the file: OpenCV fills what is missing with grey.

    max_pixels: a larger image is refused before it is decoded.
    """

    def __init__(self, *args: Any, max_pixels: int = MAX_PIXELS, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.max_pixels = max_pixels

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Raises DataError for a file that is missing, cut off, too large or no image."""
        path = results['img_path']
        if Path(path).is_file():  # and not in some remote storage
            check_image_file(path, self.max_pixels)
        try:
            return super().transform(results)
        except AssertionError as error:
            raise DataError(f'image {path}: not an image') from error
        except FileNotFoundError as error:
            raise DataError(f'image {path}: there is no such file') from error


def check_image_file(path: str, max_pixels: int = MAX_PIXELS) -> None:
    """Raise DataError if an image file is empty or has too many pixels, or is a JPEG or PNG that is cut off.

    One that ends as it should is read no further than its header; others (some have a tail) are decoded.
    """
    try:
        with open(path, 'rb') as file:
            start = file.read(2)
            size = file.seek(0, io.SEEK_END)
            file.seek(max(0, size - 8))
            end = file.read()
        if not size:
            raise DataError(f'image {path}: the file is empty')
        check_pixels(path, max_pixels)
        ending = ENDINGS.get(start)
        if ending is None or end.endswith(ending):
            return
        with Image.open(path) as image:
            image.load()
    except Image.UnidentifiedImageError as error:
        raise DataError(f'image {path}: cut off in its header') from error
    except (OSError, SyntaxError) as error:
        raise DataError(f'image {path}: {error}') from error


def check_pixels(path: str, max_pixels: int = MAX_PIXELS) -> None:
    """Raise DataError if the header of an image file promises more pixels; a file unknown to Pillow is let through."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)
            with Image.open(path) as image:
                width, height = image.size
    except Image.UnidentifiedImageError:
        return
    except Image.DecompressionBombError as error:  # twice what Pillow warns of; its own limit
        raise DataError(f'image {path}: {error}') from error
    if width * height > max_pixels:
        raise DataError(
            f'image {path}: {width} x {height} pixels, expected at most {max_pixels} '
            '(max_pixels of the transform that loads it)'
        )
