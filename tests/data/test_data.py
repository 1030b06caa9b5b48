"""Photos as people have them: what is read, what is skipped, what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dreamtune.data.photos import changed, read_folder, statement
from dreamtune.data.picture import decode
from dreamtune.data.views import from_tensor, mirrored, square, to_tensor, views

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def halves(mode: str = "RGB", size: tuple[int, int] = (40, 20)) -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", size, BLUE)
    image.paste(RED, (0, 0, size[0] // 2, size[1]))
    return image.convert(mode)


def near(pixel: object, color: tuple[int, int, int], tolerance: int = 12) -> bool:
    return bool(np.abs(np.array(pixel, int) - color).max() <= tolerance)


def one(folder: Path) -> Image.Image:
    (photo,) = read_folder(folder).photos
    assert photo.image.mode == "RGB"
    return photo.image


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("a.png", "RGB", {}),
        ("a.png", "P", {}),
        ("a.JPG", "CMYK", {"quality": 95}),
        ("a.jpeg", "RGB", {"quality": 95}),
        ("a.webp", "RGB", {"lossless": True}),
        ("a.gif", "P", {}),
        ("a.bmp", "RGB", {}),
        ("a.tif", "RGB", {}),
        ("a.tif", "CMYK", {}),
        ("a", "RGB", {"format": "PNG"}),
    ],
)
def test_formats(tmp_path: Path, name: str, mode: str, options: dict[str, object]) -> None:
    halves(mode).save(tmp_path / name, **options)
    image = one(tmp_path)
    assert image.size == (40, 20)
    assert near(image.getpixel((5, 10)), RED)
    assert near(image.getpixel((35, 10)), BLUE)


def test_mpo_and_animations_give_their_first_picture(tmp_path: Path) -> None:
    other = Image.new("RGB", (40, 20), WHITE)
    (tmp_path / "m").mkdir()
    (tmp_path / "g").mkdir()
    halves().save(tmp_path / "m/a.jpg", "MPO", save_all=True, append_images=[other], quality=95)
    halves().save(tmp_path / "g/a.gif", save_all=True, append_images=[other])
    assert Image.open(tmp_path / "m/a.jpg").format == "MPO"
    for folder in ("m", "g"):
        assert near(one(tmp_path / folder).getpixel((5, 10)), RED)


def test_exif_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise: the left half comes up
    halves().save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = one(tmp_path)
    assert image.size == (20, 40)
    assert near(image.getpixel((10, 5)), RED)
    assert near(image.getpixel((10, 35)), BLUE)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_white(tmp_path: Path, mode: str) -> None:
    image = halves("RGBA")
    image.paste((0, 0, 0, 0), (20, 0, 40, 20))
    if mode == "P":
        paletted = halves("P")
        paletted.info["transparency"] = paletted.getpixel((35, 10))
        paletted.save(tmp_path / "a.png", transparency=paletted.getpixel((35, 10)))
    else:
        image.convert(mode).save(tmp_path / "a.png")
    assert near(one(tmp_path).getpixel((35, 10)), WHITE)
    assert not near(one(tmp_path).getpixel((5, 10)), WHITE)


def test_sixteen_bits(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    values = np.asarray(one(tmp_path))[..., 0]
    assert np.abs(values - ramp / 257).max() <= 0.5


def test_other_files_are_skipped_and_named(tmp_path: Path) -> None:
    halves().save(tmp_path / "b.png")
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "._b.png", "README"):
        (tmp_path / name).write_bytes(b"not a picture")
    (tmp_path / "others").mkdir()
    folder = read_folder(tmp_path)
    assert len(folder.photos) == 1
    skipped = {".DS_Store", "Thumbs.db", "notes.txt", "._b.png", "README", "others/"}
    assert set(folder.skipped) == skipped
    assert folder.summary().startswith("1 photo, 6 other files skipped (")


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "heic"])
def test_an_unreadable_image_is_named(tmp_path: Path, damage: str) -> None:
    halves(size=(200, 200)).save(tmp_path / "good.jpg")
    data = (tmp_path / "good.jpg").read_bytes()
    bad = {"truncated": data[: len(data) // 2], "empty": b"", "text": b"hello", "heic": b"ftypheic"}
    name = "bad.heic" if damage == "heic" else "bad.jpg"
    (tmp_path / name).write_bytes(bad[damage])
    with pytest.raises(ValueError, match=rf"cannot read the image `.*{name}`") as error:
        read_folder(tmp_path)
    assert ("Convert it to JPEG" in str(error.value)) == (damage == "heic")


def test_empty_and_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it is empty. Looked for images .*jpg.* `10_sks dog`"):
        read_folder(tmp_path)
    (tmp_path / "x.doc").write_text("")
    with pytest.raises(ValueError, match=r"it holds 1 other files \(x.doc\)"):
        read_folder(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        read_folder(tmp_path / "no")


def test_captions_and_kohya_folders(tmp_path: Path) -> None:
    for name in ("10_sks dog", "5_sks cat"):
        (tmp_path / name).mkdir()
        halves().save(tmp_path / name / "a.png")
    (tmp_path / "5_sks cat" / "a.txt").write_text("a sks cat\n on a sofa ")
    photos = read_folder(tmp_path).photos
    assert [p.repeats for p in photos] == [10, 5]
    assert views(photos, 16, "a sks x").captions == ["a sks x", "a sks cat on a sofa"]
    seen = views(photos, 16, None)
    assert seen.captions == ["sks dog", "a sks cat on a sofa"]
    assert seen.weights == [2, 1]


def test_square_crops() -> None:
    left, right = halves(), halves().transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    middle = square(left, 16)[0]
    assert middle.size == (16, 16)
    assert near(middle.getpixel((1, 8)), RED)
    assert near(middle.getpixel((14, 8)), BLUE)
    assert near(square(right, 16)[0].getpixel((1, 8)), BLUE)
    corners = {np.asarray(square(left, 16, crop=i)[0]).tobytes() for i in range(8)}
    assert len(corners) > 2  # random, and each the same again
    assert np.array_equal(np.asarray(square(left, 16, 3)[0]), np.asarray(square(left, 16, 3)[0]))


@given(st.integers(16, 60), st.integers(16, 60), st.sampled_from([None, 0, 3]))
def test_a_frame_says_where_the_square_lies(width: int, height: int, crop: int | None) -> None:
    """Of the picture brought to the square's size, and of its mirror image."""
    pixels = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    scale = 16 / min(width, height)
    whole = image.resize(
        (max(16, round(width * scale)), max(16, round(height * scale))), Image.Resampling.LANCZOS
    )
    for mirror in (False, True):
        found, frame = square(image, 16, crop)
        if mirror:
            found, frame = mirrored(found, frame)
            whole = whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        assert (frame.shape, frame.size) == ((height, width), (16, 16))
        top, left = frame.corner
        assert found.tobytes() == whole.crop((left, top, left + 16, top + 16)).tobytes()


