"""Kinds of files that lie in folders of photos, and what is to come of each.

Each writes a file beside a sound photo, `ok.png`. `expected` is the picture as (h, w, 3) in
0..255, or what is said instead: REFUSED, an error that names the file, or SKIPPED, its name among
those that were left out.
"""

from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms

REFUSED, SKIPPED = "refused", "skipped"
WIDTH, HEIGHT = 48, 32


@dataclass(frozen=True)
class Kind:
    name: str
    file: str  # its name in the folder
    write: Callable[[Path], object]
    expected: np.ndarray | str
    tolerance: float = 4.0  # mean absolute difference, of 255: lossy formats


def ramp() -> np.ndarray:
    """Red along the width, green along the height."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    planes = [x * 255 // (WIDTH - 1), y * 255 // (HEIGHT - 1), np.full_like(x, 60)]
    return np.stack(planes, -1).astype(np.uint8)


def grey() -> np.ndarray:
    return np.repeat(np.arange(WIDTH)[None] * 255 // (WIDTH - 1), HEIGHT, 0).astype(np.uint8)


def rgb(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, -1) if values.ndim == 2 else values


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def bytes_kind(
    name: str, file: str, data: bytes, expected: np.ndarray | str, tolerance: float = 4.0
) -> Kind:
    return Kind(name, file, lambda path: path.write_bytes(data), expected, tolerance)


MODES = {
    "JPEG": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "WEBP": ("L", "RGB", "RGBA"),
    "GIF": ("1", "L", "P", "RGB"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"),
    "AVIF": ("RGB", "RGBA"),
    "JPEG2000": ("L", "LA", "RGB", "RGBA"),
    "PPM": ("1", "L", "RGB"),
    "TGA": ("L", "LA", "P", "RGB", "RGBA"),
}
SUFFIX = {"JPEG": "jpg", "JPEG2000": "jp2", "TIFF": "tif"}
TURNED = ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")


def suffix(format: str) -> str:
    return SUFFIX.get(format, format.lower())


def formats() -> Iterator[Kind]:
    for format, modes in MODES.items():
        for mode in modes:
            image = Image.fromarray(ramp()).convert(mode)
            expected = np.asarray(image.convert("RGB")).astype(float)
            data = encoded(image, format, **({"quality": 95} if format in TURNED[::2] else {}))
            yield bytes_kind(f"{format} {mode}", f"a.{suffix(format)}", data, expected)
            yield bytes_kind(f"{format} {mode}, cut", f"a.{suffix(format)}", data[:-40], REFUSED)
        data = encoded(Image.fromarray(ramp()), format)
        yield bytes_kind(f"{format} named .jpg", "a.jpg", data, ramp(), 12)
        yield bytes_kind(f"{format} without a suffix", "photo", data, ramp(), 12)
    for compression in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg", "tiff_adobe_deflate"):
        data = encoded(Image.fromarray(ramp()), "TIFF", compression=compression)
        yield bytes_kind(f"TIFF, {compression}", "a.tif", data, ramp(), 12)
    other = [Image.new("RGB", (WIDTH, HEIGHT), "white")]
    for format in ("GIF", "PNG", "WEBP", "AVIF", "TIFF", "MPO"):
        data = encoded(Image.fromarray(ramp()), format, save_all=True, append_images=other)
        name = "jpg" if format == "MPO" else suffix(format)
        yield bytes_kind(f"{format} of several pictures", f"a.{name}", data, ramp(), 12)


def turns() -> Iterator[Kind]:
    square = Image.fromarray(ramp())
    # what a viewer does to stand each of the eight ways upright
    upright = [
        lambda a: a,
        lambda a: a[:, ::-1],
        lambda a: a[::-1, ::-1],
        lambda a: a[::-1],
        lambda a: a.transpose(1, 0, 2),
        lambda a: np.rot90(a, -1),
        lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        lambda a: np.rot90(a),
    ]
    for format in TURNED:
        for number, turn in enumerate(upright, 1):
            exif = Image.Exif()
            exif[0x0112] = number
            data = encoded(square, format, exif=exif)
            name = f"{format} turned by EXIF {number}"
            yield bytes_kind(name, f"a.{suffix(format)}", data, turn(ramp()), 12)
    junk = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40
    yield bytes_kind("JPEG, damaged EXIF", "a.jpg", encoded(square, "JPEG", exif=junk), ramp(), 12)


def red_is_blue() -> bytes:
    """A profile whose red is sRGB's blue, and the other way about."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack_from(">I", data, 128)[0]
    places = {bytes(data[132 + 12 * i : 136 + 12 * i]): 132 + 12 * i for i in range(count)}
    red, blue = places[b"rXYZ"] + 4, places[b"bXYZ"] + 4
    data[red : red + 8], data[blue : blue + 8] = data[blue : blue + 8], data[red : red + 8]
    return bytes(data)


