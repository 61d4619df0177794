"""How a frozen encoder is run: from a batch of pixels to arrays by name."""

import copy
from contextlib import AbstractContextManager, ExitStack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vggenc.encoder import VGG19Encoder
from vggenc.errors import UsageError
from vggenc.options import Options
from vggenc.stages import FC_WIDTH, STAGES

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """The device of a name such as `cpu` or `cuda:1`; `auto` is the first GPU where there is one.

    Raises:
        UsageError: a device that PyTorch doesn't know or this machine doesn't have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise UsageError(
            f"device {name!r} can't be used on this machine; it has {', '.join(here)}"
        ) from error
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """The precision of a name; `auto` is bf16 where the hardware computes with it, else fp32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        native = device.type == "cpu" and any(able.get(key) for key in ("avx512_bf16", "amx_bf16"))
    return "bf16" if native else "fp32"


class TorchEngine:
    """Runs an encoder in evaluation mode on its own device, without touching the encoder's modes.

    Args:
        encoder: its values are shared, not copied.
        outputs: names, as for `VGG19Encoder.encode`.
        options: `pool`, `precision`, `image_size` and `dtype` are used.
    """

    name = "torch"

    def __init__(self, encoder: VGG19Encoder, outputs: tuple[str, ...], options: Options) -> None:
        tensors = [*encoder.parameters(), *encoder.buffers()]
        self._encoder = copy.deepcopy(encoder, {id(tensor): tensor for tensor in tensors}).eval()
        self._device, self._values = tensors[0].device, tensors[0].dtype
        self._outputs = outputs
        self._pool = options.pool
        self._dtype = np.dtype(options.dtype)
        own = {dtype: name for name, dtype in _DTYPES.items()}.get(self._values)  # as after encoder.half()
        self.precision = own or pick_precision(options.precision, self._device)
        self.preprocess = encoder.preprocess.at(options.image_size)
        side = self.preprocess.crop
        self.shapes: dict[str, tuple[int, ...]] = {"fc7": (FC_WIDTH,), "attention": (len(STAGES), encoder.k)}
        for stage in STAGES:
            cells = () if self._pool != "none" else (side // stage.reduction,) * 2
            self.shapes[stage.name] = (stage.channels, *cells)
        self.shapes = {name: self.shapes.get(name, (encoder.k,)) for name in outputs}

    def __call__(self, pixels: Tensor) -> dict[str, NDArray[np.floating]]:
        """From uint8 pixels `(N, 3, crop, crop)` to arrays `(N, *shape)` by output name."""
        with self._context():
            pixels = pixels.to(self._device, memory_format=torch.channels_last)
            images = self.preprocess.normalize(pixels).to(self._values)
            encoded = self._encoder.encode(images, self._outputs, allow_untrained=True)
            return {name: self._finish(value) for name, value in encoded.items()}

    def _context(self) -> AbstractContextManager[object]:
        stack = ExitStack()
        stack.enter_context(torch.inference_mode())
        if self.precision in _DTYPES:
            stack.enter_context(torch.autocast(self._device.type, _DTYPES[self.precision]))
        elif self._device.type == "cuda":  # fp32 is to mean fp32, not TF32
            flags = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
            stack.enter_context(flags)
        return stack

    def _finish(self, value: Tensor) -> NDArray[np.floating]:
        value = value.float()
        if value.ndim == 4 and self._pool == "avg":
            value = value.mean((2, 3))
        elif value.ndim == 4 and self._pool == "max":
            value = value.amax((2, 3))
        with np.errstate(over="ignore"):  # overflow to infinity is noticed where rows are made
            return value.cpu().contiguous().numpy().astype(self._dtype, copy=False)
