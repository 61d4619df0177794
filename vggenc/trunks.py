"""The stages of a frozen encoder as one chain of 3x3 convolutions, and who computes it.

Each trunk is called with normalised images `(N, 3, H, W)` (float32) and gives a float32 tensor for each tap:
a stage and how it is handed out, as its whole map or pooled to one vector.
"""

import contextlib
import io
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from vggenc.errors import StoreError, UsageError
from vggenc.stages import GRID, STAGE_NAMES

Tap = tuple[str, str]
"""A stage's name, and `avg`, `max` or `none` for its whole map."""
CALIBRATION_IMAGES = 48


class Conv(NamedTuple):
    """A 3x3 convolution with padding 1, ahead of a ReLU."""

    weight: Tensor
    """`(out, in, 3, 3)`, float32."""
    bias: Tensor


Chain = Mapping[str, Sequence[Conv | None]]
"""The layers of each stage, in order; None is a 2x2 max-pool with stride 2."""


@torch.no_grad()
def fold(stages: Mapping[str, nn.Module]) -> Chain:
    """Take stages apart into a chain, with batch norm folded into the convolutions (in float64).

    Raises:
        UsageError: a layer that VGG19 doesn't have, as after surgery on the encoder.
    """
    chain: dict[str, list[Conv | None]] = {}
    for name, stage in stages.items():
        layers: list[Conv | None] = []
        for layer in stage.modules():
            last = layers[-1] if layers else None
            if isinstance(layer, nn.Conv2d) and (layer.kernel_size, layer.padding) == ((3, 3), (1, 1)):
                weight = layer.weight.double()
                bias = weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.double()
                layers.append(Conv(weight, bias))
            elif isinstance(layer, (nn.BatchNorm2d, nn.SyncBatchNorm)) and last:
                assert layer.running_mean is not None
                assert layer.running_var is not None
                scale = layer.weight.double() * (layer.running_var.double() + layer.eps).rsqrt()
                shifted = (last.bias - layer.running_mean.double()) * scale + layer.bias.double()
                layers[-1] = Conv(last.weight * scale[:, None, None, None], shifted)
            elif isinstance(layer, nn.MaxPool2d):
                layers.append(None)
            elif not isinstance(layer, (nn.ReLU, nn.Sequential)):
                raise UsageError(f"{name} holds a layer that VGG19 doesn't have: {layer}")
        chain[name] = [conv and Conv(conv.weight.float().cpu(), conv.bias.float().cpu()) for conv in layers]
    return chain


def bound(chain: Chain, largest: Sequence[float]) -> float:
    """What no value of a chain can exceed.

    Args:
        chain: its layers.
        largest: magnitude of the three input channels at most.
    """
    values = torch.tensor(largest, dtype=torch.float64)
    most = 0.0
    for conv in (layer for layers in chain.values() for layer in layers if layer):
        weight = conv.weight.double()
        # Behind a ReLU nothing is negative, so that only positive weights add to the largest sum.
        weight = weight.clamp(min=0) if most else weight.abs()
        values = (weight.sum((2, 3)) @ values + conv.bias.double()).clamp(min=0)
        most = max(most, float(values.max()))
    return most


class TorchTrunk(nn.Module):
    """PyTorch, in `channels_last` and in the precision's own number format."""

    packages = ()

    def __init__(
        self, chain: Chain, taps: Iterable[Tap], *, device: torch.device, dtype: torch.dtype, compiled: bool
    ) -> None:
        super().__init__()
        self.taps = tuple(taps)
        self.stages = nn.ModuleDict()
        for name, layers in chain.items():
            stage = nn.Sequential()
            for layer in layers:
                if layer is None:
                    stage.append(nn.MaxPool2d(2))
                    continue
                outputs, inputs = layer.weight.shape[:2]
                conv = nn.utils.skip_init(nn.Conv2d, inputs, outputs, 3, padding=1)  # type: ignore[no-untyped-call]
                conv.load_state_dict(layer._asdict())
                stage.extend([conv, nn.ReLU(inplace=True)])
            self.stages[name] = stage
        self.dtype = dtype
        self.requires_grad_(False).to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if compiled:
            self.compile()

    def forward(self, images: Tensor) -> dict[Tap, Tensor]:
        """The taps of some images."""
        found = {}
        x = images.to(self.dtype, memory_format=torch.channels_last)
        for name, stage in self.stages.items():
            x = stage(x)
            for tap in self.taps:
                if tap[0] == name:
                    found[tap] = pooled(x.float(), tap[1])
        return found


