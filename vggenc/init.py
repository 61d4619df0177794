"""How layers that carry no pretrained values begin."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from vggenc.errors import UsageError, one_of

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
SCHEMES = ("normal", "xavier_normal")
_SLICE = 1 << 22


def weight_init(*modules: nn.Module, scheme: str = "normal", std: float = 0.01) -> None:
    """Initialise modules, and all that is nested in them, in place.

    Linear layers and 1x1 convolutions draw their weights from N(0, `std`), where PyTorch's own default is
    U(-sqrt(1/in), sqrt(1/in)). Wider convolutions draw them from N(0, 2 / fan_out), as torchvision's VGG
    does (He et al. 2015). Biases become 0, batch norm becomes 1 and 0 with running statistics 0 and 1.
    Layers of other kinds are left as they are. On a whole VGG19 this is torchvision's initialisation.

    Works as `weight_init(net.head, net.norm)` and as `net.apply(weight_init)`; the latter visits nested
    layers once a level, so the draws differ but not their distribution.

    Args:
        modules: any number of modules.
        scheme: `"normal"`, or `"xavier_normal"` for Linear and 1x1 convolutions as in the published LFGAA
            code (Liu et al., ICCV 2019).
        std: standard deviation of the scheme `"normal"`, not negative.

    Raises:
        UsageError: something other than a module, an unknown scheme, a negative `std`.

    Example:
        >>> head = nn.Linear(4096, 85)
        >>> weight_init(head)
        >>> float(head.weight.std()), float(head.bias.abs().max())   # about 0.01, exactly 0
    """
    if scheme not in SCHEMES:
        raise one_of("scheme", scheme, SCHEMES)
    if not std >= 0:
        raise UsageError(f"std must be 0 or more; got {std!r}")
    for module in modules:
        if not isinstance(module, nn.Module):
            raise UsageError(f"weight_init takes modules; got {type(module).__name__}")
        for layer in module.modules():
            _init_layer(layer, scheme, std)


def _init_layer(layer: nn.Module, scheme: str, std: float) -> None:
    if isinstance(layer, _BATCH_NORMS):
        layer.reset_parameters()  # running statistics, then weight 1 and bias 0
    elif isinstance(layer, (nn.Linear, *_CONVOLUTIONS)):
        if isinstance(layer, _CONVOLUTIONS) and layer.weight[0, 0].numel() > 1:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif scheme == "xavier_normal":
            nn.init.xavier_normal_(layer.weight)
        else:
            _draw(layer.weight, std)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _draw(weight: Tensor, std: float) -> None:
    """N(0, std), in slices with seeds of their own on all cores where there are many values."""
    if weight.device.type != "cpu" or weight.numel() < 2 * _SLICE or not weight.is_contiguous():
        nn.init.normal_(weight, 0.0, std)
        return
    slices = torch.split(weight.detach().view(-1), _SLICE)
    seeds = torch.randint(2**62, (len(slices),)).tolist()

    def draw(part: Tensor, seed: int) -> None:
        nn.init.normal_(part, 0.0, std, generator=torch.Generator().manual_seed(seed))

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(draw, slices, seeds))
