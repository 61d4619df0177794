"""Extraction on a Ray cluster of one worker beside the local pipeline, in turns, on this machine.

    python benchmarks/ray_run.py PICTURES [--rounds 3] [--images 320] [--weights OXFORD_V1] [--engine torch]

The pictures are repeated, under other names, to IMAGES. Rates are of the parts after the first one, by the
times at which they were written: starting, which is printed too, takes the same for a million images.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from vggenc import read_features
from vggenc.inputs import find_images
from vggenc.stages import STAGE_NAMES

PART = 32
COMMAND = [sys.executable, "-m", "vggenc", "extract"]


def repeated(pictures: str, folder: Path, count: int) -> None:
    images = find_images(pictures)
    for i in range(count):
        source = Path(images.file(i % len(images.paths)))
        os.link(source, folder / f"{i:05}{source.suffix}")


def rate(output: Path) -> float:
    """Images a second, after the first part."""
    times = sorted(file.stat().st_mtime for file in output.glob("part-*.parquet"))
    return (len(times) - 1) * PART / (times[-1] - times[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--weights", default="OXFORD_V1")
    parser.add_argument("--engine", default="torch")
    arguments = parser.parse_args()
    ways = {"local": [], "ray": ["--ray", "local", "--ray-workers", "1"]}
    rates = {way: [] for way in ways}
    starts = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        folder = Path(scratch) / "pictures"
        folder.mkdir()
        repeated(arguments.pictures, folder, arguments.images)
        for _ in range(arguments.rounds):
            for way, options in ways.items():
                output = Path(scratch) / way
                shutil.rmtree(output, ignore_errors=True)
                command = [*COMMAND, str(folder), "--output", str(output), "--weights", arguments.weights]
                command += ["--engine", arguments.engine, "--part-size", str(PART), "--json", *options]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                rates[way].append(rate(output))
                starts[way].append(json.loads(done.stdout)["first part s"] - PART / rates[way][-1])
                print(f"{way:6} {rates[way][-1]:.2f} images/s after {starts[way][-1]:.0f} s", flush=True)
        tables = [read_features(Path(scratch) / way, STAGE_NAMES) for way in ways]
        for name in STAGE_NAMES:
            one, other = (np.stack(table[name].to_pylist()) for table in tables)
            off = abs(one - other).max() / abs(one).max()
            print(f"{name}: largest difference {off:.0e} of the largest value")
    ratio = statistics.median(b / a for a, b in zip(rates["local"], rates["ray"], strict=True))
    print(f"{arguments.engine}: ray/local {ratio:.3f} (median of {arguments.rounds} rounds)")


if __name__ == "__main__":
    main()
