"""How fast each engine and precision is on this machine, against a plain PyTorch loop, in one run."""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vggenc.checkpoint import load
from vggenc.contenders import PLAIN, Contender, Job, contenders, peak, running
from vggenc.encoder import VGG19Encoder
from vggenc.engines import pick_device
from vggenc.errors import ImageError, UsageError
from vggenc.images import decode
from vggenc.inputs import ImageList
from vggenc.options import ENGINE_NAMES, Options
from vggenc.pipeline import Summary, extract
from vggenc.progress import progress_bar
from vggenc.stages import STAGE_NAMES

MOST_PICTURES = 24
SMALL, LARGE = (500, 375), (4000, 3000)
"""Pixels of the JPEG files that whole runs are measured from."""
_WARM, _SECONDS, _FILES = 2, 10.0, 12
"""Unmeasured rounds, about how long one whole run takes, and from how many different files."""
Report = dict[str, Any]


def measure(
    files: ImageList | None,
    weights: str,
    backbone: str | None,
    *,
    rounds: int = 5,
    images: int = 8,
    image_size: int = 224,
    device: str = "cpu",
    engine: str | None = None,
    end_to_end: bool = True,
    progress: bool = False,
) -> Report:
    """Let all contenders run in turns, and report medians.

    Args:
        files: pictures to compute on, the first 24 that can be read; None: generated ones.
        weights: as for `VGG19Encoder`.
        backbone: likewise.
        rounds: how often each contender has its turn.
        images: images in a turn.
        image_size: side of the square seen.
        device: where the plain loop and the engine torch run.
        engine: measure this one alone, beside the plain loop; None: all that are installed.
        end_to_end: also measure `extract` from JPEG files.
        progress: show a bar on standard error where that is a terminal.

    Returns:
        `machine` (facts and measured peaks, in GFLOP/s), and rows as dictionaries: `engines` (images/s, ratio
        to the plain loop, GFLOP/s as direct convolutions, their share of the peak, the worst cosine of a row
        and stage against the plain loop, peak memory of the process in MB), `depth` (the engine torch with
        fewer stages), `files` (whole runs from JPEG files,
        in turns with what they are compared to).

    Raises:
        UsageError: no readable picture, a device or an engine that isn't there.
        WeightsError: weights that can't be had.
    """
    where = pick_device(device)
    checkpoint = load(weights, backbone)
    preprocess = checkpoint.preprocess.at(image_size)
    with tempfile.TemporaryDirectory() as scratch:
        pictures = _pictures(files)
        pixels = torch.stack([preprocess.square(picture) for picture in pictures])
        torch.save(pixels, f"{scratch}/pixels.pt")
        job = Job(weights, checkpoint.backbone, image_size, images, device, scratch)
        many = [each for each in contenders(where) if engine in (None, each.engine) or each.engine == PLAIN]
        if len(many) < 2:
            raise UsageError(f"the engine {engine!r} can't run here; one of {', '.join(ENGINE_NAMES[:-1])}")
        depth = [
            Contender(f"up to {name}", "torch", "fp32", STAGE_NAMES[: i + 1])
            for i, name in enumerate(STAGE_NAMES)
        ]
        turns = _WARM + rounds + (len(many) * (1 + rounds) if end_to_end else 0)
        bar = progress_bar(turns, shown=progress, unit="turn")
        with bar, running([*many, *depth], job) as ask:
            times: dict[str, list[float]] = {each.name: [] for each in (*many, *depth)}
            for turn in range(_WARM + rounds):
                for name, seconds in times.items():
                    took = ask(name, "run")
                    if turn >= _WARM:
                        seconds.append(took)
                bar.update()
            speed = {name: images / statistics.median(seconds) for name, seconds in times.items()}
            values = {each.name: ask(each.name, "values") for each in many}
            memory = {each.name: ask(each.name, "memory") for each in many}
            work = ask(depth[-1].name, "flops")
            runs = _whole_runs(pictures, many, speed, job, rounds, ask, bar) if end_to_end else []
        peaks = peak(where, [each.precision for each in many])
        engines = []
        for each in many:
            gflops = speed[each.name] * work / 1e9
            engines.append(
                {
                    "engine": each.name,
                    "images/s": round(speed[each.name], 2),
                    "ratio": round(speed[each.name] / speed[PLAIN], 2),
                    "GFLOP/s": round(gflops, 1),
                    "of peak": round(gflops / peaks[each.precision], 2) if each.precision in peaks else None,
                    "worst cosine": round(_worst_cosine(values[each.name], values[PLAIN]), 6),
                    "peak MB": memory[each.name],
                }
            )
    facts = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    card = torch.cuda.get_device_name(where) if where.type == "cuda" else facts.get("cpu_name", "CPU")
    return {
        "machine": {
            "device": card,
            "threads": torch.get_num_threads(),
            "weights": f"{checkpoint.name} {checkpoint.backbone}",
            "pictures": len(pictures),
            "image size": image_size,
            "rounds": rounds,
            **{f"peak {name} GFLOP/s": round(value, 1) for name, value in peaks.items()},
        },
        "engines": engines,
        "depth": [
            {
                "torch fp32": each.name,
                "images/s": round(speed[each.name], 2),
                "over all stages": round(speed[each.name] / speed[depth[-1].name], 2),
            }
            for each in depth
        ],
        "files": runs,
    }


