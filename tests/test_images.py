"""Reading images of every kind, refusing what is none, and keeping masks where their objects are."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffprobe.data.images import FITS, ImageError, decode_image, fit_image, fit_masks, read_image


def pixel(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    assert image.mode == "RGB"
    return tuple(int(v) for v in np.asarray(image)[y, x])


def png(width: int, height: int, depth: int, colour: int, rows: bytes, transparent: bytes = b"") -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    header += chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces a size and has next to no data."""
    return png(width, height, 8, 2, b"\0" * 99)


def tiff(values: np.ndarray, kind: int, end: str = "<", photometric: int = 1) -> bytes:
    """One row of grey in a TIFF; `kind` 1 is unsigned, 2 signed, 3 float."""
    data, bits = values.tobytes(), 8 * values.itemsize
    tags = [(256, 3, len(values)), (257, 3, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8), (277, 3, 1),
            (278, 3, 1), (279, 4, len(data)), (339, 3, kind)]  # fmt: skip
    head = (b"II*\0" if end == "<" else b"MM\0*") + struct.pack(f"{end}I", 8 + len(data))
    rows = [
        struct.pack(f"{end}HHI", n, t, 1) + struct.pack(f"{end}HH" if t == 3 else f"{end}I", v, *[0] * (t == 3))
        for n, t, v in tags
    ]
    return head + data + struct.pack(f"{end}H", len(tags)) + b"".join(rows) + struct.pack(f"{end}I", 0)


def test_palette_and_grey(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4), (200, 30, 40)).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "p.png")
    Image.new("L", (4, 4), 77).save(tmp_path / "l.png")
    Image.new("1", (4, 4), 1).save(tmp_path / "1.png")
    assert pixel(read_image(tmp_path / "p.png")) == (200, 30, 40)
    assert pixel(read_image(tmp_path / "l.png")) == (77, 77, 77)
    assert pixel(read_image(tmp_path / "1.png")) == (255, 255, 255)


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 128))
    half.putpixel((1, 0), (0, 0, 0, 0))
    half.save(tmp_path / "rgba.png")
    image = read_image(tmp_path / "rgba.png")
    assert pixel(image) == pytest.approx((255, 127, 127), abs=1) and pixel(image, 1) == (255, 255, 255)
    Image.new("LA", (2, 2), (0, 0)).save(tmp_path / "la.png")
    assert pixel(read_image(tmp_path / "la.png")) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 3)
    palette.putpalette([10, 20, 30] * 8)
    palette.save(tmp_path / "p.png", transparency=3)
    assert pixel(read_image(tmp_path / "p.png")) == (255, 255, 255)


@pytest.mark.parametrize(
    ("colour", "pixels", "clear", "expected"),
    [(0, [1000, 40000], [1000], [255, 156]), (2, [1000, 2000, 3000, 40000, 40000, 40000], [1000, 2000, 3000], [255, 156]),
     (0, [1001, 1000], [1000], [4, 255]), (2, [0, 0, 0, 40000, 40000, 40000], [0, 0, 0], [255, 156])],
)  # fmt: skip
def test_the_transparent_colour_of_sixteen_bits(colour: int, pixels: list[int], clear: list[int], expected: list[int]) -> None:
    numbers = lambda values: struct.pack(f">{len(values)}H", *values)  # noqa: E731
    image = decode_image(png(2, 1, 16, colour, b"\0" + numbers(pixels), numbers(clear)), "deep.png")
    assert np.asarray(image)[0, :, 0].tolist() == expected


