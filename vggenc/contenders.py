"""The contenders of a benchmark, each in a process of its own, and the machine's peak."""

import itertools
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vggenc.encoder import VGG19Encoder
from vggenc.engines import Engine, has_bf16, installed
from vggenc.images import Preprocess
from vggenc.options import ENGINES, Options
from vggenc.stages import STAGE_NAMES

PLAIN = "plain loop"


class Contender(NamedTuple):
    """What is measured, in a process of its own."""

    name: str
    engine: str
    precision: str
    outputs: tuple[str, ...] = STAGE_NAMES


class Job(NamedTuple):
    """What all contenders compute."""

    weights: str
    backbone: str
    image_size: int
    images: int
    """In a turn."""
    device: str
    scratch: str
    """A folder with the file `pixels.pt`: uint8 `(n, 3, image_size, image_size)`."""


def contenders(device: torch.device) -> list[Contender]:
    """The plain loop, and each engine and precision that is installed and that the device computes with."""
    found = [Contender(PLAIN, PLAIN, "fp32")]
    for precision, engines in ENGINES.items():
        for engine in reversed(engines):
            here = installed(engine) and (engine == "torch" or device.type == "cpu")
            if precision in ("bf16", "fp16") and engine != "ncnn":
                here = here and (device.type != "cpu" or (precision == "bf16" and has_bf16(device)))
            if here:
                found.append(Contender(f"{engine} {precision}", engine, precision))
    return found


class _PlainLoop:
    """What one would write with torchvision: its layers in eager mode, and the mean of four maps."""

    def __init__(self, encoder: VGG19Encoder, preprocess: Preprocess) -> None:
        self._encoder = encoder.eval()
        for layer in encoder.modules():
            if isinstance(layer, nn.ReLU):
                layer.inplace = True  # as there
        self._device = next(encoder.parameters()).device
        self._preprocess = preprocess

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> dict[str, NDArray[np.floating]]:
        images = self._preprocess.normalize(pixels.contiguous().to(self._device))
        maps = self._encoder.encode(images)
        return {name: value.mean((2, 3)).cpu().numpy() for name, value in maps.items()}


def _contend(pipe: Connection, each: Contender, job: Job) -> None:
    """The life of a contender's process: build, say so, then answer until the pipe closes."""
    weights, backbone, image_size, images, device, scratch = job
    encoder = VGG19Encoder(1, backbone=backbone, weights=weights).to(device)
    pixels = torch.load(f"{scratch}/pixels.pt")
    run: Callable[[Tensor], dict[str, NDArray[np.floating]]]
    work = 0
    if each.engine == PLAIN:
        run = _PlainLoop(encoder, encoder.preprocess.at(image_size))
    else:
        options = Options(engine=each.engine, precision=each.precision, image_size=image_size)
        engine = Engine(encoder, each.outputs, options)
        engine.prepare(list(pixels.split(1)))
        run, work = engine, engine.flops
        del encoder  # of which the engine has taken what it needs
    batch = torch.stack(list(itertools.islice(itertools.cycle(pixels), images)))
    pipe.send(None)
    while True:
        try:
            question = pipe.recv()
        except EOFError:
            return
        if question == "run":
            start = time.perf_counter()
            run(batch)
            pipe.send(time.perf_counter() - start)
        elif question == "values":
            parts = [run(part) for part in pixels.split(images)]
            pipe.send({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})
        elif question == "memory":
            pipe.send(_peak_memory() // 10**6)
        else:
            pipe.send(work)


def _peak_memory() -> int:
    """The most bytes that this process has held; on Linux `getrusage` would count its parent's too."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@contextmanager
def running(many: Sequence[Contender], job: Job) -> Iterator[Callable[[str, str], Any]]:
    """Start a process for each contender, one after the other; they compute only when asked."""
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    try:
        for each in many:
            pipes[each.name], theirs = context.Pipe()
            process = context.Process(target=_contend, args=(theirs, each, job), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes[each.name].recv()

        def ask(name: str, question: str) -> Any:
            pipes[name].send(question)
            return pipes[name].recv()

        yield ask
    finally:
        for pipe in pipes.values():
            pipe.close()
        for process in processes:
            process.join()


@torch.inference_mode()
def peak(device: torch.device, precisions: Sequence[str]) -> dict[str, float]:
    """GFLOP/s of the fastest of some large matrix products and 3x3 convolutions in PyTorch, by precision."""
    best: dict[str, float] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if name not in precisions or (name == "bf16" and not has_bf16(device)):
            continue
        tries: list[tuple[float, partial[Tensor]]] = []
        for side in (2048, 4096):
            a = torch.rand(side, side, device=device, dtype=dtype)
            tries.append((2.0 * side**3, partial(torch.matmul, a, a)))
        for channels, side in ((256, 56), (512, 28)):
            conv = nn.Conv2d(channels, channels, 3, padding=1, device=device, dtype=dtype)
            conv = conv.to(memory_format=torch.channels_last)
            x = torch.rand(8, channels, side, side, device=device, dtype=dtype)
            x = x.to(memory_format=torch.channels_last)
            tries.append((2.0 * 8 * conv.weight.numel() * side**2, partial(conv, x)))
        best[name] = max(work / _fastest(call, device) for work, call in tries) / 1e9
    return best


def _fastest(call: Callable[[], Tensor], device: torch.device) -> float:
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
