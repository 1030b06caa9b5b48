"""Plain LoRA: what its formats share, and factors that keep their accuracy in fp16."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamtune.adapters import METHODS, find_method
from dreamtune.fields import UnreadableFile, checker, from_file
from dreamtune.files.complete import check_layers
from dreamtune.files.fingerprint import PRINTS
from dreamtune.files.formats import OTHERS, Change, ExportFormat, Format, LayerFactors, Prefixes
from dreamtune.files.header import modelspec
from dreamtune.files.names import ends_of, is_layer_name
from dreamtune.files.parts import (
    ENDINGS,
    Parts,
    by_layer,
    check_finite,
    check_kernels,
    factors_of,
    shape_of,
)
from dreamtune.files.stated import Stated, from_header
from dreamtune.files.tensors import TensorFile, write_new
from dreamtune.injection.adapter_file import AdapterFile
from dreamtune.injection.targets import layers_of

_ABOUT = checker(
    {"metadata": dict[str, Any], "fingerprint": PRINTS, "exported_from": str}, others=True
)


class Content(NamedTuple):
    """What a LoRA file holds, by module path.

    Attributes:
        parts: the tensors of each layer.
        stated: what the file says of their strength.
        factors: the change of each, (out, r) and (r, in * kh * kw) in float32, the strength in up.
        shapes: (out, in) of each layer, (out, in, kh, kw) of a convolution.
        about: our header.
    """

    parts: dict[str, Parts]
    stated: Stated | None
    factors: LayerFactors
    shapes: dict[str, tuple[int, ...]]
    about: dict[str, Any]


def recompress(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product in float64, orthogonal on both sides, its size split evenly between them.

    Factors that cancel, or of very different size, lose accuracy in fp16; these do not. The rank
    stays, unless a side of the layer is narrower.
    """
    q_up, r_up = torch.linalg.qr(up.double())
    q_down, r_down = torch.linalg.qr(down.double().mT)
    left, size, right = torch.linalg.svd(r_up @ r_down.mT, full_matrices=False)
    root = size.sqrt()
    return q_up @ (left * root), (root.unsqueeze(-1) * right) @ q_down.mT


def same_rank(factors: LayerFactors) -> LayerFactors:
    """Fills up with zeros to one rank, also where a layer is narrower: diffusers before 0.42 takes
    one alpha for a file of several ranks, and PEFT's rule by patterns is not in every reader.
    """
    rank = max(up.shape[-1] for up, _ in factors.values())
    return {
        path: (F.pad(up, (0, rank - up.shape[-1])), F.pad(down, (0, 0, 0, rank - down.shape[-2])))
        for path, (up, down) in factors.items()
    }


def cut(factors: LayerFactors, rank: int) -> tuple[LayerFactors, dict[str, tuple[float, float]]]:
    """The best approximation of each change at a rank (Eckart and Young), of factors as
    `recompress` gives them; and of each its squared Frobenius norm, kept and whole.
    """
    found, energies = {}, {}
    for path, (up, down) in factors.items():
        squares = up.square().sum(0).square()  # the column's norm is the root of a singular value
        found[path] = (up[:, :rank], down[:rank])
        energies[path] = (float(squares[:rank].sum()), float(squares.sum()))
    return found, energies


def cut_in_words(about: Mapping[str, Any]) -> str:
    """Of `cut` in our header."""
    layer, share = about["worst"]
    return (
        f"Cut from rank {about['from']} to {about['rank']}: {about['energy']:.2%} of the change's"
        f" squared norm is kept, of the worst layer, `{layer}`, {share:.2%}."
    )


