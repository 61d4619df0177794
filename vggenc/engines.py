"""How a frozen encoder is run fast: from a batch of pixels to arrays by name."""

import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vggenc.encoder import VGG19Encoder
from vggenc.errors import UsageError
from vggenc.options import ENGINES, Options
from vggenc.stages import FC_WIDTH, GRID, OUTPUTS, STAGE_NAMES, STAGES
from vggenc.trunks import NcnnTrunk, OpenVinoTrunk, Tap, TorchTrunk, bound, flops, fold, pooled

Arrays = dict[str, NDArray[np.floating]]
Trunk = TorchTrunk | NcnnTrunk | OpenVinoTrunk
_TRUNKS: dict[str, type[Trunk]] = {"torch": TorchTrunk, "ncnn": NcnnTrunk, "openvino": OpenVinoTrunk}
DECODING = ("vggenc", "torchvision", "pillow")
"""Packages whose versions decide the pixels."""
_SAFE = 1e36
"""Magnitude below which nothing overflows in fp32 or bf16, a Winograd convolution's sums included."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        raise UsageError(f"device {name!r} can't be used here; there are {', '.join(here)}") from error
    return device


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware itself computes with bf16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and any(able.get(key) for key in ("avx512_bf16", "amx_bf16"))


def installed(engine: str) -> bool:
    """Whether the packages of an engine are there."""
    return all(importlib.util.find_spec(package) for package in _TRUNKS[engine].packages)


def pick(options: Options, device: torch.device) -> tuple[str, str]:
    """The engine and the precision that options come to on a device, `auto` resolved.

    Raises:
        UsageError: an engine that isn't installed, doesn't run on the device or lacks the precision.
    """
    engine, precision = options.engine, options.precision
    if precision == "auto":
        precision = "bf16" if has_bf16(device) else "fp32"
    if engine == "auto":
        able = [name for name in ENGINES[precision] if installed(name)]
        if device.type != "cpu":
            able = [name for name in able if name == "torch"]
        elif precision == "bf16" and not has_bf16(device):
            able.sort(key=lambda name: name != "ncnn")  # which keeps values in bf16, but computes with fp32
        engine = able[0] if able else ENGINES[precision][0]
    if not installed(engine):
        raise UsageError(f"{precision} with {engine} needs its extra: pip install 'vggenc[{engine}]'")
    if engine != "torch" and device.type != "cpu":
        raise UsageError(f"the engine {engine} runs on the CPU, not on {device}")
    return engine, precision


def without(encoder: VGG19Encoder, modules: Iterable[str]) -> VGG19Encoder:
    """A copy that lacks some modules, and shares its float32 values with the encoder."""
    tensors = [*encoder.parameters(), *encoder.buffers()]
    shared = {id(tensor): tensor for tensor in tensors if tensor.dtype == torch.float32}
    found = copy.deepcopy(encoder, shared)
    for name in modules:
        found.add_module(name, nn.Identity())
    return found


class Engine:
    """Runs an encoder in evaluation mode, in a form of its own: the encoder itself is never changed.

    Batch norm is folded into the convolutions. No more is computed than the outputs need.

    Args:
        encoder: the values; the engine torch runs on its device.
        outputs: names, as for `VGG19Encoder.encode`.
        options: `engine`, `precision`, `compile`, `pool`, `image_size` and `dtype` are used.

    Attributes:
        name: `torch`, `ncnn` or `openvino`.
        precision: `fp32`, `bf16`, `fp16` or `int8`.
        preprocess: the transform of the pixels it takes.
        shapes: shape of one row of each output.
        dtype: of the arrays it gives.
        flops: floating-point operations for an image, as direct convolutions.
        in_flight: batches to hand in before the first result is awaited.

    Raises:
        UsageError: as `pick` does.
    """

    def __init__(self, encoder: VGG19Encoder, outputs: tuple[str, ...], options: Options) -> None:
        self.device = next(encoder.parameters()).device
        self.name, self.precision = pick(options, self.device)
        self._compile = options.compile
        self._outputs = outputs
        self._pool = options.pool
        self._tap = "none" if options.pool == "grid" else options.pool
        self.dtype = np.dtype(options.dtype)
        self.preprocess = encoder.preprocess.at(options.image_size)
        side = self.preprocess.crop
        shapes: dict[str, tuple[int, ...]] = {"fc7": (FC_WIDTH,), "attention": (len(STAGES), encoder.k)}
        for stage in STAGES:
            cells = side // stage.reduction
            map_side = {"none": cells, "grid": min(cells, GRID)}.get(self._pool)
            shapes[stage.name] = (
                (stage.channels,) if map_side is None else (stage.channels, map_side, map_side)
            )
        self.shapes = {name: shapes.get(name, (encoder.k,)) for name in outputs}

        self._heads = {name for name in outputs if name not in STAGE_NAMES}
        seen = {"conv5_4"} if self._heads else set()
        if any("extract_0" in OUTPUTS[name] for name in self._heads):
            seen = set(STAGE_NAMES)
        self._maps = [name for name in STAGE_NAMES if name in seen]
        last = max(STAGE_NAMES.index(name) for name in (*outputs, *seen) if name in STAGE_NAMES)
        self._chain = fold({name: getattr(encoder, name) for name in STAGE_NAMES[: last + 1]})
        self.flops = flops(self._chain, side, side)
        if self.name != "torch" and not bound(self._chain, self.preprocess.largest) < _SAFE:
            raise UsageError(
                f"values of these weights may overflow, which the engine {self.name} doesn't show; use torch"
            )
        self.encoder: VGG19Encoder | None = None
        if self._heads:
            self.encoder = without(encoder, STAGE_NAMES).float().eval()
        self.trunk: Trunk | None = None
        self.in_flight = 2 if self.device.type == "cuda" else 1
        # Smaller portions stay in the CPU's cache; with more threads, more images are needed to feed them.
        self._portion = max(1, torch.get_num_threads() // 4) if self.device.type == "cpu" else 1 << 30
        self._copies: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self._copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    @property
    def calibrates(self) -> bool:
        """Whether `prepare` needs a sample of the images."""
        return self.precision == "int8"

    def settings(self) -> dict[str, Any]:
        """What decides the values here, for a manifest."""
        packages = (*DECODING, "torch", *_TRUNKS[self.name].packages)
        versions = {name: version(name) for name in packages}
        facts = {"engine": self.name, "precision": self.precision, "compile": self._compile}
        return {**facts, "versions": versions}

    def prepare(self, sample: Iterable[Tensor] = (), file: Path | None = None) -> None:
        """Build what computes; the first call does it where this wasn't called.

        Args:
            sample: for int8: pixels `(1, 3, crop, crop)` (uint8) of images like those to come.
            file: for int8: keeps the calibrated model; it is read where it exists.
        """
        taps: set[Tap] = {(name, self._tap) for name in self._outputs if name in STAGE_NAMES}
        taps |= {(name, "none") for name in self._maps}
        if self.name == "torch":
            if self.precision == "bf16" and self.device.type == "cpu" and not has_bf16(self.device):
                text = "this CPU doesn't compute with bf16: PyTorch's stand-in for it is far slower than fp32"
                warnings.warn(text, stacklevel=2)
            self.trunk = TorchTrunk(
                self._chain,
                taps,
                device=self.device,
                dtype=_DTYPES[self.precision],
                compiled=self._compile,
            )
        elif self.name == "ncnn":
            self.trunk = NcnnTrunk(self._chain, taps, bf16=self.precision == "bf16")
        else:
            images = (self.preprocess.normalize(pixels) for pixels in sample)
            self.trunk = OpenVinoTrunk(self._chain, taps, precision=self.precision, sample=images, file=file)

    def __call__(self, pixels: Tensor) -> Arrays:
        """From uint8 pixels `(N, 3, crop, crop)` to arrays `(N, *shape)` by output name."""
        return self.submit(pixels)()

    def submit(self, pixels: Tensor) -> Callable[[], Arrays]:
        """Begin with a batch; the call that is returned waits for it and gives what `__call__` gives."""
        if self.trunk is None:
            self.prepare()
        with self._context():
            portions = [self._pixels(portion) for portion in torch.split(pixels, self._portion)]
            values = {name: torch.cat([portion[name] for portion in portions]) for name in self._outputs}
            if self._copies is None:
                return lambda: self._arrays(values)
            for name, value in values.items():
                values[name] = torch.empty(value.shape, pin_memory=True).copy_(value, non_blocking=True)
            done = torch.cuda.current_stream(self.device).record_event()

        def finish() -> Arrays:
            done.synchronize()
            return self._arrays(values)

        return finish

    def _pixels(self, pixels: Tensor) -> dict[str, Tensor]:
        if self._copies is not None:  # the copy of this batch overlaps the computing of the last one
            with torch.cuda.stream(self._copies):
                pixels = pixels.to(self.device, non_blocking=True)
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._copies)
            pixels.record_stream(current)
        return self.compute(self.preprocess.normalize(pixels.to(self.device)))

    def compute(self, images: Tensor) -> dict[str, Tensor]:
        """From normalised images `(N, 3, H, W)` on the engine's device to float32 tensors by output name."""
        assert self.trunk is not None
        taps = self.trunk(images)
        found = {
            name: pooled(taps[name, self._tap], self._pool) for name in self._outputs if name in STAGE_NAMES
        }
        if self.encoder is not None:
            maps = [taps[name, "none"].to(self.device) for name in self._maps]
            found.update(self.encoder.heads(maps, self._heads))
        return {name: found[name] for name in self._outputs}

    def _context(self) -> AbstractContextManager[object]:
        stack = ExitStack()
        stack.enter_context(torch.inference_mode())
        if self.device.type == "cuda":  # fp32 is to mean fp32, not TF32
            flags = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
            stack.enter_context(flags)
        return stack

    def _arrays(self, values: dict[str, Tensor]) -> Arrays:
        with np.errstate(over="ignore"):  # overflow to infinity is noticed where rows are made
            return {
                name: value.cpu().numpy().astype(self.dtype, copy=False) for name, value in values.items()
            }
