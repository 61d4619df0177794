"""A network file for other runtimes: ONNX or torch.export, checked against the encoder before it counts."""

import importlib.util
import json
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vggenc.encoder import VGG19Encoder
from vggenc.engines import Engine
from vggenc.errors import ExportError, UsageError, one_of
from vggenc.options import MIN_SIZE, Options, check_outputs
from vggenc.stages import STAGE_NAMES
from vggenc.trunks import pooled

FORMATS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch": ()}
"""Format -> the packages that it needs."""
METADATA_KEY = "vggenc"
TOLERANCE = 1e-4
"""Of an output's largest value: what a file may differ from the encoder."""
_BATCHES = (1, 3)


class _Network(nn.Module):
    """An engine's computation as a module that holds what it needs and nothing else."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        engine.prepare()
        assert isinstance(engine.trunk, nn.Module)
        self.trunk, self.heads = engine.trunk, engine.encoder
        self.trunk.to(memory_format=torch.contiguous_format)  # in which files hold values
        self.compute = engine.compute

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.compute(images)


def export_network(
    encoder: VGG19Encoder,
    outputs: Iterable[str],
    file: str | os.PathLike[str],
    *,
    format: str = "onnx",
    pool: str = "none",
    image_size: int | None = None,
    allow_untrained: bool = False,
) -> float:
    """Write an encoder as a network file, run that file at batch 1 and 3, and compare it with the encoder.

    The input `images` is `(N, 3, H, W)`, float32 and normalised as `encoder.preprocess` does, whose numbers
    stand in the file's metadata. N is free; H and W are too (32 or more) unless an output has heads, which
    `image_size` is for. The outputs bear their names. Batch norm is folded into the convolutions.

    Args:
        encoder: on the CPU; exported in evaluation mode, itself unchanged.
        outputs: names, as for `VGG19Encoder.encode`.
        file: what to write; it is replaced only when the new one is whole and agrees.
        format: `onnx` (extra `onnx`), or `torch` for a program of `torch.export`.
        pool: `none` for whole maps, `avg` or `max`.
        image_size: H and W for outputs with heads; None: what the weights expect (224).
        allow_untrained: export features of layers that were never trained.

    Returns:
        The largest difference found, as a share of the output's largest value.

    Raises:
        UsageError: an unknown format or output, a missing extra, outputs that were never trained.
        ExportError: the file can't be written, or differs from the encoder by more than `TOLERANCE`.
    """
    names = check_outputs(outputs)
    if format not in FORMATS:
        raise one_of("format", format, FORMATS)
    if not all(importlib.util.find_spec(package) for package in FORMATS[format]):
        raise UsageError(f"the format {format} needs its extra: pip install 'vggenc[{format}]'")
    if not allow_untrained:
        encoder.check_trained(names)
    options = Options(pool=pool, image_size=image_size)
    engine = Engine(encoder, names, options)
    network = _Network(engine).eval()
    side = engine.preprocess.crop
    free = {0: torch.export.Dim("batch", min=1, max=1024)}
    sizes = [(side, side)]
    if set(names) <= set(STAGE_NAMES):
        free |= {2: torch.export.Dim("height", min=MIN_SIZE), 3: torch.export.Dim("width", min=MIN_SIZE)}
        sizes = [(96, 64), (80, 112)]
    about = json.dumps(
        {"weights": encoder.weights_name, "preprocess": asdict(engine.preprocess), "pool": pool}
    )
    file = Path(file)
    partial = file.with_name(f".{file.stem}.{os.getpid()}{'.onnx' if format == 'onnx' else '.pt2'}")
    try:
        with torch.no_grad():
            program = torch.export.export(
                network, (torch.zeros(2, 3, *sizes[0]),), dynamic_shapes={"images": free}
            )
        write, read = {"onnx": (_write_onnx, _read_onnx), "torch": (_write_torch, _read_torch)}[format]
        try:
            write(program, names, about, partial)
        except (OSError, RuntimeError) as error:
            raise ExportError(f"{file} can't be written: {error}") from error
        difference = _compare(read(partial), encoder, names, pool, sizes)
        if not difference <= TOLERANCE:
            raise ExportError(f"what {file} would compute differs from the encoder by {difference:.1e}")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    return difference


def _adaptive_max_pool(x: Tensor, output_size: list[int]) -> tuple[Tensor, None]:
    """What ONNX has no operator for: the largest value of each bin, by rows and then by columns."""
    for dim, bins in zip((-2, -1), output_size, strict=True):
        size = x.shape[dim]
        edges = [(i * size // bins, -(-(i + 1) * size // bins)) for i in range(bins)]
        x = torch.stack([x.narrow(dim, start, end - start).amax(dim) for start, end in edges], dim)
    return x, None  # nobody asks for the indices


def _write_onnx(program: Any, names: tuple[str, ...], about: str, file: Path) -> None:
    program = program.run_decompositions({torch.ops.aten.adaptive_max_pool2d.default: _adaptive_max_pool})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's remarks on its own insides
        onnx = torch.onnx.export(
            program, dynamo=True, input_names=["images"], output_names=list(names), verbose=False
        )
    assert onnx is not None
    onnx.model.metadata_props[METADATA_KEY] = about
    onnx.save(file, external_data=False)


def _read_onnx(file: Path) -> Callable[[Tensor], dict[str, Tensor]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> dict[str, Tensor]:
        values = session.run(None, {"images": images.numpy()})
        return dict(zip(names, map(torch.from_numpy, values), strict=True))

    return run


def _write_torch(program: Any, names: tuple[str, ...], about: str, file: Path) -> None:
    torch.export.save(program, file, extra_files={METADATA_KEY: about})


def _read_torch(file: Path) -> Callable[[Tensor], dict[str, Tensor]]:
    network: Callable[[Tensor], dict[str, Tensor]] = torch.export.load(file).module()
    return network


@torch.no_grad()
def _compare(
    network: Callable[[Tensor], dict[str, Tensor]],
    encoder: VGG19Encoder,
    names: tuple[str, ...],
    pool: str,
    sizes: list[tuple[int, int]],
) -> float:
    """The largest difference over batches and sizes, as a share of the output's largest value."""
    worst = 0.0
    modes = {module: module.training for module in encoder.modules()}
    encoder.eval()
    try:
        for batch in _BATCHES:
            for size in sizes:
                images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))
                found = network(images)
                for name, expected in encoder.encode(images, names, allow_untrained=True).items():
                    value = pooled(expected, pool) if name in STAGE_NAMES else expected
                    worst = max(worst, float((found[name] - value).abs().max() / value.abs().max()))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return worst