def test_integers_of_32_bits_in_a_tiff() -> None:
    read = lambda values, kind, **options: np.asarray(decode_image(tiff(values, kind, **options), "x.tif"))[0, :, 0].tolist()  # noqa: E731
    assert read(np.array([0, 100, 255], "<i4"), 2) == [0, 100, 255], "8 bits in a wide cell"
    assert read(np.array([0, 32768, 65535], "<u4"), 1) == [0, 128, 255]
    assert read(np.array([0, 1000, 65535], ">i4"), 2, end=">") == [0, 4, 255]
    assert read(np.array([0, 1000, 255], "<u2"), 1) == [0, 4, 1], "16 bits say what they are"
    for values, kind, words in (
        (np.array([0, 2**31, 2**32 - 1], "<u4"), 1, "grey values from 0 to 4.29497e"),
        (np.array([-5, 7], "<i4"), 2, "grey values from -5 to 7"),
        (np.array([0.0, 0.5], "<f8"), 3, "not an image in a known format .* or of a kind of pixel that is not read"),
        (np.array([0, 7], ">u4"), 1, "or of a kind of pixel"),
    ):
        with pytest.raises(ImageError, match=words):
            read(values, kind, end=">" if values.dtype.byteorder == ">" else "<")


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P", "I;16", "CMYK", "RGBA"])
@pytest.mark.parametrize("fit", FITS)
def test_images_of_a_users_own_dataset_may_have_any_mode(mode: str, fit: str) -> None:
    grey = Image.new("L", (8, 6), 255)
    image = Image.fromarray(np.full((6, 8), 65535, np.uint16)) if mode == "I;16" else grey.convert(mode)
    assert np.asarray(fit_image(image, (4, 4), fit)).tolist() == [[[255, 255, 255]] * 4] * 4


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=95)
    red, green, blue = pixel(read_image(tmp_path / "cmyk.jpg"))
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    ramp = np.array([[0, 255, 32768, 65535]], np.uint16)
    Image.fromarray(ramp).save(tmp_path / f"deep.{suffix}")
    assert np.asarray(read_image(tmp_path / f"deep.{suffix}"))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_long_integers_and_floats(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 32768, 65535]], np.int32)).save(tmp_path / "i.tif")
    Image.fromarray(np.array([[0, 0.5, 1]], np.float32)).save(tmp_path / "f.tif")
    assert np.asarray(read_image(tmp_path / "i.tif"))[0, :, 1].tolist() == [0, 128, 255]
    assert np.asarray(read_image(tmp_path / "f.tif"))[0, :, 1].tolist() == [0, 128, 255]
    Image.fromarray(np.array([[0, 70000]], np.int32)).save(tmp_path / "wide.tif")
    with pytest.raises(ImageError, match=r"wide.tif' holds grey values from 0 to 70000, where 0 to 65535"):
        read_image(tmp_path / "wide.tif")


def test_exif_rotation_is_undone(tmp_path: Path) -> None:
    stored = Image.new("RGB", (40, 20), "blue")
    stored.paste((255, 0, 0), (0, 0, 20, 20))  # red on the left; turned clockwise (6) it is on top
    exif = Image.Exif()
    exif[0x0112] = 6
    stored.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    image = read_image(tmp_path / "turned.jpg")
    assert image.size == (20, 40)
    assert pixel(image, 10, 5)[0] > 200 and pixel(image, 10, 35)[2] > 200


def test_unreadable_exif_does_not_cost_the_image(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "lime").save(tmp_path / "odd.jpg", exif=b"Exif\0\0no such thing")
    assert pixel(read_image(tmp_path / "odd.jpg"))[1] > 240


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_the_first_frame_of_an_animation(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    frames[0].save(tmp_path / f"moving.{suffix}", save_all=True, append_images=frames[1:])
    red, green, blue = pixel(read_image(tmp_path / f"moving.{suffix}"))
    assert red > 240 and green < 15 and blue < 15


def test_a_phone_photo_with_a_second_picture(tmp_path: Path) -> None:
    photo, depth = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (4, 4), "blue")
    photo.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[depth])
    image = read_image(tmp_path / "phone.jpg")
    assert image.size == (16, 16) and pixel(image)[0] > 240


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_cut_off_files_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(noise).save(path)
    read_image(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ImageError, match=rf"cut.{suffix}'.*(broken or cut off|not an image)"):
        read_image(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"<html>not found</html>", "is not an image in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is not an image in a known format"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "(broken or cut off|not an image)"),
        (png_header(30_000, 30_000), "far too large to decode safely"),
        (png_header(12_000, 9_000), "12000 x 9000 pixels, more than the limit of 100,000,000"),
        (png_header(9_500, 9_900), "broken or cut off"),  # under the limit: refused for its data, not its size
    ],
)
def test_what_is_no_usable_image_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=rf"photo.png'.*{reason}.*(remove|smaller|again)"):
        read_image(path)


