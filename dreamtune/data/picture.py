"""One picture file -> 8-bit sRGB: which formats are opened, how large, and what values mean.

Formats are named one by one: others run programs (PostScript), or are no photos. The size is looked
at before anything is decoded.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageCms, JpegImagePlugin, UnidentifiedImageError

# MPO, of phones, is opened as a JPEG.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA")
# HEIC is a photo's format that Pillow does not read: it is named, not passed over.
SUFFIXES = frozenset(
    (
        ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".mpo",
        ".avif", ".heic", ".heif", ".jp2", ".ppm", ".tga",
    )
)  # fmt: skip
MAX_BYTES = 256 << 20
MAX_PIXELS = 160_000_000  # the largest medium format has 151 million
MAX_JPEG_PIXELS = (
    260_000_000  # phones have 200 million; a JPEG is decoded at a fraction of its size
)
MAX_RATIO = 20  # of the long side to the short one; at 1:1000 a square crop is a blur of one row
# Depths that wide files are known to hold. A photo whose brightest value is below a quarter of the
# scale is not one of 16 bits: even in the dark something shines.
DEPTHS = (8, 10, 12, 14, 16, 24)
OVERSHOOT = 1.1  # what a filter may leave above 1 in floating point

BITS, PHOTOMETRIC, SAMPLE_FORMAT, ORIENTATION = 258, 262, 339, 274  # TIFF's tags
SIGNED, WHITE_IS_ZERO = 2, 0
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(ValueError):
    """Bytes that are no picture, or a damaged one, or one that is not to be decoded."""


def decode(data: bytes, side: int | None = None) -> Image.Image:
    """The first frame, upright, as 8-bit sRGB; transparent parts on white.

    side: the short side is shrunk to this many pixels if it is longer.

    Raises UnreadableImage with the reason.
    """
    if not data:
        raise UnreadableImage("the file is empty")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = opened(data)
        check_size(image)
        if side:
            image.draft("RGB", (2 * side, 2 * side))  # a JPEG, decoded at 1/2, 1/4 or 1/8
        try:
            image.load()
        except Exception as error:  # a decoder raises what it likes on damaged bytes
            raise UnreadableImage(str(error) or type(error).__name__) from None
        turn = TURNS.get(orientation(image))
        profile = image.info.get("icc_profile")
        factor = min(image.size) // (2 * side) if side else 1
        if is_wide(image):
            image = eight_bits(image)
        elif factor > 1 and image.mode in ("L", "RGB", "RGBA") and "transparency" not in image.info:
            image = image.reduce(factor)  # a large picture is made small before it is copied
        if turn is not None:
            image = image.transpose(turn)
        return shrunk(to_rgb(image, profile), side)


def opened(data: bytes) -> Image.Image:
    """The picture with its header read."""
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        raise UnreadableImage("it is not an image of a known format") from None
    except Image.DecompressionBombError as error:
        # Pillow's own limit is below a phone's; a JPEG need not be decoded at its size
        if not data.startswith(b"\xff\xd8"):
            raise UnreadableImage(str(error)) from None
    except Exception as error:
        raise UnreadableImage(str(error) or type(error).__name__) from None
    try:
        return JpegImagePlugin.jpeg_factory(io.BytesIO(data))
    except Exception as error:
        raise UnreadableImage(str(error) or type(error).__name__) from None


def check_size(image: Image.Image) -> None:
    short, long = sorted(image.size)
    limit = MAX_JPEG_PIXELS if image.format in ("JPEG", "MPO") else MAX_PIXELS
    if short * long > limit:
        raise UnreadableImage(
            f"it has {short * long / 1e6:.0f} megapixels, at most {limit / 1e6:.0f} are read; make "
            "it smaller"
        )
    if long > MAX_RATIO * short:
        raise UnreadableImage(
            f"it is {image.width} x {image.height} pixels: its long side is more than {MAX_RATIO} "
            "times its short one; crop it"
        )


def shrunk(image: Image.Image, side: int | None) -> Image.Image:
    if not side or min(image.size) <= side:
        return image
    scale = side / min(image.size)
    width, height = (max(side, round(x * scale)) for x in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def orientation(image: Image.Image) -> int:
    """By EXIF or XMP; 1, upright, where they are damaged."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # as with decoders
        return 1


def to_rgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """8-bit sRGB of any mode of 8 bits, on white."""
    grey = image.mode in ("1", "L", "LA", "La")
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if grey or image.mode != "CMYK":
            # a palette too: its colours are in the profile's space
            image = image.convert("L" if grey else "RGB")
    except ValueError as error:  # there is no conversion, from Lab for one
        raise UnreadableImage(str(error)) from None
    return srgb(image, profile) if profile else image.convert("RGB")


def srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The colours that the profile means; the numbers as they are where it does not parse, or is of
    another kind of picture.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image.convert("RGB")
    return converted or image.convert("RGB")


def is_wide(image: Image.Image) -> bool:
    """Whether its values are not 0 to 255."""
    return image.mode.startswith("I") or image.mode == "F" or is_signed(image)


def is_signed(image: Image.Image) -> bool:
    return tag(image, SAMPLE_FORMAT) == SIGNED


def tag(image: Image.Image, number: int) -> int | None:
    """A whole number of a TIFF file, the first of several."""
    found = getattr(image, "tag_v2", {}).get(number)
    first = found[0] if isinstance(found, tuple) and found else found
    return first if isinstance(first, int) else None


def eight_bits(image: Image.Image) -> Image.Image:
    """Greys of wide values as 8 bits, by the depth that the file states or keeps to.

    Raises UnreadableImage where nothing tells what is black or white.
    """
    values = np.asarray(image)
    if is_signed(image):
        values = values.view(np.int8) if image.mode == "L" else values
    elif values.dtype == np.int32:
        values = values.view(np.uint32)  # Pillow has one kind of 32 bits
    if count := int(values.size - np.isfinite(values).sum()):
        raise UnreadableImage(f"{count} of its values are not finite; convert it to 8 bits")
    low, high = values.min().item(), values.max().item()
    real = image.mode == "F" and not (high > 1 and np.array_equal(values, np.round(values)))
    if low < (1 - OVERSHOOT if real else 0):
        raise UnreadableImage(
            f"its values go down to {low:g}, and nothing tells what is black; convert it to 8 bits"
        )
    if real and high > OVERSHOOT:
        raise UnreadableImage(
            f"its floating-point values go up to {high:g}, and only 0 to 1 tells what is white; "
            "convert it to 8 bits"
        )
    top = 1.0 if real else 2.0 ** depth(image, high) - 1
    grey = np.clip(values / np.float32(top), 0, 1)
    if tag(image, PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = 1 - grey
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey[values == key] = 1
    return Image.fromarray((grey * 255).round().astype(np.uint8))


def depth(image: Image.Image, high: float) -> int:
    """Bits of white, where `high` is the largest value that occurs."""
    if image.format in ("PPM", "JPEG2000"):
        return 16  # Pillow has scaled them by what they state
    stated = tag(image, BITS) or 16
    full = stated - is_signed(image)
    if full in DEPTHS and full < 16:
        return full
    return next((bits for bits in DEPTHS if bits < full and high < 2**bits), full)
