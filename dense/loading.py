"""Loads images, and refuses broken ones by name."""

import io
from pathlib import Path
from typing import Any

from mmcv import transforms
from PIL import Image

ENDINGS = {b'\xff\xd8': b'\xff\xd9', b'\x89P': b'IEND\xaeB`\x82'}  # how JPEG and PNG files begin and end


class LoadImageFromFile(transforms.LoadImageFromFile):
    """mmcv's, but a broken image is an error that names the file: OpenCV fills what is missing with grey."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Raises ValueError for a file that is cut off or no image."""
        path = results['img_path']
        if Path(path).is_file():  # and not in some remote storage
            check_image_file(path)
        try:
            return super().transform(results)
        except AssertionError as error:
            raise ValueError(f'image {path}: not an image') from error


def check_image_file(path: str) -> None:
    """Raise ValueError if an image file is empty, or if it is a JPEG or PNG file that is cut off.

    One that ends as it should is read no further; others (some have a tail) are decoded.
    """
    with open(path, 'rb') as file:
        start = file.read(2)
        size = file.seek(0, io.SEEK_END)
        file.seek(max(0, size - 8))
        end = file.read()
    if not size:
        raise ValueError(f'image {path}: the file is empty')
    ending = ENDINGS.get(start)
    if ending is None or end.endswith(ending):
        return
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f'image {path}: {error}') from error
