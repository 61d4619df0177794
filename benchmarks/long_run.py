"""Whether a long run grows: memory, open files and shared memory of `vggenc extract` over many small images.

    python benchmarks/long_run.py [--images 20000] [--ray]

Looks at each kind of process while it lives, once a thousand images are on disk, and exits with 1 where the
median of the last tenth of the time is more than 5 % above that of the first. Needs Linux.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

WARM = 1000
"""Images after which nothing should grow any more."""
ALLOWED = 1.05


def photographs(folder: Path, count: int) -> None:
    """Small JPEG files, no two alike; every hundredth one is damaged."""
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        file = folder / f"{i:06}.jpg"
        coarse.resize((80, 60), Image.Resampling.BICUBIC).save(file, quality=85)
        if i % 100 == 99:
            os.truncate(file, 300)


def family(main: int) -> list[int]:
    """A process and all below it."""
    found = [main]
    for pid in found:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, children.read_text().split())
    return found


def look(pid: int) -> dict[str, float]:
    """What a process holds: memory of its own and shared memory in MB, and open files."""
    lines = [line.partition(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    fields = {name: value for name, _, value in lines}
    megabytes = {name: int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "RssShmem", "VmRSS")}
    return {
        "resident MB": megabytes["VmRSS"] - megabytes["RssShmem"],
        "shared MB": megabytes["RssShmem"],
        "open files": len(os.listdir(f"/proc/{pid}/fd")),
    }


def kind(pid: int, main: int) -> str:
    """What a process of a run does."""
    if pid == main:
        return "main process"
    command = Path(f"/proc/{pid}/cmdline").read_bytes()
    if not command.startswith(b"ray") and b"/ray/" not in command:
        return "workers"
    for name in ("_Decoder", "_Computer"):
        if name.encode() in command:
            return f"{name[1:]} actors"
    return ""  # Ray's own, which come and go; it also bounds the memory that its processes share


def watch(run: subprocess.Popen[bytes], parts: Path, part_size: int) -> list[tuple[int, str, float]]:
    """Samples of a run: the images that are on disk by then, what was looked at, and the value."""
    samples = []
    while run.poll() is None:
        time.sleep(0.25)
        done = len(list(parts.glob("part-*.parquet"))) * part_size
        try:
            seen = [(kind(pid, run.pid), look(pid)) for pid in family(run.pid)]
        except (OSError, KeyError):  # one of them has just ended
            continue
        for which in dict.fromkeys(which for which, _ in seen if which):
            for fact in seen[0][1] if "actors" not in which else ("resident MB", "open files"):
                total = sum(each[fact] for name, each in seen if name == which)
                samples.append((done, f"{which}, {fact}", total))
        shm = sum(entry.stat().st_size for entry in os.scandir("/dev/shm") if entry.is_file())
        samples.append((done, "/dev/shm, named MB", shm / 2**20))
    return samples


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--part-size", type=int, default=256)
    parser.add_argument("--ray", action="store_true", help="on a cluster of this machine")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder, output = Path(scratch) / "images", Path(scratch) / "features"
        folder.mkdir()
        photographs(folder, arguments.images)
        options = "--weights OXFORD_V1 --outputs conv2_2 --image-size 32 "
        options += "--ray local --ray-workers 1" if arguments.ray else "--num-workers 1"
        command = [sys.executable, "-m", "vggenc", "extract", str(folder), "--output", str(output)]
        command += [*options.split(), "--part-size", str(arguments.part_size)]
        begun = time.monotonic()
        with subprocess.Popen(command, stderr=subprocess.DEVNULL) as run:
            samples = watch(run, output, arguments.part_size)
        seconds = time.monotonic() - begun
    if run.returncode != 3:  # finished, with failed images
        print(f"the run ended with {run.returncode}", file=sys.stderr)
        return 1
    print(f"{arguments.images} images in {seconds:.0f} s")
    print(f"{'':34}{'first tenth':>12}{'last tenth':>12}{'ratio':>8}")
    grown = False
    samples = [sample for sample in samples if sample[0] >= WARM]
    for name in dict.fromkeys(name for _, name, _ in samples):
        values = [value for _, what, value in samples if what == name]
        tenth = -(-len(values) // 10)
        first, last = statistics.median(values[:tenth]), statistics.median(values[-tenth:])
        ratio = last / first if first else float(last > 0) + 1
        grown |= ratio > ALLOWED
        print(f"{name:34}{first:12.1f}{last:12.1f}{ratio:8.3f}")
    return int(grown)


if __name__ == "__main__":
    sys.exit(main())
