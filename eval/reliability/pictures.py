"""What comes of each kind of file in a folder of photos, and of mutated pictures: two rows of the
table of attacks. `python -m eval.reliability.pictures [--mutated 12000] [--seed 0]`

Each folder is read in a process of its own, so that a hang or a crash of the decoder is one, and
never ends the table.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dreamtune.data.photos import read_folder

if __package__:
    from eval.reliability.picture_kinds import REFUSED, SKIPPED, Kind, all_kinds, encoded, ramp
else:
    from picture_kinds import REFUSED, SKIPPED, Kind, all_kinds, encoded, ramp

VERDICTS = CLEAN, CRASH, WRONG, HANG = "clean or right", "crash", "silent or wrong", "hang"
PATIENCE = 5.0  # seconds for a folder; one that is refused takes none
SEEDS = (
    ("jpg", "JPEG", "RGB"), ("jpg", "JPEG", "CMYK"), ("png", "PNG", "RGBA"), ("png", "PNG", "P"),
    ("webp", "WEBP", "RGB"), ("gif", "GIF", "P"), ("bmp", "BMP", "RGB"), ("tif", "TIFF", "RGB"),
    ("avif", "AVIF", "RGB"), ("jp2", "JPEG2000", "RGB"), ("ppm", "PPM", "RGB"),
    ("tga", "TGA", "RGB"),
)  # fmt: skip


def judge(kind: Kind, folder: Path) -> tuple[str, str]:
    """The verdict, and what came of it."""
    Image.new("RGB", (8, 8), "white").save(folder / "ok.png")
    kind.write(folder / kind.file)
    began = time.perf_counter()
    try:
        found = read_folder(folder)
    except ValueError as error:
        named = kind.file[:20] in str(error)
        right = isinstance(kind.expected, str) and kind.expected == REFUSED and named
        result = f"refused{'' if named else ', unnamed'}: {error}"
    except Exception as error:
        return CRASH, f"{type(error).__name__}: {error}"
    else:
        photos = [p for p in found.photos if p.path.name != "ok.png"]
        left_out = any(name.strip("/") == kind.file for name in found.skipped)
        result = f"{len(photos)} photos, {'named as skipped' if left_out else 'not skipped'}"
        if isinstance(kind.expected, str):
            right = kind.expected == SKIPPED and not photos and left_out
        else:
            got = [np.asarray(p.image).astype(float) for p in photos]
            right = len(got) == 1 and got[0].shape == kind.expected.shape
            if right:
                distance = float(np.abs(got[0] - kind.expected).mean())
                result, right = f"off by {distance:.1f}", distance <= kind.tolerance
    if time.perf_counter() - began > PATIENCE:
        return HANG, result
    return (CLEAN if right else WRONG), result


def mutated(number: int, seed: int) -> tuple[str, bytes]:
    """File name and bytes: a picture whose bytes were flipped, cut, doubled or swapped."""
    rng = np.random.default_rng([seed, number])
    suffix, format, mode = SEEDS[number % len(SEEDS)]
    data = bytearray(encoded(Image.fromarray(ramp()).convert(mode), format))
    for _ in range(int(rng.integers(1, 9))):
        at, other = (int(x) for x in rng.integers(0, len(data), 2))
        length = int(rng.integers(1, 17))
        match int(rng.integers(6)):
            case 0:
                data[at] ^= 1 << int(rng.integers(8))
            case 1:
                data[at : at + length] = rng.bytes(len(data[at : at + length]))
            case 2:
                data[at:at] = data[other : other + length]
            case 3:
                del data[at : at + length]
            case 4:
                data[at : at + 4] = b"\xff\xff\xff\xff"[: len(data[at : at + 4])]
            case _ if number % 7 == 0:
                del data[max(1, at) :]
        data = data or bytearray(b"\0")
    return f"a.{suffix}", bytes(data)


def judge_mutated(numbers: Sequence[int], seed: int, folder: Path) -> list[tuple[str, str]]:
    """A picture, or an error that names the file; what is in it nobody can tell."""
    verdicts = []
    for number in numbers:
        name, data = mutated(number, seed)
        (folder / name).write_bytes(data)
        began, result, verdict = time.perf_counter(), "", CLEAN
        try:
            (photo,) = read_folder(folder).photos
            verdict = CLEAN if photo.image.mode == "RGB" else WRONG
        except ValueError as error:
            result = str(error)
            verdict = CLEAN if name in result else WRONG
        except Exception as error:
            verdict, result = CRASH, f"{number}: {type(error).__name__}: {error}"
        verdicts.append((HANG if time.perf_counter() - began > PATIENCE else verdict, result))
        (folder / name).unlink()
    return verdicts


def alone(patience: float, function: Any, *arguments: Any) -> Any:
    """What the function gives, in a process of its own; a verdict's string if it does not."""
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe(duplex=False)

    def work() -> None:
        there.send(function(*arguments))

    process = fork.Process(target=work)
    process.start()
    there.close()
    try:
        if not here.poll(patience):
            process.kill()
            return HANG
        return here.recv()
    except EOFError:
        return CRASH
    finally:
        process.join()


def kinds_table(kinds: Sequence[Kind]) -> tuple[Counter[str], list[str]]:
    count: Counter[str] = Counter()
    faults = []
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            result = alone(4 * PATIENCE, judge, kind, Path(folder))
        verdict, what = (result, "") if isinstance(result, str) else result
        count[verdict] += 1
        if verdict != CLEAN:
            faults.append(f"{verdict}: {kind.name}: {what[:160]}")
    return count, faults


def mutated_table(total: int, seed: int, part: int = 250) -> tuple[Counter[str], list[str]]:
    count: Counter[str] = Counter()
    faults = []
    for first in range(0, total, part):
        numbers = range(first, min(first + part, total))
        with tempfile.TemporaryDirectory() as folder:
            result = alone(60 + part / 4, judge_mutated, numbers, seed, Path(folder))
        if isinstance(result, str):
            count[result] += 1
            faults.append(f"{result}: one of {numbers}")
            continue
        count += Counter(verdict for verdict, _ in result)
        faults += [f"{verdict}: {what[:160]}" for verdict, what in result if verdict != CLEAN]
    return count, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutated", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    kinds = all_kinds()
    rows = {
        f"{len(kinds)} kinds of pictures": kinds_table(kinds),
        f"{a.mutated:,} mutated pictures": mutated_table(a.mutated, a.seed),
    }
    print(f"| tried | {' | '.join(VERDICTS)} |\n|---|{'---|' * len(VERDICTS)}")
    for name, (count, _) in rows.items():
        print(f"| {name} | {' | '.join(f'{count[v]:,}' for v in VERDICTS)} |")
    faults = [fault for _, found in rows.values() for fault in found]
    print("\n".join(faults), file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