class LoraFormat(Format):
    """What the formats of plain LoRA share in reading: a file has the factors of a layer, and its
    alpha if any, under keys that begin with the layer's name.

    Attributes:
        shortens: why the names in a file are no module paths; "" where they are.
    """

    shortens: ClassVar[str] = ""

    @abstractmethod
    def name(self, key: str, prefixes: Prefixes) -> str | None:
        """A key from the layer's name on; None for one that is not of this format."""

    def paths(
        self, names: Iterable[str], layers: Iterable[str], network: nn.Module | None
    ) -> dict[str, str]:
        """Name of a layer in the file -> module path; unknown names stay. layers: module paths of
        the network, none where there is no network.
        """
        return {name: name for name in names}

    def placed(
        self, file: TensorFile, by_name: Mapping[str, Parts], network: nn.Module | None
    ) -> list[tuple[str, Parts]]:
        """Module path and tensors of each layer, of those by name; unknown names stay."""
        layers = () if network is None else layers_of(network)
        paths = self.paths(by_name, layers, network)
        return [(paths[name], parts) for name, parts in by_name.items()]

    def may_be_layer(self, name: str, prefixes: Prefixes) -> bool:
        """Whether a name may be one of a layer, where there is no network to ask."""
        return is_layer_name(name, prefixes)

    def stated(self, file: TensorFile, prefixes: Prefixes) -> Stated | None:
        """What the file says of its layers' strength, beside the alphas among its tensors."""
        return from_header(file.header, prefixes.peft, file.name)

    def is_lora(self, file: TensorFile) -> bool:
        """Whether a file that it `reads` holds a low-rank change, and no method of its own."""
        return True

    def doubt(self, file: TensorFile) -> str | None:
        """Why a file that states no strength may be meant to have another than 1."""
        return None

    def reads(self, file: TensorFile, prefixes: Prefixes) -> bool:
        ours = (key for key in file.tensors if key.endswith(tuple(ENDINGS)))
        return any(self.name(key, prefixes) is not None for key in ours)

    def read(self, file: TensorFile, network: nn.Module | None, prefixes: Prefixes) -> AdapterFile:
        """As an adapter of the method LoRA, of the layers that the file has. One that another tool
        has changed since we wrote it is read, with a warning that counts what changed.
        """
        if network is None and self.shortens:
            raise ValueError(
                f"{self.shortens}, and only the network tells them: pass it as `base`, in the"
                " command as --pretrained_model_name_or_path"
            )
        warn_of_changes(file)
        found = self.content(file, network, prefixes)
        if network is None:
            check_kernels(found.parts)
        if doubt := self.doubts(file, found.parts, found.stated):
            warnings.warn(f"`{file.name}`: {doubt}. A strength of 1 is taken there", stacklevel=2)
        ranks = {path: len(down) for path, (_, down) in found.factors.items()}
        most, tensors = max(ranks.values()), {}
        for path, (up, down) in found.factors.items():
            tensors[f"{path}.A"], tensors[f"{path}.B"] = down, up
        return AdapterFile(
            method="lora",
            options={"rank": most},
            layer_options={path: {"rank": r} for path, r in ranks.items() if r != most},
            target_modules=ends_of(ranks),
            tensors=tensors,
            metadata=found.about.get("metadata", {}),
            shapes=found.shapes,
            fingerprint=found.about.get("fingerprint", {}),
            exported_from=found.about.get("exported_from"),
            source=file.name,
            some_layers=True,
        )

    def content(self, file: TensorFile, network: nn.Module | None, prefixes: Prefixes) -> Content:
        """What is in a file, all of it checked. Raises ValueError as `read` does, but that names
        may be those that the file `shortens`.
        """
        about, here = about_of(file), None
        if network is not None:
            here = {path: tuple(x.weight.shape) for path, x in layers_of(network).items()}
        parts = self.layers(file, here, network, prefixes)
        stated = self.stated(file, prefixes)
        factors = {path: factors_of(path, own, stated) for path, own in parts.items()}
        check_finite(file.name, factors)
        shapes = {p: shape_of(parts[p], *pair, (here or {}).get(p)) for p, pair in factors.items()}
        if here is not None:
            check_layers(file.name, shapes, here, about.get("fingerprint", {}))
        return Content(parts, stated, factors, shapes, about)

    def layers(
        self,
        file: TensorFile,
        layers: Collection[str] | None,
        network: nn.Module | None,
        prefixes: Prefixes,
    ) -> dict[str, Parts]:
        """Module path -> tensors; without a network, where the file `shortens` names, the name.

        Raises UnreadableFile unless all are of layers of the network; without one, of such names.
        """
        by_name, unknown = by_layer(file.tensors, lambda key: self.name(key, prefixes))
        placed = self.placed(file, by_name, network)
        by_path = dict(placed)
        if len(by_path) < len(placed):
            raise UnreadableFile(f"`{file.name}` has two names for one layer")
        if layers is not None:
            unknown += [path for path in by_path if path not in layers]
        else:
            unknown += [path for path in by_path if not self.may_be_layer(path, prefixes)]
        if unknown or not by_path:
            raise UnreadableFile(
                f"`{file.name}`: {len(unknown)} keys match no layer of the network,"
                f" `{[*unknown, 'none'][0]}` first. {OTHERS}"
            )
        return by_path

    def doubts(
        self, file: TensorFile, by_path: Mapping[str, Parts], stated: Stated | None
    ) -> str | None:
        """Where a file leaves the strength open, though it may be meant to have another than 1."""
        without = [path for path, parts in by_path.items() if "alpha" not in parts]
        if stated is not None or not without:
            return None
        if len(without) == len(by_path):
            return self.doubt(file)
        return f"{len(without)} of {len(by_path)} layers have no alpha, `{without[0]}` first"


