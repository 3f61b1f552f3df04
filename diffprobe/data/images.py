"""Reading photographs safely, and fitting an image and its masks to a model's size by the same geometry.

Images are RGB, 8 bits a channel, upright, on white where they were transparent; masks are (object, y, x) bool.  Sizes are
(height, width).  The invariant: `fit_image` and `fit_masks` use the same geometry, so a mask still covers its object.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# only decoders of photographs: others (EPS, PDF) run programs or fetch files
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "DIB", "TIFF", "GIF", "PPM")
FITS = ("crop", "squash", "pad")
MAX_PIXELS = 100_000_000
WHITE = (255, 255, 255)
_SAMPLE_FORMAT = 339  # of TIFF's tags


class ImageError(ValueError):
    """An image that cannot be used; the message names the file, the reason and what to do."""


class UnavailableError(ImageError):
    """An image that may be intact but could not be read: disk, folder, memory or number of open files failed."""


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS, upright: bool = True) -> Image.Image:
    """Reads a photograph as RGB: the first frame, upright, transparency on white, 16 bits converted to 8.

    Args:
        max_pixels: Larger images are refused before they are decoded.
        upright: Turn the image as its EXIF note says; otherwise its pixels stay as stored.

    Raises:
        ImageError: the file is missing, empty, broken, cut off, too large or no image.
    """
    return _read(Path(path), Path(path), max_pixels, upright)


def stored_size(path: Path) -> tuple[int, int, int]:
    """Width and height of an image as stored, and its EXIF orientation (1: upright).

    Raises:
        ImageError: the header cannot be read, as for `read_image`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as image:
                turned = 1
                with contextlib.suppress(Exception):  # as in `to_rgb`
                    turned = image.getexif().get(ExifTags.Base.Orientation, 1)
                return image.width, image.height, turned
    except Exception as error:
        raise refusal(path, error) from error


def decode_image(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """`read_image` for an image inside another file, such as a cell of a Parquet table; messages call it `name`.

    Raises:
        ImageError: as for `read_image`.
    """
    if not data:
        raise ImageError(f"'{name}' is empty (0 bytes); copy it again or remove it.")
    return _read(Path(name), io.BytesIO(data), max_pixels, True)


def _read(path: Path, source: Path | IO[bytes], max_pixels: int, upright: bool) -> Image.Image:
    try:
        # Pillow warns about odd metadata of good files; its warning about sizes is our own check below
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(source, formats=FORMATS) as image:
                _check_size(path, image, max_pixels)
                image.load()
                _check_size(path, image, max_pixels)
                return to_rgb(image, str(path), upright)
    except ImageError:
        raise
    except Exception as error:  # a decoder may raise anything on a broken file
        raise refusal(path, error) from error


def _check_size(path: Path, image: Image.Image, max_pixels: int) -> None:
    pixels = image.width * image.height
    if pixels == 0:
        raise ImageError(f"'{path}' is an image of {image.width} x {image.height} pixels; remove it or export it again.")
    if pixels > max_pixels:
        raise ImageError(
            f"'{path}' has {image.width} x {image.height} pixels, more than the limit of {max_pixels:,}; "
            "make it smaller, or raise max_pixels if it is meant to be this large."
        )


def refusal(path: Path, error: Exception) -> ImageError:
    """The error for a file that Pillow could not read: `UnavailableError` where the system refused, else `ImageError`."""
    if isinstance(error, FileNotFoundError):
        return UnavailableError(f"'{path}' does not exist; check the name, or list the folder again.")
    if isinstance(error, IsADirectoryError):
        return ImageError(f"'{path}' is a folder, not an image; name a file in it.")
    if isinstance(error, PermissionError):
        return UnavailableError(f"'{path}' may not be read by this user; change its permissions.")
    if isinstance(error, Image.DecompressionBombError):
        return ImageError(f"'{path}' is far too large to decode safely ({error}); make it smaller.")
    if isinstance(error, MemoryError):
        return UnavailableError(f"'{path}' needs more memory than there is; make it smaller, or free some.")
    if isinstance(error, OSError) and error.errno is not None:  # errors of decoders have no number
        return UnavailableError(f"'{path}' could not be read ({os.strerror(error.errno)}); try again once it can.")
    if isinstance(error, UnidentifiedImageError):
        if path.is_file() and path.stat().st_size == 0:
            return ImageError(f"'{path}' is empty (0 bytes); copy it again or remove it.")
        return ImageError(
            f"'{path}' is not an image in a known format ({', '.join(FORMATS)}), or of a kind of pixel that is not read; "
            "convert it to a PNG of 8 bits, or remove it."
        )
    return ImageError(f"'{path}' is broken or cut off ({type(error).__name__}: {error}); copy it again or remove it.")


def to_rgb(image: Image.Image, name: str = "image", upright: bool = True) -> Image.Image:
    """An RGB copy: upright, transparency on white, 16 bits converted to 8.

    Raises:
        ImageError: the grey values are neither of 8 nor of 16 bits; the message calls the image `name`.
    """
    unsigned = getattr(image, "tag_v2", {}).get(_SAMPLE_FORMAT) in (1, (1,))
    if upright:
        with contextlib.suppress(Exception):  # the pixels are loaded, whatever their EXIF note
            image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey(image, name, unsigned).convert("RGB")
    if image.has_transparency_data:
        clear = image.info.get("transparency")
        if isinstance(clear, tuple) and max(clear) > 255:  # 16 bits, and Pillow's pixels have the upper 8
            image = image.copy()
            image.info["transparency"] = tuple(value >> 8 for value in clear)
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, (*WHITE, 255)), layer).convert("RGB")
    # a copy even of an RGB image: the original's file closes when `read_image` returns
    return image.convert("RGB") if image.mode != "RGB" else image.copy()


