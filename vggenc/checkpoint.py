"""How a file of weights becomes a verified state dict in the encoder's names, and back."""

import hashlib
import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.constants import CONFIG_NAME, SAFETENSORS_SINGLE_FILE
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import WeightsEnum, get_model_builder
from typing_extensions import Self

from vggenc.errors import UsageError, WeightsError, one_of
from vggenc.images import Preprocess
from vggenc.stages import BACKBONES, MODULES, STAGES
from vggenc.weights import REGISTRY, fetch, file_sha256, find_entry, locate, verify

METADATA_KEY = "vggenc"
"""Where a safetensors file of this package says what it is."""


class Checkpoint(NamedTuple):
    """A verified file, in the encoder's own names."""

    name: str
    """The registry's name for it, else the file's name."""
    sha256: str
    backbone: str
    preprocess: Preprocess
    state: dict[str, Tensor]
    trained: frozenset[str]
    """Modules whose values were trained."""

    @property
    def k(self) -> int | None:
        """The number of attributes its heads were made for; None where it has no heads."""
        head = self.state.get("bn1.weight")
        return None if head is None else len(head)


def load(weights: str | os.PathLike[str] | WeightsEnum, backbone: str | None = None) -> Checkpoint:
    """Read weights by registry name, torchvision enum member or path, verified and in the encoder's names.

    A path may be a `.safetensors` file, anything that `torch.save` wrote (never unpickled freely), or a
    folder that `save_pretrained` wrote. Its keys may be this package's or torchvision's, wrapped in
    `state_dict` or `model`, and prefixed `module.` or `_orig_mod.`. A file of the registry is known by its
    sha256.

    Raises:
        UsageError: no such name or file, or a backbone that contradicts the weights.
        WeightsError: a file that is damaged, bears a name of the registry but isn't it, or holds no VGG19.
    """
    if backbone not in (None, *BACKBONES):
        raise one_of("backbone", backbone, BACKBONES)
    if not isinstance(weights, (str, os.PathLike, WeightsEnum)):
        raise UsageError(f"weights must be a name, a path, torchvision's enum or None; got {weights!r}")
    named = isinstance(weights, WeightsEnum) or str(weights) in {entry.name for entry in REGISTRY}
    path = Path("" if named else weights)
    if named or not (isinstance(weights, os.PathLike) or path.exists() or path.suffix or len(path.parts) > 1):
        wanted = find_entry(weights, backbone)
        file = locate(wanted) or fetch(wanted)
    else:
        file = path / SAFETENSORS_SINGLE_FILE if path.is_dir() else path
        if not file.is_file():
            raise UsageError(f"no such weights file: {file}")

    digest = file_sha256(file)
    entry = next((entry for entry in REGISTRY if digest.startswith(entry.sha256)), None)
    for other in REGISTRY:
        if file.name == other.file and entry is not other:
            verify(file, other)  # raises
    state, about = _read(file, known=entry is not None)
    if entry is not None and entry.package:
        state = _from_palette(state)
    found = entry.backbone if entry else about.get("backbone") or _guess_backbone(state)
    if backbone not in (None, found):
        raise UsageError(f"{file} holds weights of {found}, not of backbone {backbone!r}")
    state = {own: value for key, value in state.items() if (own := _own_key(key, found)) is not None}
    for key, value in state.items():
        if not value.isfinite().all():
            raise WeightsError(f"{file} is damaged: {key} holds NaN or infinity")
    held = frozenset(key.split(".")[0] for key in state) & frozenset(MODULES)
    if not held:
        raise WeightsError(f"{file} holds no layer of this network; its keys begin {_some(state)}")
    return Checkpoint(
        name=entry.name if entry else about.get("weights", file.name),
        sha256=digest,
        backbone=found,
        preprocess=entry.preprocess if entry else about.get("preprocess", REGISTRY[0].preprocess),
        state=state,
        trained=held & about.get("trained", held),
    )


