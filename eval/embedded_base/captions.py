"""The caption grammar of the embedded base, as pieces that concatenate exactly under its tokenizer.

A caption is a row of slots, each a piece id (0: empty). Strings and token ids are made from the
same slots, so a million captions a minute can be built on the GPU.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from .sources import STYLES

LENGTH = 32  # tokens, start and end included
VOCABULARY = 2048
BOS, EOS = VOCABULARY - 2, VOCABULARY - 1

COLORS = {
    "red": (222, 44, 44), "orange": (246, 140, 30), "yellow": (251, 222, 62),
    "green": (56, 164, 74), "mint": (158, 228, 190), "teal": (18, 138, 138),
    "blue": (48, 98, 220), "navy": (24, 34, 92), "purple": (132, 64, 184),
    "pink": (251, 156, 194), "brown": (124, 80, 46), "beige": (236, 216, 182),
    "white": (255, 255, 255), "gray": (144, 144, 144), "black": (20, 20, 20),
}  # fmt: skip
KINDS = ("one", "two", "next to", "above")
LOOKS = ("plain", "black and white", "sticker", "pixel art")
SIZES = ("normal", "small", "big")
PLACES = ("free", "left", "right", "top", "bottom")
PATTERNS = ("plain", "gradient", "striped", "dotted", "checkered")
SCENERY = ("grass", "beach", "snow", "night", "sunset")
GROUNDS = PATTERNS + SCENERY
PLACE_PHRASES = ("", "on the left", "on the right", "at the top", "at the bottom")
SCENERY_PHRASES = ("on the grass", "on the beach", "in the snow", "under a night sky", "at sunset")
# words without meaning: an unknown word before the noun must not change the picture
NONCES = ("sks", "zwx", "ohwx", "vrt", "qlp", "bnk", "xjy", "mfd")
FIXED = (
    "", "a", "an", "two", "small", "big", "black and white", "a sticker of", "pixel art of",
    "a picture of", "next to", "above", "on", "and", "background",
    *PATTERNS[1:], *PLACE_PHRASES[1:], *SCENERY_PHRASES,
)  # fmt: skip
EXTRA_WORDS = (
    "photo of the in with front jungle city forest water street wooden floor mountain tree house "
    "blue cube shiny wet painting style cute toy plushie holding wearing hat flying sitting "
    "sleeping running emoji icon"
)


def plural(word: str) -> str:
    irregular = {"mouse": "mice", "sheep": "sheep", "fish": "fish", "deer": "deer", "die": "dice"}
    if word in irregular:
        return irregular[word]
    if word.endswith(("ss", "x", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2] not in "aeo":
        return word[:-1] + "ies"
    return (
        word
        if word.endswith("s") and word not in ("bus", "octopus", "cactus")
        else word + ("es" if word.endswith("us") else "s")
    )


@dataclass
class Scene:
    """One scene an entry, as index tensors of one shape (B,)."""

    kind: torch.Tensor  # KINDS
    first: torch.Tensor  # sprite: concept * 3 + style
    second: torch.Tensor  # sprite of the other subject ("next to", "above")
    look: torch.Tensor  # LOOKS
    size: torch.Tensor  # SIZES, of a single subject
    place: torch.Tensor  # PLACES, of a small single subject
    ground: torch.Tensor  # GROUNDS
    color: torch.Tensor  # COLORS, of the ground
    color2: torch.Tensor  # COLORS, second colour of a pattern

    def __len__(self) -> int:
        return len(self.kind)

    def __getitem__(self, index) -> Scene:
        return Scene(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @classmethod
    def of(cls, rows: list[dict[str, int]], device="cpu") -> Scene:
        return cls(
            **{f.name: torch.tensor([r[f.name] for r in rows], device=device) for f in fields(cls)}
        )


@dataclass
class Wording:
    """What a caption mentions, (B,) each: booleans, and `nonce` (0 none, else a nonce word + 1)."""

    style: torch.Tensor
    style2: torch.Tensor
    ground: torch.Tensor
    picture: torch.Tensor
    nonce: torch.Tensor


class Grammar:
    """Pieces, their ids and their token ids; `words` are the concepts in sprite order."""

    def __init__(self, words: list[str], tokenizer=None, device="cpu"):
        self.words = words
        self.pieces = [*FIXED, *STYLES, *COLORS, *NONCES, *words, *(plural(w) for w in words)]
        self.start = {}
        offset = len(FIXED)
        for name, count in (
            ("style", 3),
            ("color", len(COLORS)),
            ("nonce", len(NONCES)),
            ("word", len(words)),
        ):
            self.start[name] = offset
            offset += count
        self.start["plural"] = offset
        self.id = {piece: i for i, piece in enumerate(FIXED)}
        self.vowel = torch.tensor(
            [p[:1] in "aeio" and p[:1] != "" for p in self.pieces], device=device
        )
        self.looks = torch.tensor(
            [0, 0, self.id["a sticker of"], self.id["pixel art of"]], device=device
        )
        self.sizes = torch.tensor([0, self.id["small"], self.id["big"]], device=device)
        self.places = torch.tensor([self.id[p] for p in PLACE_PHRASES], device=device)
        self.grounds = torch.tensor(
            [0] + [self.id[p] for p in PATTERNS[1:]] + [0] * len(SCENERY), device=device
        )
        self.scenery = torch.tensor(
            [0] * len(PATTERNS) + [self.id[p] for p in SCENERY_PHRASES], device=device
        )
        if tokenizer is not None:
            ids = [
                tokenizer(p, add_special_tokens=False).input_ids if p else [] for p in self.pieces
            ]
            table = np.zeros((len(ids), max(map(len, ids))), np.int64)
            for row, tokens in zip(table, ids, strict=True):
                row[: len(tokens)] = tokens
            self.table = torch.from_numpy(table).to(device)
            self.lengths = torch.tensor([len(t) for t in ids], device=device)

    def slots(self, s: Scene, w: Wording) -> torch.Tensor:
        """(B, slots) piece ids of each scene's caption."""
        zero = torch.zeros_like(s.kind)
        one, two, pair = s.kind == 0, s.kind == 1, s.kind >= 2

        def put(condition: torch.Tensor, piece) -> torch.Tensor:
            return torch.where(condition, self.id[piece] if isinstance(piece, str) else piece, zero)

        scenery, pattern = s.ground >= len(PATTERNS), (s.ground > 0) & (s.ground < len(PATTERNS))
        named = w.ground & ~scenery
        word = s.first // 3
        head = [
            put(w.picture & (s.look < 2), "a picture of") + self.looks[s.look],
            torch.where(two, self.id["two"], -1),
            torch.where(one, self.sizes[s.size], zero),
            put(w.nonce > 0, self.start["nonce"] + w.nonce - 1),
            put(s.look == 1, "black and white"),
            put(w.style, self.start["style"] + s.first % 3),
            torch.where(two, self.start["plural"] + word, self.start["word"] + word),
            torch.where(one, self.places[s.place], zero),
            put(s.kind == 2, "next to") + put(s.kind == 3, "above"),
            torch.where(pair, -1, zero),
            put(pair & w.style2, self.start["style"] + s.second % 3),
            put(pair, self.start["word"] + s.second // 3),
            put(named, "on"),
            torch.where(named, -1, zero),
            put(named, self.start["color"] + s.color),
            put(named & pattern, "and"),
            put(named & pattern, self.start["color"] + s.color2),
            torch.where(named, self.grounds[s.ground], zero),
            put(named, "background"),
            torch.where(w.ground, self.scenery[s.ground], zero),
        ]
        following = zero
        # -1 stands for an article: "a" or "an" by the piece after it
        for i in range(len(head) - 1, -1, -1):
            article = torch.where(self.vowel[following], self.id["an"], self.id["a"])
            head[i] = torch.where(head[i] < 0, article, head[i])
            following = torch.where(head[i] > 0, head[i], following)
        return torch.stack(head, 1)

    def strings(self, slots: torch.Tensor) -> list[str]:
        return [" ".join(self.pieces[i] for i in row if i) for row in slots.tolist()]

    def encode(self, slots: torch.Tensor) -> torch.Tensor:
        """(B, slots) -> (B, LENGTH) token ids with start, end, padding, as the tokenizer gives."""
        tokens, lengths = self.table[slots], self.lengths[slots]
        start = 1 + lengths.cumsum(1) - lengths
        step = torch.arange(tokens.shape[2], device=tokens.device)
        position = start[:, :, None] + step
        position = torch.where(
            (step < lengths[:, :, None]) & (position < LENGTH - 1), position, LENGTH
        )
        ids = torch.full((len(slots), LENGTH + 1), EOS, dtype=torch.long, device=tokens.device)
        ids.scatter_(1, position.flatten(1), tokens.flatten(1))
        ids[:, 0] = BOS
        return ids[:, :LENGTH].contiguous()


def write_tokenizer(words: list[str], folder: Path) -> None:
    """Train the BPE on every piece and write a CLIPTokenizer folder (vocab.json, merges.txt)."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    grammar = Grammar(words)
    corpus = [p for p in grammar.pieces if p] * 4 + EXTRA_WORDS.split() * 3 + list(NONCES) * 60
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = [chr(c) for c in range(97, 123)]
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=20000,
            initial_alphabet=letters,
            end_of_word_suffix="</w>",
            show_progress=False,
            min_frequency=2,
        ),
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    room = VOCABULARY - 2 - 2 * len(alphabet)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]][:room]
    tokens = list(
        dict.fromkeys([*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges)])
    )
    tokens += [f"<|unused{i}|>" for i in range(VOCABULARY - 2 - len(tokens))]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *(" ".join(m) for m in merges)]) + "\n"
    )
    special = {
        "bos_token": "<|startoftext|>",
        **dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>"),
    }
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