def test_the_limit_is_the_callers(tmp_path: Path) -> None:
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", max_pixels=200).size == (20, 10)
    with pytest.raises(ImageError, match="20 x 10 pixels, more than the limit of 199"):
        read_image(tmp_path / "a.png", max_pixels=199)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none.png' does not exist"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="is a folder, not an image"):
        read_image(tmp_path)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("source", [(90, 160), (160, 90), (50, 61), (301, 200)])
@pytest.mark.parametrize("size", [(96, 96), (64, 120)])
def test_a_mask_stays_on_its_object(fit: str, source: tuple[int, int], size: tuple[int, int]) -> None:
    mask = np.zeros((1, *source), bool)
    mask[0, source[0] // 5 : source[0] // 2, source[1] // 3 : 5 * source[1] // 7] = True
    pixels = np.where(mask[0, ..., None], (255, 0, 0), (0, 0, 0)).astype(np.uint8)
    image = np.asarray(fit_image(Image.fromarray(pixels), size, fit)).astype(int)
    fitted = fit_masks(mask, size, fit)[0]
    assert image.shape == (*size, 3) and fitted.shape == size
    drawn = (image[..., 0] > 127) & (image[..., 1] < 127)
    assert (drawn & fitted).sum() / (drawn | fitted).sum() > 0.95
    for ours, theirs in zip(np.argwhere(drawn).mean(0), np.argwhere(fitted).mean(0), strict=True):
        assert abs(ours - theirs) < 0.51


def test_crop_keeps_the_middle_and_the_proportions() -> None:
    columns = np.tile(np.arange(200, dtype=np.uint8), (100, 1))
    image = np.asarray(fit_image(Image.fromarray(columns).convert("RGB"), (50, 50), "crop"))[25, :, 0].astype(int)
    assert abs(image[0] - 50) <= 2 and abs(image[-1] - 149) <= 2


def test_pad_adds_white_and_squash_fills() -> None:
    wide = Image.new("RGB", (100, 50), "red")
    padded = fit_image(wide, (100, 100), "pad")
    assert pixel(padded, 50, 10) == (255, 255, 255) and pixel(padded, 50, 50) == (255, 0, 0)
    assert pixel(fit_image(wide, (100, 100), "squash"), 50, 10) == (255, 0, 0)
    assert fit_masks(np.ones((1, 50, 100), bool), (100, 100), "pad").mean() == 0.5


def test_extreme_proportions_take_no_memory() -> None:
    assert fit_image(Image.new("RGB", (100_000, 2)), (512, 512), "crop").size == (512, 512)
    assert fit_image(Image.new("RGB", (100_000, 2)), (64, 64), "pad").size == (64, 64)


def test_no_objects_give_no_masks() -> None:
    assert fit_masks(np.zeros((0, 1, 1), bool), (8, 9)).shape == (0, 8, 9)


def test_bad_fits_are_refused() -> None:
    with pytest.raises(ValueError, match="'stretch' is not one of crop, squash, pad"):
        fit_image(Image.new("RGB", (4, 4)), (2, 2), "stretch")
    with pytest.raises(ValueError, match="every side must be at least 1"):
        fit_image(Image.new("RGB", (4, 4)), (0, 2))