def pooled(maps: Tensor, pool: str) -> Tensor:
    """Maps `(N, C, H, W)` handed out in one of the ways of `Options.pool`; vectors are pooled already."""
    if pool == "grid":
        return F.adaptive_max_pool2d(maps, GRID) if max(maps.shape[2:]) > GRID else maps
    if pool == "none" or maps.ndim == 2:
        return maps
    return maps.mean((2, 3)) if pool == "avg" else maps.amax((2, 3))


class NcnnTrunk:
    """ncnn: Winograd convolutions, which need fewer multiplications than direct ones, at fp32's accuracy."""

    packages = ("ncnn",)

    def __init__(self, chain: Chain, taps: Iterable[Tap], *, bf16: bool) -> None:
        import ncnn

        self._ncnn = ncnn
        self._taps = {tap: "_".join(tap) for tap in taps}
        self._net = ncnn.Net()
        self._net.opt.num_threads = torch.get_num_threads()
        self._net.opt.use_vulkan_compute = False
        self._net.opt.use_bf16_storage = bf16
        self._net.opt.use_fp16_packed = self._net.opt.use_fp16_storage = False
        self._net.opt.use_fp16_arithmetic = False
        with tempfile.TemporaryDirectory() as folder:  # the weights can only be read from a file
            values = Path(folder) / "model.bin"
            with values.open("wb") as stream:
                for layer in (layer for layers in chain.values() for layer in layers if layer):
                    stream.write(b"\0\0\0\0")  # float32 follows
                    stream.write(layer.weight.numpy().tobytes() + layer.bias.numpy().tobytes())
            if self._net.load_param_mem(self._text(chain)) or self._net.load_model(str(values)):
                raise RuntimeError("ncnn refused the model")

    def _text(self, chain: Chain) -> str:
        """The network in ncnn's format: type, name, numbers of inputs and outputs, their names, options."""
        lines, x = ["Input images 0 1 images"], "images"
        for name, layers in chain.items():
            for i, layer in enumerate(layers):
                y = f"{name}_{i}"
                if layer is None:  # 2x2 with stride 2, without a last odd row or column
                    lines.append(f"Pooling {y} 1 1 {x} {y} 0=0 1=2 2=2 5=1")
                else:  # 3x3 with padding 1, a bias and a ReLU
                    options = f"0={len(layer.weight)} 1=3 4=1 5=1 6={layer.weight.numel()} 9=1"
                    lines.append(f"Convolution {y} 1 1 {x} {y} {options}")
                x = y
            # A blob has one reader: a copy for each tap, and one that goes on.
            branches = [(pool, blob) for (stage, pool), blob in self._taps.items() if stage == name]
            uses = [f"{name}_to_{i}" for i in range(len(branches) + 1)]
            lines.append(f"Split {name}_split 1 {len(uses)} {x} {' '.join(uses)}")
            for (pool, blob), use in zip(branches, uses, strict=False):
                kind = "Noop" if pool == "none" else "Pooling"
                options = {"none": "", "avg": " 0=1 4=1", "max": " 0=0 4=1"}[pool]
                lines.append(f"{kind} {blob} 1 1 {use} {blob}{options}")
            x = uses[-1]
        blobs = sum(int(line.split()[3]) for line in lines)
        return "\n".join(["7767517", f"{len(lines)} {blobs}", *lines, ""])

    def __call__(self, images: Tensor) -> dict[Tap, Tensor]:
        """The taps of some images."""
        found: dict[Tap, list[NDArray[np.float32]]] = {tap: [] for tap in self._taps}
        for image in images.float().contiguous().numpy():
            extractor = self._net.create_extractor()
            extractor.input("images", self._ncnn.Mat(image))
            for tap, blob in self._taps.items():
                status, value = extractor.extract(blob)
                if status:
                    raise MemoryError(f"ncnn failed with status {status}")
                found[tap].append(np.array(value))
        return {tap: torch.from_numpy(np.stack(values)) for tap, values in found.items()}