def profiles() -> Iterator[Kind]:
    image = Image.fromarray(ramp())
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    none = {"garbage": b"no profile" * 20, "zeros": b"\0" * 128, "half": srgb[:300], "one": b"x"}
    for format in ("JPEG", "PNG", "WEBP", "TIFF"):
        file = f"a.{suffix(format)}"
        for name, icc in {**none, "sRGB": srgb, "Lab": lab}.items():
            data = encoded(image, format, icc_profile=icc)
            yield bytes_kind(f"{format}, profile: {name}", file, data, ramp(), 12)
        data = encoded(image, format, icc_profile=red_is_blue())
        swapped = ramp()[..., ::-1]
        yield bytes_kind(f"{format}, profile: red is blue", file, data, swapped, 12)
        data = encoded(image.convert("L"), format, icc_profile=srgb)
        expected = np.asarray(image.convert("L").convert("RGB"))
        yield bytes_kind(f"{format}, RGB profile on greys", file, data, expected, 12)
    for mode in ("P", "RGBA"):
        data = encoded(image.convert(mode), "PNG", icc_profile=red_is_blue())
        shown = np.asarray(image.convert(mode).convert("RGB"))[..., ::-1]
        yield bytes_kind(f"PNG {mode}, profile: red is blue", "a.png", data, shown)


