"""The page is whole, self-contained and says what the history says."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from dreamtune.evaluation.report import snippet, write_report
from dreamtune.evaluation.selection import choose_best

HISTORY = [
    {"step": s, "dino": d, "clip_i": i, "clip_t": t, "clip_t_shuffled": 0.16, "dino_photos": 0.71,
     "clip_i_photos": 0.86, "seconds": 3.0 * s}
    for s, d, i, t in [(0, 0.41, 0.70, 0.28), (50, 0.5, 0.74, 0.279), (100, 0.6, 0.79, 0.27)]
]  # fmt: skip


def pictures(count, side=64, color=0):
    return [Image.new("RGB", (side, side), (40 * i, color, 99)) for i in range(count)]


def report(run_dir, **changes):
    arguments = {
        "title": "sks dog", "photos": pictures(3), "prompts": ["a <b>", "a <b>", 'say "c"'],
        "base_images": pictures(3), "adapted_images": pictures(3, color=200), "history": HISTORY,
        "settings": {"method": "delora", "rank": 16, "instance_data_dir": "/home/jane/dog"},
        "base": "embedded", "example_prompt": "a sks dog",
    }  # fmt: skip
    arguments |= changes
    return write_report(run_dir, choice=choose_best(arguments["history"]), **arguments)


class Checker(HTMLParser):
    """Open tags, images, text and every address the page would fetch."""

    VOID = {"meta", "img", "br", "path", "use", "rect"}

    def __init__(self):
        super().__init__()
        self.open, self.images, self.text, self.fetched = [], [], [], []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.fetched += [
            v for k, v in attributes.items()
            if k in ("src", "href", "srcset") and not v.startswith(("data:", "#"))
        ]  # fmt: skip
        if tag == "img":
            self.images.append(attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:  # an element of SVG may be empty
            assert tag in ("g", "defs")
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read(path):
    checker = Checker()
    html = path.read_text(encoding="utf-8")
    checker.feed(html)
    assert checker.open == []
    return html, checker


def test_the_page_is_whole_and_fetches_nothing(tmp_path):
    html, page = read(report(tmp_path))
    assert page.fetched == []
    assert (
        "<script" not in html and "@import" not in html and "url(" not in html.replace("url(#", "")
    )
    assert not re.search(r"\$[a-z_]", html), "a placeholder was left"
    assert len(page.images) == 3 + 2 * 3
    assert all(image["alt"] for image in page.images)
    assert html.count("<svg") == html.count('role="img"') == 3
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_it_says_what_the_history_says(tmp_path):
    _, page = read(report(tmp_path))
    text = " ".join(page.text)
    for part in ("100 best", "Step 100 gained", "0.600", "0.790", "delora", "embedded.MODEL"):
        assert part in text
    assert "/home/jane" not in text and "…/dog" in text


def test_text_is_escaped(tmp_path):
    _, page = read(report(tmp_path, title="<script>alert(1)</script>"))
    assert page.text.count("a <b>") == 1
    assert 'say "c"' in page.text
    assert "<script>alert(1)</script>" in page.text


def test_pictures_are_shrunk_and_never_enlarged(tmp_path):
    large = [Image.effect_noise((1024, 768), 90).convert("RGB")] * 3
    path = report(tmp_path, photos=large, base_images=large)
    _, page = read(path)
    sizes = []
    for image in page.images:
        data = base64.b64decode(image["src"].split(",", 1)[1])
        with Image.open(io.BytesIO(data)) as inside:
            assert inside.size == (int(image["width"]), int(image["height"]))
            sizes.append(inside.size)
    assert sizes[0] == (256, 256)
    assert sizes[3] == (448, 336)
    assert sizes[-1] == (64, 64)
    assert path.stat().st_size < 1e6


def test_no_path_is_shown(tmp_path):
    values = {
        "photos": "/home/me/a", "clip": "local-dir:/home/me/b", "two": ["/home/me/c", "a {}"],
        "options": {"alpha": 4}, "tag": "ViT-B-32:openai",
    }  # fmt: skip
    page = report(tmp_path, settings=values).read_text()
    assert "/home" not in page
    for text in ("…/a", "local-dir:…/b", "…/c, a {}", "alpha 4", "ViT-B-32:openai"):
        assert f"<dd><code>{text}</code></dd>" in page


def test_files_are_listed_with_their_sizes(tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "checkpoint-5").mkdir()
    for name in ("adapter.safetensors", "best/pytorch_lora_weights.safetensors", "other.bin",
                 "checkpoint-5/adapter.safetensors"):  # fmt: skip
        (tmp_path / name).write_bytes(b"0" * 1_200_000)
    text = " ".join(read(report(tmp_path))[1].text)
    assert "best/pytorch_lora_weights.safetensors" in text and "1.2 MB" in text
    assert "other.bin" not in text and "checkpoint-5" not in text


def test_the_lines_to_load_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "dog" / "best").mkdir(parents=True)
    (tmp_path / "runs/dog/best/pytorch_lora_weights.safetensors").touch()
    run = tmp_path / "runs" / "dog"
    code = snippet(run, "some/base", "a sks dog", {"guidance_scale": 4.0})
    compile(code, "snippet", "exec")
    assert 'load_lora_weights("runs/dog/best")' in code
    assert 'from_pretrained("some/base")' in code
    assert 'pipe("a sks dog", guidance_scale=4.0).images[0]' in code
    monkeypatch.chdir(tmp_path / "runs" / "dog" / "best")
    assert str(tmp_path) not in snippet(run, "some/base", "a", {})


def test_only_the_base_scored_and_missing_values(tmp_path):
    bare = [{"step": 0, "dino": 0.4, "clip_i": 0.7, "clip_t": 0.28}]
    text = " ".join(read(report(tmp_path, history=bare))[1].text)
    assert "Only the base (step 0) has been scored." in text
    odd = {**HISTORY[1], "step": 150, "dino": float("nan")}
    text = " ".join(read(report(tmp_path, history=[*HISTORY, odd]))[1].text)
    assert "nan%" not in text and "inf" not in text and "too little" not in text


def test_standard_errors_stand_beside_their_scores(tmp_path):
    html, _ = read(report(tmp_path))
    assert "± 0" not in html and "<td>0.600</td>" in html
    errors = {"dino_se": 0.0213, "clip_t_minus_shuffled_se": 0.006}
    html, page = read(report(tmp_path, history=[{**record, **errors} for record in HISTORY]))
    assert "<td>0.600 <small>± 0.021</small></td><td>0.790</td>" in html
    kept, error = 0.11 / 0.12, (0.006**2 + (0.11 / 0.12 * 0.006) ** 2) ** 0.5 / 0.12
    assert f"<td>{kept:.0%} <small>± {error:.0%}</small></td>" in html
    assert "is the standard error" in " ".join(" ".join(page.text).split())


def test_where_no_scorer_counts_nothing_is_gained(tmp_path):
    """The photos are less alike than the base's images are to them."""
    less = {"dino_photos": 0.4, "clip_i_photos": 0.6}
    html, page = read(report(tmp_path, history=[{**record, **less} for record in HISTORY]))
    assert "<dt>Subject gained</dt><dd>–<small>" in html
    assert "100 best</th><td>0.600</td><td>0.790</td><td>0.270</td><td>–</td>" in html
    assert "No scorer counts. DINO does not count" in " ".join(page.text)


def test_progress_strip_marks_the_best(tmp_path):
    strip = [(s, image) for s, image in zip((0, 50, 100), pictures(3))]
    html, _ = read(report(tmp_path, progress=strip))
    assert html.count('figure class="won"') == 1


def test_lengths_must_agree(tmp_path):
    with pytest.raises(ValueError, match="3, 3 and 2"):
        report(tmp_path, adapted_images=pictures(2))
