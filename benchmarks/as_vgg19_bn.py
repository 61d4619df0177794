"""OXFORD_V1 as a vgg19_bn: the same features, with a batch norm behind each convolution.

For measuring vgg19_bn offline. The convolutions are scaled channel by channel; the batch norms undo it.

    python benchmarks/as_vgg19_bn.py oxford-bn && vggenc benchmark --weights oxford-bn
"""

import sys

import torch
from torch import nn

from vggenc import VGG19Encoder
from vggenc.stages import STAGE_NAMES

source = VGG19Encoder(1, weights="OXFORD_V1")
target = VGG19Encoder(1, backbone="vgg19_bn", weights=None)
target.preprocess = source.preprocess
generator = torch.Generator().manual_seed(0)
with torch.no_grad():
    for name in STAGE_NAMES:
        convolutions = [layer for layer in getattr(source, name) if isinstance(layer, nn.Conv2d)]
        layers = list(getattr(target, name))
        norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)]
        for layer, conv, norm in zip(
            [layer for layer in layers if isinstance(layer, nn.Conv2d)], convolutions, norms, strict=True
        ):
            scale = torch.empty(conv.out_channels).uniform_(0.5, 2, generator=generator)
            layer.weight.copy_(conv.weight * scale.view(-1, 1, 1, 1))
            layer.bias.copy_(conv.bias * scale)
            norm.running_mean.uniform_(-1, 1, generator=generator)
            norm.running_var.uniform_(0.5, 2, generator=generator)
            deviation = (norm.running_var + norm.eps).sqrt()
            norm.weight.copy_(deviation / scale)
            norm.bias.copy_(norm.running_mean / scale)
target.mark_trained(*STAGE_NAMES)
target.save_pretrained(sys.argv[1])