def _deep_grey(image: Image.Image, name: str, unsigned: bool) -> Image.Image:
    """Converts grey of 16 bits, or floats from 0 to 1, to 8 bits; Pillow's own conversion would clip at 255."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "I" and unsigned:
        values %= 2.0**32  # Pillow reads unsigned numbers as signed ones
    white = 1.0 if image.mode == "F" else 65535.0
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= white):
        raise ImageError(
            f"'{name}' holds grey values from {values.min():g} to {values.max():g}, where 0 to {white:g} was expected; "
            "convert it to 8 or 16 bits."
        )
    if image.mode == "I" and values.max() <= 255:
        white = 255.0  # 32 bits do not define white: such small values are 8 bits in a wide type
    pixels = np.rint(values * (255 / white))
    if isinstance(clear := image.info.get("transparency"), int):
        pixels[values == clear] = 255
    return Image.fromarray(pixels.astype(np.uint8))


Box = tuple[float, float, float, float]


def geometry(source: tuple[int, int], size: tuple[int, int], fit: str) -> tuple[Box, tuple[int, int], tuple[int, int]]:
    """How an image is fitted: the box of the source that is kept, its new (width, height), and its new corner (x, y).

    Args:
        source: (height, width).
        size: (height, width) to fit to.
        fit: As for `fit_image`.
    """
    if fit not in FITS:
        raise ValueError(f"Fit {fit!r} is not one of {', '.join(FITS)}.")
    (height, width), (to_height, to_width) = source, size
    if min(height, width, to_height, to_width) < 1:
        raise ValueError(f"Cannot fit {height} x {width} pixels to {to_height} x {to_width}: every side must be at least 1.")
    if fit == "crop":
        scale = max(to_height / height, to_width / width)
        keep_width, keep_height = to_width / scale, to_height / scale
        left, top = max(0.0, (width - keep_width) / 2), max(0.0, (height - keep_height) / 2)
        return (left, top, min(width, left + keep_width), min(height, top + keep_height)), (to_width, to_height), (0, 0)
    whole = (0.0, 0.0, float(width), float(height))
    if fit == "squash":
        return whole, (to_width, to_height), (0, 0)
    scale = min(to_height / height, to_width / width)
    drawn = (max(1, round(width * scale)), max(1, round(height * scale)))
    return whole, drawn, ((to_width - drawn[0]) // 2, (to_height - drawn[1]) // 2)


def fit_image(image: Image.Image, size: tuple[int, int], fit: str = "crop") -> Image.Image:
    """Fits an image to `size`, (height, width), as RGB; EXIF notes are ignored, because masks belong to stored pixels.

    Args:
        fit: "crop" scales the shorter side and keeps the middle, "squash" changes the proportions, "pad" adds white.

    >>> fit_image(Image.new("RGB", (300, 200)), (64, 96), "pad").size
    (96, 64)
    """
    if image.mode != "RGB":
        image = to_rgb(image, upright=False)
    box, drawn, corner = geometry((image.height, image.width), size, fit)
    # the box is resampled, not the whole image cropped afterwards: a 10 x 100000 image would fill the memory
    scaled = image.resize(drawn, Image.Resampling.LANCZOS, box=box)
    if drawn == (size[1], size[0]):
        return scaled
    canvas = Image.new("RGB", (size[1], size[0]), WHITE)
    canvas.paste(scaled, corner)
    return canvas


def normalised_pixels(image: Image.Image) -> np.ndarray:
    """An RGB image as diffusion models take it: (3, y, x) in float32 from -1 to 1.

    >>> normalised_pixels(Image.new("RGB", (2, 1), (0, 0, 255)))[:, 0, 0].tolist()
    [-1.0, -1.0, 1.0]
    """
    return np.asarray(image, np.float32).transpose(2, 0, 1) / np.float32(127.5) - np.float32(1)


def fit_masks(masks: np.ndarray, size: tuple[int, int], fit: str = "crop") -> np.ndarray:
    """Fits masks (object, y, x) to `size` as `fit_image` does; a pixel is inside when at least half of its area was.

    >>> masks = np.zeros((1, 4, 8), bool)
    >>> masks[0, :, :4] = True
    >>> fit_masks(masks, (2, 2), "crop").astype(int).tolist()
    [[[1, 0], [1, 0]]]
    """
    fitted = np.zeros((len(masks), *size), bool)
    if not len(masks):
        return fitted
    box, (width, height), (left, top) = geometry(masks.shape[1:], size, fit)
    for index, mask in enumerate(masks):
        area = Image.fromarray(mask.astype(np.float32)).resize((width, height), Image.Resampling.BOX, box=box)
        fitted[index, top : top + height, left : left + width] = np.asarray(area) >= 0.5
    return fitted
