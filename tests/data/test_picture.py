"""Pictures of every kind: read right, or refused by name, at once, with nothing run for them."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hangs import no_hang
from PIL import Image

from dreamtune.data import picture
from dreamtune.data.photos import KEPT_SIDE, read_folder
from dreamtune.data.picture import decode
from dreamtune.data.views import square

sys.path.append(str(Path(__file__).parents[2] / "eval" / "reliability"))
from picture_kinds import Kind, all_kinds, encoded, ramp  # noqa: E402
from pictures import CLEAN, judge, judge_mutated  # noqa: E402

KINDS = all_kinds()


@pytest.mark.parametrize("kind", KINDS, ids=[kind.name for kind in KINDS])
def test_kinds_of_files(kind: Kind, tmp_path: Path) -> None:
    with no_hang():
        verdict, what = judge(kind, tmp_path)
    assert verdict == CLEAN, what


def test_mutated_pictures(tmp_path: Path) -> None:
    """240 of the 12,000 of the table, and the first that were crashes."""
    crashes = (380, 1352, 1736, 1904, 2096, 2156, 2456)
    found = judge_mutated([*range(240), *crashes], 0, tmp_path)
    assert [what for verdict, what in found if verdict != CLEAN] == []
    assert sum(bool(what) for _, what in found) > 40  # enough of them are damaged


def test_postscript_never_reaches_ghostscript(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker, tools, photos = tmp_path / "ran", tmp_path / "bin", tmp_path / "photos"
    tools.mkdir()
    photos.mkdir()
    (tools / "gs").write_text(f"#!/bin/sh\necho \"$@\" >> '{marker}'\n")
    (tools / "gs").chmod(0o755)
    data = encoded(Image.fromarray(ramp()), "EPS")
    (photos / "photo.jpg").write_bytes(data)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    # Pillow looks for the program once a process
    code = "import sys; from dreamtune.data.photos import read_folder; read_folder(sys.argv[1])"
    run = subprocess.run([sys.executable, "-c", code, str(photos)], capture_output=True, text=True)
    assert not marker.exists(), marker.read_text()
    assert run.returncode == 1
    assert "photo.jpg`: it is not an image of a known format" in run.stderr


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (size[1] // 16, size[0] // 16, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_large_photo_is_kept_small_and_sharp(format: str) -> None:
    """Two steps of Lanczos, the first of them in the decoder, against one from the whole photo."""
    photo = noise((4400, 3600))
    data = encoded(
        photo, format, **({"quality": 95} if format == "JPEG" else {"compress_level": 1})
    )
    kept = decode(data, 1024)
    assert kept.size == (1252, 1024)
    once, twice = (np.asarray(square(x, 512)[0]).astype(float) for x in (decode(data), kept))
    assert np.abs(once - twice).mean() < 0.6
    assert np.abs(once - twice).max() < 12


def test_what_is_small_is_kept_to_the_bit() -> None:
    photo = noise((1600, KEPT_SIDE))
    assert np.array_equal(np.asarray(decode(encoded(photo, "PNG"), KEPT_SIDE)), np.asarray(photo))


def test_memory_of_a_photo_does_not_grow_with_its_megapixels(tmp_path: Path) -> None:
    noise((6000, 4000)).save(tmp_path / "a.jpg", quality=80)
    photo = read_folder(tmp_path).photos[0]
    assert photo.image.size == (1536, 1024)  # 4.7 MB; 72 MB before
    (larger,) = read_folder(tmp_path, side=2048).photos
    assert larger.image.size == (3072, 2048)
    assert larger.digest == photo.digest


def test_a_phone_s_photo_of_200_megapixels(tmp_path: Path) -> None:
    Image.new("L", (16320, 12240), 128).save(tmp_path / "s23.jpg", quality=50)
    code = (
        "import sys, pathlib; from dreamtune.data.photos import read_folder; "
        "p = read_folder(sys.argv[1]).photos[0].image; print(*p.size, *p.getpixel((5, 5))); "
        "print(pathlib.Path('/proc/self/status').read_text())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True
    )
    first, _, status = run.stdout.partition("\n")
    assert first == "1365 1024 128 128 128", run.stderr
    (peak,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    assert int(peak) / 1024 < 250  # MiB; 600 in full


@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (20_000, 8_001, "it has 160 megapixels, at most 160 are read"),
        (30_000, 30_000, "900000000 pixels"),
        (60_000, 1_000, "it is 60000 x 1000 pixels: its long side is more than 20 times"),
    ],
)
def test_bombs_say_their_size(width: int, height: int, message: str) -> None:
    from picture_kinds import png_header

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(picture.UnreadableImage, match=message):
        decode(png_header(width, height))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


def test_formats_are_those_of_photos() -> None:
    assert len(picture.FORMATS) == len(set(picture.FORMATS)) == 10
    assert not {"EPS", "PS", "PDF", "WMF", "FPX", "MPEG"} & set(picture.FORMATS)
    calls = [
        line
        for path in Path(picture.__file__).parents[1].rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "Image.open(" in line and "formats=" not in line
    ]
    assert calls == []  # an open call without formats is one to every plugin of Pillow