def _read(file: Path, *, known: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, without wrappers and prefixes, and what a file of this package says of itself.

    The checksums inside a file are compared unless its sha256 is known.
    """
    about = {}
    try:
        if file.suffix == ".safetensors":
            # Copied, since a file that is written over while it is mapped would kill the process.
            with safe_open(file, framework="pt") as tensors:
                content: Any = {key: tensors.get_tensor(key).clone() for key in tensors.keys()}  # noqa: SIM118
                about = json.loads((tensors.metadata() or {}).get(METADATA_KEY, "{}"))
                if about:
                    if state_sha256(content) != about["state_sha256"]:
                        raise ValueError("its values are not those that were saved")
                    about["backbone"] = BACKBONES[BACKBONES.index(about["backbone"])]
                    about["weights"] = "saved from " + about["weights"].removeprefix("saved from ")
                    about["trained"] = frozenset(about["trained"])
                    about["preprocess"] = Preprocess.from_json(about["preprocess"])
        else:
            if not known and zipfile.is_zipfile(file):  # torch.load doesn't compare the checksums
                with zipfile.ZipFile(file) as archive:
                    if damaged := archive.testzip():
                        raise ValueError(f"the checksum of {damaged} is wrong")
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or hostile file makes the readers raise
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]
        if isinstance(error, pickle.UnpicklingError):  # whose text advises to unpickle freely
            reason = "torch.save didn't write it, or it holds more than tensors"
        raise WeightsError(f"{file} can't be read as a checkpoint: {reason}") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not content:
        raise WeightsError(f"{file} holds no state dict, but a {type(content).__name__}")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise WeightsError(f"{file} holds no state dict: {key!r} is a {type(value).__name__}")
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in content.items()}
    return {key: v.float() if v.is_floating_point() else v for key, v in state.items()}, about


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """A hash of names and values, whatever order and device they are in."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(f"{key}\0".encode())
        digest.update(state[key].cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _from_palette(packed: dict[str, Tensor]) -> dict[str, Tensor]:
    """The Oxford file: each weight is an index (uint8) into 256 values of its layer; BGR becomes RGB."""
    with torch.device("meta"):
        features = get_model_builder("vgg19")(init_weights=False).features
    convolutions = [i for i, layer in enumerate(features) if isinstance(layer, nn.Conv2d)]
    names = sorted(key.removesuffix("_W_q") for key in packed if key.endswith("_W_q"))
    state = {}
    for name, index in zip(names, convolutions, strict=True):
        weight = packed[f"{name}_W_table"][packed[f"{name}_W_q"].int()]
        state[f"features.{index}.weight"] = weight.flip(1).contiguous() if index == 0 else weight
        state[f"features.{index}.bias"] = packed[f"{name}_b"]
    return state


def _guess_backbone(state: Iterable[str]) -> str:
    with_norm = any(key.endswith("running_mean") and not key.startswith("bn") for key in state)
    return "vgg19_bn" if with_norm else "vgg19"


def _own_key(key: str, backbone: str) -> str | None:
    """The encoder's name for a key of torchvision's VGG19; None for the last layer, which is left out."""
    match = re.fullmatch(r"(features|classifier)\.(\d+)\.(.+)", key)
    if not match:
        return key
    part, index, rest = match[1], int(match[2]), match[3]
    if part == "classifier":
        return None if index == 6 else f"fc_layers.{index}.{rest}"
    start = 0
    for stage in STAGES[:-1]:
        if index < stage.end[backbone]:
            return f"{stage.name}.{index - start}.{rest}"
        start = stage.end[backbone]
    return f"{STAGES[-1].name}.{index - start}.{rest}"


def check_keys(found: Iterable[str], expected: Iterable[str], source: str) -> None:
    """Compare the keys of a checkpoint with those of the modules that it holds.

    Raises:
        WeightsError: keys are missing or unexpected; the message names them.
    """
    found, expected = set(found), set(expected)
    held = {key.split(".")[0] for key in found}
    missing = sorted(key for key in expected - found if key.split(".")[0] in held)
    unexpected = sorted(found - expected)
    problems = [
        f"{what} {_some(keys)}"
        for what, keys in (("misses", missing), ("has unexpected", unexpected))
        if keys
    ]
    if problems:
        raise WeightsError(f"{source} doesn't fit this encoder: it {' and it '.join(problems)}")


def _some(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _save(file: Path, state: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write a safetensors file that says what it is; it appears under its name only when it is whole."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        save_file(state, partial, metadata={"format": "pt", METADATA_KEY: json.dumps(about)})
        shutil.copymode(file.parent / CONFIG_NAME, partial)  # the writer's own is for the owner only
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{file} can't be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


_CARD = """---
{{ card_data }}
---

A `VGG19Encoder` of the Python package vggenc:

    encoder = VGG19Encoder.from_pretrained("this folder, or its name on the Hub")
"""


class Saved(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="vggenc",
    tags=["vgg19", "zero-shot"],
    model_card_template=_CARD,
):
    """What saves an encoder to a folder or the Hugging Face Hub, and loads it from there."""

    k: int
    backbone: str
    weights_name: str
    trained: frozenset[str]
    preprocess: Preprocess

    def _save_pretrained(self, save_directory: Path) -> None:
        about = {
            "backbone": self.backbone,
            "weights": self.weights_name,
            "trained": [name for name in MODULES if name in self.trained],
            "preprocess": asdict(self.preprocess),
            "state_sha256": state_sha256(self.state_dict()),
        }
        config = {"k": self.k, "backbone": self.backbone}
        (save_directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        state = {key: value.contiguous() for key, value in self.state_dict().items()}
        _save(save_directory / SAFETENSORS_SINGLE_FILE, state, about)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> Self:
        """Load what `save_pretrained` wrote, in evaluation mode.

        Args:
            pretrained_model_name_or_path: the folder, from which nothing is downloaded, or `owner/name` of a
                repository on the Hugging Face Hub.
            **options: those of huggingface_hub's `PyTorchModelHubMixin.from_pretrained`, such as `revision`.

        Raises:
            UsageError: neither a folder nor a repository's name.
            WeightsError: it can't be downloaded, is damaged or holds no encoder.
        """
        name = os.fspath(pretrained_model_name_or_path)
        if not os.path.isdir(name) and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise UsageError(f"no such folder: {name}; a repository on the Hub is named owner/name")
        try:
            encoder: Self = super().from_pretrained(name, **options)
        except OSError as error:  # those of the Hub's library among them
            reason = str(error).strip().splitlines()[0]
            raise WeightsError(f"{name} is no folder here and can't be had from the Hub: {reason}") from error
        return encoder

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        map_location: str = "cpu",
        strict: bool = True,
        **config: Any,
    ) -> Self:
        # The file says what it holds, so nothing else is fetched; what doesn't fit is always an error.
        if os.path.isdir(model_id):
            file = os.path.join(model_id, SAFETENSORS_SINGLE_FILE)
        else:
            file = hf_hub_download(
                model_id,
                SAFETENSORS_SINGLE_FILE,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
        given = load(Path(file))
        k = config.get("k", given.k)
        if k is None:
            raise WeightsError(f"{file} holds no heads; name their number of attributes with k=")
        encoder = cls(k, backbone=config.get("backbone"), weights=given)
        return encoder.to(map_location).eval()