class OpenVinoTrunk:
    """OpenVINO: fp32, bf16 where the CPU has it, and int8 after a calibration on some of the user's images.

    Args:
        chain: what to compute.
        taps: what to hand out.
        precision: `fp32`, `bf16` or `int8`.
        sample: for int8: normalised images `(1, 3, H, W)`.
        file: for int8: where the calibrated model is kept, ending in `.xml`; it is read where it exists.
    """

    packages = ("openvino", "nncf")

    def __init__(
        self,
        chain: Chain,
        taps: Iterable[Tap],
        *,
        precision: str,
        sample: Iterable[Tensor] = (),
        file: Path | None = None,
    ) -> None:
        import openvino

        self._taps = tuple(taps)
        core = openvino.Core()
        hint = {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32"}
        hint["INFERENCE_NUM_THREADS"] = str(torch.get_num_threads())
        if precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise UsageError("OpenVINO doesn't compute with bf16 on this CPU; use fp32 or the engine torch")
        if file is not None and file.exists():
            try:
                model = core.read_model(file)
            except RuntimeError as error:
                raise StoreError(
                    f"{file} is damaged, and the finished parts were computed with it"
                ) from error
        else:
            model = self._build(chain)
            if precision == "int8":
                model = _calibrated(model, sample)
                if file is not None:
                    _save(model, file)
        self._run = core.compile_model(model, "CPU", hint)

    def _build(self, chain: Chain) -> Any:
        import openvino
        import openvino.opset13 as op

        images = x = op.parameter([-1, 3, -1, -1], np.float32, name="images")
        results = []
        for name, layers in chain.items():
            for layer in layers:
                if layer is None:
                    x = op.max_pool(x, [2, 2], [1, 1], [0, 0], [0, 0], [2, 2]).output(0)
                else:
                    x = op.convolution(x, layer.weight.numpy(), [1, 1], [1, 1], [1, 1], [1, 1])
                    x = op.relu(op.add(x, layer.bias.numpy().reshape(1, -1, 1, 1)))
            for stage, pool in self._taps:
                if stage == name:
                    reduce = {"none": lambda x, _: x, "avg": op.reduce_mean, "max": op.reduce_max}[pool]
                    results.append(op.result(reduce(x, np.array([2, 3])), name=f"{stage}_{pool}"))
        return openvino.Model(results, [images], "vgg19")

    def __call__(self, images: Tensor) -> dict[Tap, Tensor]:
        """The taps of some images."""
        values = self._run(images.float().contiguous().numpy())
        order = [tap for name in STAGE_NAMES for tap in self._taps if tap[0] == name]
        return {tap: torch.from_numpy(values[i].copy()) for i, tap in enumerate(order)}


def _calibrated(model: Any, sample: Iterable[Tensor]) -> Any:
    """The model in int8, with the ranges that a sample of images shows.

    Raises:
        UsageError: an empty sample.
    """
    images = [image.numpy() for image in sample]
    if not images:
        raise UsageError("int8 needs images for its calibration, and none of those sampled can be read")
    os.environ.setdefault("NNCF_CI", "1")  # its switch against telemetry, which would use the network
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    nncf.set_log_level("ERROR")
    # The default ranges leave out the rare strong responses that mean the most in pooled features: with them
    # the worst cosine of a row is 0.991, with the full ranges 0.999.
    full = AdvancedQuantizationParameters(
        activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return nncf.quantize(
            model,
            nncf.Dataset(images),
            subset_size=len(images),
            fast_bias_correction=False,
            advanced_parameters=full,
        )


def _save(model: Any, file: Path) -> None:
    """Write an OpenVINO model as `.xml` and `.bin`; the first appears last, and only when both are whole."""
    import openvino

    partial = file.with_name(f".vggenc-{file.name}")
    try:
        openvino.save_model(model, partial, compress_to_fp16=False)
        partial.with_suffix(".bin").replace(file.with_suffix(".bin"))
        partial.replace(file)
    except (OSError, RuntimeError) as error:
        raise StoreError(f"{file} can't be written: {error}") from error


def flops(chain: Chain, height: int, width: int) -> int:
    """Floating-point operations for one image: two for each multiplication of direct convolution."""
    total = 0
    for layers in chain.values():
        for layer in layers:
            if layer is None:
                height, width = height // 2, width // 2
            else:
                total += 2 * layer.weight.numel() * height * width
    return total