def tiff(values: np.ndarray, bits: int, sample_format: int, photometric: int = 1) -> bytes:
    """A little-endian TIFF with one strip of greys, for what Pillow does not write."""
    raw = values.astype(values.dtype.newbyteorder("<")).tobytes()
    if bits == 12:
        a, b = values.ravel()[::2].astype(int), values.ravel()[1::2].astype(int)
        raw = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], -1).astype(np.uint8).tobytes()
    height, width = values.shape
    tags = {
        256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height,
        279: len(raw), 339: sample_format,
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + b"\0" * 4
    return struct.pack("<2sHI", b"II", 42, 8 + len(raw)) + raw + directory


def numbers() -> Iterator[Kind]:
    g, real = grey(), grey() / 255
    files = {
        "uint 16": (g.astype(np.uint16) * 257, 16, 1, g),
        "uint 16, white is zero": (65535 - g.astype(np.uint16) * 257, 16, 1, g),
        "10 in uint 16": (np.round(real * 1023).astype(np.uint16), 16, 1, g),
        "12 in uint 16": (np.round(real * 4095).astype(np.uint16), 16, 1, g),
        "14 in uint 16": (np.round(real * 16383).astype(np.uint16), 16, 1, g),
        "8 in uint 16": (g.astype(np.uint16), 16, 1, g),
        "12 bits, dark": (np.round(real * 200).astype(np.uint16), 12, 1, real * 200 / 4095 * 255),
        "12 bits": (np.round(real * 4095).astype(np.uint16), 12, 1, g),
        "uint 32": (np.round(real * (2**32 - 1)).astype(np.uint32), 32, 1, g),
        "16 in uint 32": (g.astype(np.uint32) * 257, 32, 1, g),
        "8 in uint 32": (g.astype(np.uint32), 32, 1, g),
        "int 8": ((g // 2).astype(np.int8), 8, 2, None),
        "int 8, negative": ((g.astype(int) - 128).astype(np.int8), 8, 2, REFUSED),
        "int 16": (np.round(real * 32767).astype(np.int16), 16, 2, g),
        "12 in int 16": (np.round(real * 4095).astype(np.int16), 16, 2, g),
        "int 16, negative": ((g.astype(int) * 257 - 32768).astype(np.int16), 16, 2, REFUSED),
        "int 32": (np.round(real * (2**31 - 1)).astype(np.int32), 32, 2, g),
        "int 32, negative": ((g.astype(int) - 128).astype(np.int32), 32, 2, REFUSED),
        "float 0..1": (real.astype(np.float32), 32, 3, g),
        "float -0.05..1.05": ((real * 1.1 - 0.05).astype(np.float32), 32, 3, None),
        "float, whole numbers to 255": (g.astype(np.float32), 32, 3, g),
        "float, whole numbers to 65535": (g.astype(np.float32) * 257, 32, 3, g),
        "float, HDR": ((real * 3.2).astype(np.float32), 32, 3, REFUSED),
        "float, a sun of 5000": (np.where(real > 0.97, 5000.5, real).astype("f4"), 32, 3, REFUSED),
        "float, NaN": (np.where(g > 250, np.nan, real).astype(np.float32), 32, 3, REFUSED),
        "float, all NaN": (np.full_like(real, np.nan).astype(np.float32), 32, 3, REFUSED),
        "float, infinite": (np.where(g > 250, np.inf, real).astype(np.float32), 32, 3, REFUSED),
        "float, negative": ((real - 0.5).astype(np.float32), 32, 3, REFUSED),
    }
    for name, (values, bits, kind, expected) in files.items():
        if expected is None:
            scale = 127 if kind == 2 else 1
            expected = np.clip(values / scale, 0, 1) * 255
        data = tiff(values, bits, kind, 0 if "white is zero" in name else 1)
        shown = expected if isinstance(expected, str) else rgb(np.asarray(expected))
        yield bytes_kind(f"TIFF, {name}", "a.tif", data, shown, 1.0)
    for name, values in (
        ("16 bits", g.astype(np.uint16) * 257),
        ("12 in 16 bits", np.round(real * 4095).astype(np.uint16)),
    ):
        yield bytes_kind(
            f"PNG, {name}", "a.png", encoded(Image.fromarray(values), "PNG"), rgb(g), 1.0
        )
    header = f"P5 {WIDTH} {HEIGHT} 4095\n".encode()
    data = header + np.round(real * 4095).astype(">u2").tobytes()
    yield bytes_kind("PGM, 12 bits", "a.ppm", data, rgb(g), 1.0)


def no_photos() -> Iterator[Kind]:
    texts = {
        "empty": b"", "text": b"hello", "HTML": b"<!DOCTYPE html><html>", "SVG": b"<svg></svg>",
        "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 200, "zip": b"PK\3\4" + b"\0" * 60,
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "WMF": b"\xd7\xcd\xc6\x9a" + b"\0" * 60, "MP4": b"\0\0\0\x20ftypisom" + b"\0" * 60,
        "zeros": b"\0" * 4096, "ones": b"\xff" * 4096, "JPEG's mark alone": b"\xff\xd8\xff",
        "PDF": b"%PDF-1.4\n1 0 obj\n<</Type/Catalog>>\nendobj\n", "DICOM": b"\0" * 128 + b"DICM",
    }  # fmt: skip
    for name, data in texts.items():
        yield bytes_kind(f"{name} named .jpg", "a.jpg", data, REFUSED)
        yield bytes_kind(f"{name} without a suffix", "notes", data, SKIPPED)
    Image.init()
    for format in ("EPS", "ICO", "ICNS", "DDS", "SGI", "PCX", "XBM", "IM", "MSP", "SPIDER", "QOI"):
        if format in Image.SAVE:
            mode = {"MSP": "1", "XBM": "1", "SPIDER": "F"}.get(format, "RGB")
            data = encoded(Image.fromarray(ramp()).resize((32, 32)).convert(mode), format)
            yield bytes_kind(f"{format} named .jpg", "a.jpg", data, REFUSED)


def png_header(width: int, height: int) -> bytes:
    """A PNG of zeros that says it is this large; its data are cut at 1 MB of zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    rows = zlib.compress(b"\0" * min((width // 8 + 2) * height, 1 << 20))
    size = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n"
    return start + chunk(b"IHDR", size) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def shapes() -> Iterator[Kind]:
    for width, height in ((1, 1), (1, 20), (400, 40), (20, 1), (2000, 100)):
        data = encoded(Image.new("RGB", (width, height), "red"), "PNG")
        shown = np.broadcast_to(np.array([255, 0, 0]), (height, width, 3))
        yield bytes_kind(f"{width} x {height}", "a.png", data, shown)
    for width, height in ((1, 21), (1, 60000), (65000, 1), (60000, 1000), (30000, 30000)):
        yield bytes_kind(f"PNG {width} x {height}", "a.png", png_header(width, height), REFUSED)
    yield bytes_kind("PNG without width", "a.png", png_header(0, 5), REFUSED)
    jpeg = bytearray(encoded(Image.fromarray(ramp()), "JPEG"))
    place = jpeg.index(b"\xff\xc0") + 5
    jpeg[place : place + 4] = struct.pack(">HH", 65000, 65000)
    yield bytes_kind("JPEG that says 65000 x 65000", "a.jpg", bytes(jpeg), REFUSED)
    flat = tiff(grey(), 8, 1).replace(struct.pack("<I", WIDTH), struct.pack("<I", 10**6))
    yield bytes_kind("TIFF that says 1000000 wide", "a.tif", flat, REFUSED)


def sparse(size: int) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(size)

    return write


def socket_at(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path is short
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def special() -> Iterator[Kind]:
    photo = encoded(Image.fromarray(ramp()), "PNG")
    makers: dict[str, Callable[[Path], object]] = {
        "pipe": os.mkfifo,
        "socket": socket_at,
        "link to nowhere": lambda p: p.symlink_to("nowhere"),
        "link to itself": lambda p: p.symlink_to(p.name),
        "link to /dev/zero": lambda p: p.symlink_to("/dev/zero"),
        "link to a folder": lambda p: p.symlink_to("/usr"),
        "folder": lambda p: p.mkdir(),
        "sparse, 1 TB": sparse(10**12),
        "sparse, 200 MB": sparse(200 << 20),
    }
    for name, make in makers.items():
        folder = "folder" in name
        yield Kind(f"{name} named .jpg", "a.jpg", make, SKIPPED if folder else REFUSED)
        yield Kind(f"{name} without a suffix", "notes", make, SKIPPED)
        yield Kind(f"{name} as a caption", "ok.txt", make, SKIPPED if folder else REFUSED)
    for name in (".hidden.jpg", "._a.jpg", "Thumbs.db", "a.heif.part", "a.psd", "desktop.ini"):
        yield bytes_kind(f"{name}", name, b"\0\5\26\7", SKIPPED)
    yield Kind(
        "link to a photo", "b.png",
        lambda p: (p.with_suffix(".x").write_bytes(photo), p.symlink_to("b.x")), ramp(),
    )  # fmt: skip


def kohya(name: str) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        path.mkdir()
        (path / "a.png").write_bytes(encoded(Image.fromarray(ramp()), "PNG"))

    return write


def repeats() -> Iterator[Kind]:
    for name, expected in (
        ("10_sks dog", ramp()), ("1000_sks dog", ramp()), ("0_sks dog", SKIPPED),
        ("1001_sks dog", REFUSED), ("9" * 200 + "_dog", REFUSED), ("__MACOSX", SKIPPED),
        ("-3_dog", SKIPPED), ("٣_dog", ramp()),
    ):  # fmt: skip
        yield Kind(f"folder {name[:20]}", name, kohya(name), expected)


def captions() -> Iterator[Kind]:
    for name, data in (
        ("windows-1252", "a café".encode("cp1252")), ("UTF-16 cut", b"\xff\xfea\0b"),
        ("UTF-16 without its mark", "a dog".encode("utf-16-le")), ("binary", bytes(range(256))),
    ):  # fmt: skip
        yield bytes_kind(f"caption, {name}", "ok.txt", data, REFUSED)


def all_kinds() -> list[Kind]:
    makers = (formats, turns, profiles, numbers, no_photos, shapes, special, repeats, captions)
    return [kind for make in makers for kind in make()]
