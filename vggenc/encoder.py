"""VGG19Encoder: four VGG19 stages, the attribute heads, and the attention that a latent vector guides."""

import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import WeightsEnum, get_model_builder
from typing_extensions import Self

from vggenc.checkpoint import Checkpoint, Saved, check_keys, load
from vggenc.errors import UsageError, WeightsError, one_of
from vggenc.finetune import FineTuning
from vggenc.init import weight_init
from vggenc.options import DEFAULT_WEIGHTS, MAX_K, MIN_SIZE, check_outputs
from vggenc.stages import (
    BACKBONES,
    DEFAULT_BACKBONE,
    FC_WIDTH,
    GRID,
    MODULES,
    OUTPUTS,
    STAGE_NAMES,
    STAGES,
    FeatureInfo,
    take_indices,
)
from vggenc.weights import REGISTRY

TAIL_GRID = 7
"""Cells along each side of the map that the fully connected layers see."""


class EncoderOutput(NamedTuple):
    """What the encoder predicts for N images."""

    attributes: Tensor
    """`(N, k)`: attribute scores, unbounded."""
    latent: Tensor
    """`(N, k)`: the latent vector that guides the attention, batch-normalised."""


class VGG19Encoder(FineTuning, Saved):
    """VGG19 at four depths with an attribute prediction on top (LFGAA, Liu et al., ICCV 2019).

    The stages `conv2_2 conv3_4 conv4_4 conv5_4` end after the ReLU of the convolution they are named for. A
    new encoder is in training mode, as torchvision's models are; call `.eval()` before you predict with it.

    Args:
        k: number of attributes, from 1 to 100,000.
        backbone: `"vgg19_bn"` or `"vgg19"`; None: the one that the weights belong to, else `"vgg19_bn"`.
        weights: a registry name (`"IMAGENET1K_V1"`, downloaded once; `"OXFORD_V1"`, from the extra `oxford`),
            a member of torchvision's `VGG19_BN_Weights` or `VGG19_Weights`, a path, what
            `vggenc.checkpoint.load` read, or None. Layers that the weights don't hold begin with
            `weight_init` and count as untrained.

    Attributes:
        k: number of attributes.
        backbone: the backbone's name.
        preprocess: from a PIL image to the tensor `(3, 224, 224)` that these weights expect.
        trained: names of the modules whose values were trained.
        weights_name: the weights' name in the registry or their file's, `"saved from ..."` for what
            `save_pretrained` wrote, `"random"` for None.
        weights_sha256: of their file.
        feature_info: channels, reduction and module name of each stage, as in timm.

    Raises:
        UsageError: a `k` below 1, an unknown backbone or weights' name, or two that contradict each other.
        WeightsError: weights that can't be had, are damaged or don't fit.

    Example:
        >>> encoder = VGG19Encoder(k=85, weights="OXFORD_V1").eval()
        >>> maps = encoder.encode(torch.rand(2, 3, 224, 224), ["conv3_4", "conv5_4"])
        >>> maps["conv5_4"].shape
        torch.Size([2, 512, 14, 14])
    """

    def __init__(
        self,
        k: int,
        *,
        backbone: str | None = None,
        weights: str | os.PathLike[str] | WeightsEnum | Checkpoint | None = DEFAULT_WEIGHTS,
    ) -> None:
        super().__init__()
        if not isinstance(k, Integral) or isinstance(k, bool) or not 1 <= k <= MAX_K:
            raise UsageError(
                f"k, the number of attributes, must be a whole number from 1 to {MAX_K}; got {k!r}"
            )
        if backbone not in (None, *BACKBONES):
            raise one_of("backbone", backbone, BACKBONES)
        given = weights if isinstance(weights, Checkpoint | None) else load(weights, backbone)
        if given and backbone not in (None, given.backbone):
            raise UsageError(f"the weights {given.name} belong to {given.backbone}, not to {backbone!r}")

        self.k = int(k)
        self.backbone = given.backbone if given else backbone or DEFAULT_BACKBONE
        self.preprocess = given.preprocess if given else REGISTRY[0].preprocess
        self.weights_name = given.name if given else "random"
        self.weights_sha256: str | None = given.sha256 if given else None
        self.feature_info = FeatureInfo()

        with torch.device("meta"):  # no memory and no random numbers until it is known what is needed
            self._build()
        self.trained: frozenset[str] = frozenset()
        self._fill(given.state if given else {}, self.weights_name)
        self.trained = given.trained if given else frozenset()

    def _build(self) -> None:
        """The layers; their names are the keys of the state dict, and a promise."""
        vgg = get_model_builder(self.backbone)(init_weights=False)
        for layer in vgg.modules():
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # so that whoever hooks a layer sees its own output
        start = 0
        for stage in STAGES:
            end = stage.end[self.backbone]
            self.add_module(stage.name, nn.Sequential(*vgg.features[start:end]))
            start = end
        self.tail_layer = vgg.features[start]
        self.fc_layers = nn.Sequential(*vgg.classifier[:-2])

        for i, stage in enumerate(STAGES):
            head = nn.Conv2d(stage.channels, self.k, kernel_size=1)
            pool = [nn.AdaptiveMaxPool2d(GRID)] if i < len(STAGES) - 1 else []
            self.add_module(f"extract_{i}", nn.Sequential(*pool, head))
            self.add_module(f"fc{i}", nn.Linear(GRID * GRID, 1))
        self.fc4 = nn.Linear(FC_WIDTH, 2 * self.k)
        self.bn1 = nn.BatchNorm1d(self.k)
        self.bn2 = nn.BatchNorm1d(self.k)

    def _fill(self, state: Mapping[str, Tensor], source: str) -> None:
        """Take over the pretrained modules as they are, and initialise the others."""
        expected = self.state_dict()
        state = dict(state)
        held = {key.split(".")[0] for key in state}
        for key in expected:  # files older than PyTorch 0.4.1 don't count batches
            if key.endswith("num_batches_tracked") and key.split(".")[0] in held:
                state.setdefault(key, torch.tensor(0))
        check_keys(state, expected, source)
        for key, value in state.items():
            if value.shape != expected[key].shape:
                raise WeightsError(
                    f"{source} doesn't fit this encoder (k={self.k}, {self.backbone}): {key} is "
                    f"{tuple(value.shape)} there and {tuple(expected[key].shape)} here"
                )
        self.load_state_dict(state, strict=False, assign=True)
        for name in MODULES:
            if name not in held:
                weight_init(getattr(self, name).to_empty(device="cpu"))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # Values that come from outside count as trained, also where this encoder is part of a larger module.
        super()._load_from_state_dict(state_dict, prefix, *args)
        held = {key.removeprefix(prefix).split(".")[0] for key in state_dict if key.startswith(prefix)}
        self.trained |= held.intersection(MODULES)

    def forward(self, images: Tensor) -> EncoderOutput:
        """Predict attributes, whether or not the heads were ever trained.

        Args:
            images: `(N, 3, H, W)`, float, normalised as `preprocess` does, H and W 32 or more.

        Raises:
            UsageError: images of another shape or of whole numbers; the message gives the shape.
        """
        outputs = self.encode(images, ("attributes", "latent"), allow_untrained=True)
        return EncoderOutput(outputs["attributes"], outputs["latent"])

    def encode(
        self, images: Tensor, outputs: Iterable[str] = STAGE_NAMES, *, allow_untrained: bool = False
    ) -> dict[str, Tensor]:
        """Compute features by name, no deeper than the deepest asked; differentiable, in the current mode.

        Args:
            images: as in `forward`.
            outputs: any of `conv2_2 conv3_4 conv4_4 conv5_4` (maps `(N, C, H/r, W/r)` after their ReLU; see
                `feature_info` for C and r), `fc7` `(N, 4096)`, `attention` `(N, 4, k)` (a softmax over the
                attributes for each stage), `attributes` and `latent` `(N, k)`.
            allow_untrained: hand out features of layers that were never trained.

        Returns:
            A tensor by name, in the order asked.

        Raises:
            UsageError: an unknown name, features that were never trained, or images as in `forward`.
        """
        names = check_outputs(outputs)
        _check_images(images)
        if not allow_untrained:
            self.check_trained(names)
        last = max(
            STAGE_NAMES.index(OUTPUTS[name][-1]) if name in STAGE_NAMES else len(STAGES) - 1 for name in names
        )
        maps = self._stages(images, last)
        found = dict(zip(STAGE_NAMES, maps, strict=False))
        if heads := set(names).difference(STAGE_NAMES):
            found.update(self.heads(maps, heads))
        return {name: found[name] for name in names}

    def _stages(self, images: Tensor, last: int) -> list[Tensor]:
        """The outputs of the stages 0 to `last`."""
        maps, x = [], images
        for name in STAGE_NAMES[: last + 1]:
            stage = getattr(self, name)
            x = self.checkpointed(stage, x) if self.grad_checkpointing else stage(x)
            maps.append(x)
        return maps

    def heads(self, maps: Sequence[Tensor], names: set[str]) -> dict[str, Tensor]:
        """What stands on the maps of the stages, as far as `names` need it; `latent` needs the last only."""
        tail = F.adaptive_avg_pool2d(self.tail_layer(maps[-1]), TAIL_GRID)
        fc7 = self.fc_layers(tail.flatten(1))
        if names == {"fc7"}:
            return {"fc7": fc7}
        h = F.relu(self.fc4(fc7))
        latent = self.bn2(h[:, self.k :])
        if names <= {"fc7", "latent"}:
            return {"fc7": fc7, "latent": latent}
        attention = torch.stack([self._attention(i, x, latent) for i, x in enumerate(maps)], dim=1)
        attributes = self.bn1(h[:, : self.k]) * attention.sum(1) if "attributes" in names else attention
        return {"fc7": fc7, "latent": latent, "attention": attention, "attributes": attributes}

    def _attention(self, i: int, x: Tensor, latent: Tensor) -> Tensor:
        """Stage i's share of each attribute, `(N, k)`, summing to 1 over the attributes."""
        scores = getattr(self, f"fc{i}")(self.evidence(i, x) + latent.unsqueeze(2))
        return F.softmax(scores.squeeze(2), dim=1)

    def evidence(self, i: int, x: Tensor) -> Tensor:
        """Stage i's evidence for each attribute in each cell of the grid, `(N, k, 196)`, from its map."""
        x = F.adaptive_max_pool2d(x, GRID) if i == len(STAGES) - 1 else x
        found: Tensor = getattr(self, f"extract_{i}")(x).flatten(2)
        return found

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The stages in timm's calling convention, trained or not; its indices 1 to 4 are 0 to 3 here.

        Args:
            x: images as in `forward`.
            indices: stages by number, negative from the end; an int n means the last n; None means all.
            norm: of no effect, since VGG has no final norm.
            stop_early: compute no deeper than the deepest stage asked.
            output_fmt: `"NCHW"`.
            intermediates_only: return the list alone.

        Returns:
            The last map computed (after the final pooling unless stopped early), and the stages asked.

        Raises:
            UsageError: indices out of range, another `output_fmt`, or images as in `forward`.
        """
        if output_fmt != "NCHW":
            raise one_of("output_fmt", output_fmt, ["NCHW"])
        _check_images(x)
        wanted = take_indices(indices)
        maps = self._stages(x, max(wanted) if stop_early or intermediates_only else len(STAGES) - 1)
        intermediates = [stage for i, stage in enumerate(maps) if i in wanted]
        if intermediates_only:
            return intermediates
        return (maps[-1] if stop_early else self.tail_layer(maps[-1])), intermediates

    @classmethod
    def from_lfgaa(cls, path: str | os.PathLike[str]) -> Self:
        """Load a checkpoint of the published LFGAA code's VGG19 network, in evaluation mode.

        Args:
            path: what its `torch.save` wrote: 144 entries, from `conv2_2.0.weight` on.

        Raises:
            UsageError: no such file.
            WeightsError: a file that is damaged or doesn't hold just this network.
        """
        given = load(Path(path))
        lacking = [name for name in MODULES if name not in given.trained]
        if lacking or given.backbone != DEFAULT_BACKBONE or given.k is None:
            what = f"lacks {', '.join(lacking)}" if lacking else f"is of {given.backbone}"
            raise WeightsError(f"{path} is no checkpoint of LFGAA's VGG19: it {what}")
        return cls(given.k, weights=given).eval()

    def check_trained(self, outputs: Iterable[str]) -> None:
        """See to it that every layer behind some outputs was trained.

        Raises:
            UsageError: one wasn't; the message names it and the ways out.
        """
        for name in check_outputs(outputs):
            if missing := [module for module in OUTPUTS[name] if module not in self.trained]:
                holders = [entry.name for entry in REGISTRY if set(missing) <= set(entry.holds)]
                such = f", such as {holders[0]}" if holders else ""
                raise UsageError(
                    f"{name!r} passes through layers that were never trained with the weights "
                    f"{self.weights_name!r}: {', '.join(missing)}. Load weights that hold them{such}, call "
                    "mark_trained() once you have trained them, or allow it with allow_untrained=True "
                    "(--allow-untrained)."
                )

    def mark_trained(self, *modules: str) -> None:
        """Declare modules trained, as after fine-tuning; all of them where none is named.

        Raises:
            UsageError: a name that is no module with parameters.
        """
        for name in modules:
            if name not in MODULES:
                raise one_of("a module", name, MODULES)
        self.trained |= frozenset(modules or MODULES)


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or min(images.shape[2:]) < MIN_SIZE:
        raise UsageError(
            f"images must be (N, 3, H, W) with H and W of {MIN_SIZE} or more; got {tuple(images.shape)}"
        )
    if not images.is_floating_point():
        raise UsageError(f"images must be floating point, as from encoder.preprocess; got {images.dtype}")