def warn_of_changes(file: TensorFile) -> None:
    """Of what another tool has changed since we wrote it."""
    if file.changed:
        warnings.warn(
            f"`{file.name}` is not what was written: {file.difference()} changed since. It is"
            " loaded as it is now",
            stacklevel=3,
        )


def about_of(file: TensorFile) -> dict[str, Any]:
    """What our header says of a file that we exported; {} for another's."""
    return from_file(_ABOUT, file.about, f"the `dreamtune` header of `{file.name}`")


class PlainLora(LoraFormat, ExportFormat):
    """One that is written as well."""

    def needs_base(self, change: Change) -> str:
        odd = [p for p in change.file.shapes if not f"{p}.".startswith(change.prefixes.roots)]
        if odd and change.network is None:
            return (
                f"`{odd[0]}` is no layer of a UNet, and only its network tells its name in the file"
            )
        return super().needs_base(change)

    def check(self, change: Change) -> str:
        check_low_rank(change)
        strange = [p for p in change.file.shapes if not is_layer_name(p, change.prefixes)]
        if strange:
            given = "" if change.network is not None else "give a transformer as `base`, "
            raise ValueError(
                f"`{strange[0]}` is no layer of a UNet of diffusers, {len(strange)} layers are"
                f" none: {given}use the native file with `dreamtune.load`, or export it as"
                " `peft` or as `merged`"
            )
        return "a plain LoRA"

    @abstractmethod
    def tensors(self, factors: LayerFactors, change: Change) -> dict[str, Tensor]:
        """Key -> tensor, of scale 1."""

    def strings(self, change: Change) -> dict[str, str]:
        """Of the header, for other programs."""
        return modelspec(change)

    def write(self, path: Path, change: Change, overwrite: bool) -> None:
        tensors = self.tensors(cast(change), change)
        write_new(path, tensors, change.about, overwrite, self.strings(change))


def check_low_rank(change: Change) -> None:
    """Raises ValueError for a method whose change no plain LoRA holds, and says what does."""
    method = find_method(change.file.method)
    layers = change.file.shapes if change.file.layer_options else list(change.file.shapes)[:1]
    reasons = (method.no_plain_lora(change.file.options_at(path)) for path in layers)
    if why := next(filter(None, reasons), ""):
        low = ", ".join(sorted(name for name, cls in METHODS.items() if cls.low_rank))
        also = "" if method.low_rank else ", export it as `merged`, or as `peft` if PEFT has it"
        raise ValueError(
            f"`{method.name}` {why} and no plain LoRA holds it: use the native file with"
            f" `dreamtune.load`{also}, or train one of {low}"
        )


def cast(change: Change) -> LayerFactors:
    """As they are written: of a convolution down is (r, in, kh, kw) and up (out, r, 1, 1)."""
    found = {}
    for path, (up, down) in change.factors.items():
        up, down = up.to(change.dtype), down.to(change.dtype)
        if kernel := change.file.shapes[path][2:]:
            up, down = up[..., None, None], down.view(len(down), -1, *kernel)
        found[path] = (up, down)
    return found


def in_peft_words(factors: LayerFactors, prefix: str) -> dict[str, Tensor]:
    """Key -> tensor, as PEFT names the factors of a LoRA, and diffusers after it."""
    found = {}
    for path, (up, down) in factors.items():
        found[f"{prefix}{path}.lora_A.weight"] = down
        found[f"{prefix}{path}.lora_B.weight"] = up
    return found
