"""Bringing the maps of VGG19 without batch norm to one scale, which LFGAA's heads and rates are made for."""

import numpy as np
import torch
from torch import nn

from vggenc.encoder import VGG19Encoder
from vggenc.options import Options
from vggenc.pipeline import iter_features
from vggenc.stages import STAGE_NAMES
from vggenc.zsl.data import ZSLData

SCALE = 0.3
"""Root mean square of a map afterwards, about; the original VGG19's are 5 to 1100."""
_IMAGES = 32


def balance_stages(encoder: VGG19Encoder, data: ZSLData, options: Options) -> dict[str, int]:
    """Multiply the maps of each stage by a power of two, so that their root mean square is about `SCALE`.

    Without it the attention over attributes, a softmax of sums over the maps, begins with nearly all its
    weight on one attribute. The weights take the factors up, which changes nothing of a map but its
    exponents; what trained `fc_layers` give stays the same. `vgg19_bn`, whose batch norm has scales of its
    own, is left as it is.

    Args:
        encoder: changed in place.
        data: some of whose training images are looked at.
        options: how they are read and computed.

    Returns:
        The exponents, by stage.
    """
    if encoder.backbone != "vgg19":  # which has batch norm
        return dict.fromkeys(STAGE_NAMES, 0)
    some = data.trainval[np.linspace(0, len(data.trainval) - 1, min(_IMAGES, len(data.trainval))).astype(int)]
    squares: dict[str, list[float]] = {name: [] for name in STAGE_NAMES}
    looked = Options(
        pool="grid",
        image_size=options.image_size,
        num_workers=options.num_workers,
        allow_untrained=True,
        batch_size=8,
    )
    for batch in iter_features(data.images(some), encoder, options=looked):
        for name, maps in batch.features.items():
            squares[name].append(float(np.nanmean(np.square(maps, dtype=np.float64))))
    exponents = {
        name: round(float(np.log2(SCALE / np.sqrt(np.mean(values))))) for name, values in squares.items()
    }
    scale_stages(encoder, exponents)
    return exponents


@torch.no_grad()
def scale_stages(encoder: VGG19Encoder, exponents: dict[str, int]) -> None:
    """Multiply the maps of each stage of a VGG19 without batch norm by two to the power of its exponent."""
    if not any(exponents.values()):
        return
    before = 1.0
    for name in STAGE_NAMES:
        factor = 2.0 ** exponents[name]
        convolutions = [layer for layer in getattr(encoder, name) if isinstance(layer, nn.Conv2d)]
        convolutions[0].weight.mul_(factor / before)
        for layer in convolutions:
            assert layer.bias is not None
            layer.bias.mul_(factor)
        before = factor
    first = encoder.fc_layers[0]
    assert isinstance(first, nn.Linear)
    if "fc_layers" in encoder.trained:
        first.weight.div_(before)
