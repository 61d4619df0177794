"""The stage table, and what can be asked of the encoder by name.

Free of torch, so that help texts are quick.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from vggenc.errors import UsageError

DEFAULT_BACKBONE = "vgg19_bn"
BACKBONES = (DEFAULT_BACKBONE, "vgg19")


class Stage(NamedTuple):
    """One of the four slices of VGG19's `features`; each ends **after** the ReLU of its last convolution."""

    name: str
    channels: int
    reduction: int
    """Input pixels for one cell of the map, along each axis."""
    end: dict[str, int]
    """Where the slice ends in torchvision's `features`, by backbone; it begins where the last one ended."""


STAGES = (
    Stage("conv2_2", 128, 2, {"vgg19_bn": 13, "vgg19": 9}),
    Stage("conv3_4", 256, 4, {"vgg19_bn": 26, "vgg19": 18}),
    Stage("conv4_4", 512, 8, {"vgg19_bn": 39, "vgg19": 27}),
    Stage("conv5_4", 512, 16, {"vgg19_bn": -1, "vgg19": -1}),
)
STAGE_NAMES = tuple(stage.name for stage in STAGES)
FC_WIDTH = 4096
GRID = 14
"""Cells along each side of the map that a head sees: conv5_4's own at 224 pixels."""

# Output name -> the modules that it passes through: it is trained where all of them are.
_FC7 = (*STAGE_NAMES, "fc_layers")
_LATENT = (*_FC7, "fc4", "bn2")
_ATTENTION = (*_LATENT, *(f"{head}{i}" for head in ("extract_", "fc") for i in range(len(STAGES))))
OUTPUTS: dict[str, tuple[str, ...]] = {
    **{name: STAGE_NAMES[: i + 1] for i, name in enumerate(STAGE_NAMES)},
    "fc7": _FC7,
    "attention": _ATTENTION,
    "attributes": (*_ATTENTION, "bn1"),
    "latent": _LATENT,
}
MODULES = OUTPUTS["attributes"]
"""Every module that holds parameters, by its state-dict name."""


class FeatureInfo:
    """The stage table in timm's convention: each call answers for all stages, or for those of `idx`."""

    def __init__(self) -> None:
        self.out_indices = tuple(range(len(STAGES)))
        self.info = [
            {"num_chs": stage.channels, "reduction": stage.reduction, "module": stage.name, "index": i}
            for i, stage in enumerate(STAGES)
        ]

    def __len__(self) -> int:
        return len(self.info)

    def __getitem__(self, idx: int) -> dict[str, Any]:
        return self.info[idx]

    def get(self, key: str, idx: int | Sequence[int] | None = None) -> Any:
        """One field: `num_chs`, `reduction`, `module` or `index`."""
        if isinstance(idx, int):
            return self.info[idx][key]
        return [self.info[i][key] for i in (self.out_indices if idx is None else idx)]

    def get_dicts(self, keys: Sequence[str] | None = None, idx: int | Sequence[int] | None = None) -> Any:
        """Several fields of each stage, all of them by default."""
        if isinstance(idx, int):
            return {key: self.info[idx][key] for key in keys or self.info[idx]}
        return [self.get_dicts(keys, i) for i in (self.out_indices if idx is None else idx)]

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        """Channels of the map."""
        return self.get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        """Input pixels for one cell of the map, along each axis."""
        return self.get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        """The stage's name, which is also its module's."""
        return self.get("module", idx)


def take_indices(indices: int | Sequence[int] | None) -> set[int]:
    """Stage numbers by timm's rules: None: all, an int n: the last n, else numbers, negative from the end.

    Raises:
        UsageError: out of range, or none.
    """
    count = len(STAGES)
    if isinstance(indices, int):
        wanted = set(range(count - indices, count))
    else:
        wanted = {i + count if i < 0 else i for i in (range(count) if indices is None else indices)}
    if not wanted or not all(0 <= i < count for i in wanted):
        raise UsageError(f"indices must be some of 0 to {count - 1} (timm's 1 to {count}); got {indices!r}")
    return wanted