def test_views_of_crops_and_flips(tmp_path: Path) -> None:
    halves().save(tmp_path / "wide.png")
    halves(size=(20, 20)).save(tmp_path / "z.png")
    seen = views(read_folder(tmp_path).photos, 16, "a sks x", crops=3, flip=True)
    # the square photo has one crop, drawn as often as the other's three
    assert seen.weights == [1] * 6 + [3] * 2
    assert torch.equal(seen.pixels[1], seen.pixels[0].flip(-1))
    corners = [frame.corner for frame in seen.frames]
    assert all(a[1] + b[1] == 32 - 16 for a, b in zip(corners[:6:2], corners[1:6:2]))
    assert {frame.shape for frame in seen.frames} == {(20, 40), (20, 20)}
    with pytest.raises(ValueError, match="wide.png` has no caption file"):
        views(read_folder(tmp_path).photos, 16, None)


def test_tensor_round_trip() -> None:
    image = halves()
    x = to_tensor(image)
    assert x.shape == (3, 20, 40)
    assert (x.min().item(), x.max().item()) == (-1.0, 1.0)
    assert np.array_equal(np.asarray(from_tensor(x)), np.asarray(image))


def test_real_photos() -> None:
    root = Path(os.environ.get("DREAMTUNE_PHOTOS", "../shared/data/dreambooth"))
    if not (root / "dog").is_dir():
        pytest.skip("set DREAMTUNE_PHOTOS to the DreamBooth photos to run this")
    folder = read_folder(root / "dog")
    assert len(folder.photos) == 5
    assert views(folder.photos, 64, "a sks dog").pixels.shape == (5, 3, 64, 64)