def _pictures(files: ImageList | None) -> list[Image.Image]:
    if files is None:
        return [_generated(seed) for seed in range(12)]
    found = []
    for i in range(len(files.paths)):
        try:
            found.append(decode(files.file(i)))
        except ImageError:
            continue
        if len(found) == MOST_PICTURES:
            break
    if not found:
        raise UsageError("none of the pictures can be read")
    return found


def _generated(seed: int) -> Image.Image:
    """Noise with the spectrum of photographs: amplitude falls with spatial frequency."""
    width, height = SMALL
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    fall = 1 / np.maximum(np.hypot(fx, fy), 1 / width)
    planes = []
    for _ in range(3):
        noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((height, width))) * fall, (height, width))
        planes.append(127 + 50 * noise / noise.std())
    return Image.fromarray(np.clip(np.stack(planes, 2), 0, 255).astype(np.uint8))


def _worst_cosine(found: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]]) -> float:
    worst = 1.0
    for name, right in expected.items():
        a, b = found[name].astype(np.float64), right.astype(np.float64)
        cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        worst = min(worst, float(cosine.min()))
    return worst


def _whole_runs(
    pictures: Sequence[Image.Image],
    many: Sequence[Contender],
    speed: dict[str, float],
    job: Job,
    rounds: int,
    ask: Callable[[str, str], Any],
    bar: Any,
) -> list[dict[str, Any]]:
    """Runs of `extract` from JPEG files, in turns with what they are compared to: images/s, and the ratio."""
    encoder = VGG19Encoder(1, backbone=job.backbone, weights=job.weights).to(job.device)

    def prepare(each: Contender, size: tuple[int, int], *, full: bool = False) -> _WholeRun:
        count = max(8, min(20_000, round(speed[each.name] * _SECONDS)))
        names = [f"{i:06}.jpg" for i in range(count)]
        folder = _jpegs(pictures, size, Path(job.scratch) / f"{size[0]}", names)
        target = Path(job.scratch) / f"{each.name} {size[0]} {full}"
        options = Options(
            engine=each.engine, precision=each.precision, image_size=job.image_size, full_decode=full
        )
        return _WholeRun(encoder, ImageList(str(folder), names), target, options)

    def compare(each: Contender, run: _WholeRun, other: Callable[[], float]) -> tuple[float, float, float]:
        """The first part's seconds, and medians of a run's images/s and of its ratio to the other.

        The other runs before and after each run, so that a machine that slows down slows both.
        """
        first = run().first_part or 0
        bar.update()
        mine, others = [], [other()]
        for _ in range(rounds):
            mine.append(run().images_per_second or 0)
            others.append(other())
            bar.update()
        ratios = [one / statistics.mean(pair) for one, pair in zip(mine, pairwise(others), strict=True)]
        return first, statistics.median(mine), statistics.median(ratios)

    def row(
        size: tuple[int, int], each: Contender, run: _WholeRun, found: Sequence[float], to: str
    ) -> dict[str, Any]:
        first, mine, ratio = found
        return {
            "from": "{}x{} JPEG".format(*size),
            "engine": each.name,
            "images": len(run.images.paths),
            "images/s": round(mine, 2),
            "ratio": round(ratio, 2),
            "to": to,
            "first part s": round(first, 2),
        }

    rows = []
    for each in many[1:]:
        run = prepare(each, SMALL)

        def alone(name: str = each.name, turns: int = -(-len(run.images.paths) // job.images)) -> float:
            seconds: list[float] = [ask(name, "run") for _ in range(turns)]
            return turns * job.images / sum(seconds)

        rows.append(row(SMALL, each, run, compare(each, run, alone), "the engine alone"))
    fastest = max(many[1:], key=lambda each: (each.precision == "bf16", speed[each.name]))
    run, full = prepare(fastest, LARGE), prepare(fastest, LARGE, full=True)
    full()
    found = compare(fastest, run, lambda: full().images_per_second or 0)
    rows.append(row(LARGE, fastest, run, found, "decoded in full"))
    return rows


class _WholeRun(NamedTuple):
    """A run of `extract` that can be repeated; an engine that calibrates itself does it in the first."""

    encoder: VGG19Encoder
    images: ImageList
    folder: Path
    options: Options

    def __call__(self) -> Summary:
        for part in self.folder.glob("part-*"):
            part.unlink()
        return extract(self.images, self.encoder, output=self.folder, options=self.options)


def _jpegs(pictures: Sequence[Image.Image], size: tuple[int, int], folder: Path, names: list[str]) -> Path:
    """A folder with JPEG files of a size; the pictures repeat, by links."""
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        if (folder / name).exists():
            continue
        if i < min(len(pictures), _FILES):
            pictures[i].resize(size, Image.Resampling.BICUBIC).save(folder / name, quality=90)
        else:
            (folder / name).symlink_to(folder / names[i % min(len(pictures), _FILES)])
    return folder


def draw(report: Report, file: Path) -> None:
    """A bar chart of images/s, with the ratio to the plain loop at each bar, as a PNG file."""
    from matplotlib.figure import Figure

    rows = report["engines"]
    figure = Figure(figsize=(7, 0.9 + 0.38 * len(rows)), layout="constrained")
    axes = figure.subplots()
    colours = ["0.6" if row["engine"] == PLAIN else "tab:blue" for row in rows]
    bars = axes.barh([row["engine"] for row in rows], [row["images/s"] for row in rows], color=colours)
    axes.bar_label(bars, [f"{row['images/s']:g}  ({row['ratio']:g}x)" for row in rows], padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.25)
    axes.set_xlabel("images/s")
    axes.set_title(f"{report['machine']['weights']}, {report['machine']['device']}", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