def test_decode_says_why() -> None:
    with pytest.raises(ValueError, match="not an image of a known format"):
        decode(b"plain text")


@pytest.mark.parametrize("name", ["p.txt", "p.TXT", "p.Caption", "p.caption"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_captions_of_any_editor(name: str, encoding: str, tmp_path: Path) -> None:
    halves().save(tmp_path / "p.jpg")
    (tmp_path / name).write_bytes("a sks dog in a café\r\n".encode(encoding))
    folder = read_folder(tmp_path)
    assert folder.photos[0].caption == "a sks dog in a café"
    assert folder.skipped == []


def test_the_caption_of_a_photo_without_a_suffix_is_no_other_file(tmp_path: Path) -> None:
    halves().save(tmp_path / "p", "PNG")
    (tmp_path / "p.txt").write_text("a sks dog")
    (tmp_path / "q.txt").write_text("a note")
    folder = read_folder(tmp_path)
    assert (folder.photos[0].caption, folder.skipped) == ("a sks dog", ["q.txt"])


def test_the_first_of_several_captions(tmp_path: Path) -> None:
    halves().save(tmp_path / "p.png")
    for name in ("p.caption", "p.TXT"):
        (tmp_path / name).write_text(name)
    assert read_folder(tmp_path).photos[0].caption == "p.TXT"
    (tmp_path / "p.txt").write_text("p.txt")
    assert read_folder(tmp_path).photos[0].caption == "p.txt"


def test_a_caption_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    halves().save(tmp_path / "p.png")
    (tmp_path / "p.txt").symlink_to("nowhere")
    with pytest.raises(ValueError, match=r"p\.txt`: it is a link to nowhere"):
        read_folder(tmp_path)


def test_too_many_repeats_are_refused_by_name(tmp_path: Path) -> None:
    for count in (1000, 1001):
        (tmp_path / f"{count}_sks dog").mkdir()
        halves().save(tmp_path / f"{count}_sks dog" / "a.png")
    with pytest.raises(ValueError, match="1001_sks dog` asks for 1001 repeats.*at most 1000"):
        read_folder(tmp_path)


def test_photos_keep_their_order_and_a_folder_of_no_repeats_is_named(tmp_path: Path) -> None:
    for name in ("0_sks dog", "2_sks dog"):
        (tmp_path / name).mkdir()
        halves().save(tmp_path / name / "b.png")
    for name in ("1.png", "3.png"):
        halves().save(tmp_path / name)
    folder = read_folder(tmp_path)
    assert [p.path.name for p in folder.photos] == ["1.png", "b.png", "3.png"]
    assert folder.skipped == ["0_sks dog/"]


def test_what_has_changed_since_a_run_began(tmp_path: Path) -> None:
    for name in ("a", "b"):
        halves().save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("a sks dog")
    saved = statement(read_folder(tmp_path).photos)
    assert changed(saved, read_folder(tmp_path).photos) is None
    (tmp_path / "b.txt").write_text("a sks dog in the snow")
    now = read_folder(tmp_path).photos
    assert changed(saved, now) == "the captions (or repeats) of b.png"
    assert changed({"photos": saved["photos"]}, now) is None  # an older run
    halves(size=(20, 20)).save(tmp_path / "a.png")
    assert changed(saved, read_folder(tmp_path).photos) == "the photos"
