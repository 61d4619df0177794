"""What a large run on GPUs takes: hours, cores, network, storage, from costs measured on some pictures.

    python benchmarks/estimate.py PICTURES [--images 100e6] [--gpus 32] [--rate 1663] [--share 0.85]

RATE is what a GPU computes in a second (`vggenc benchmark` there says it); the default is what timm
published for vgg19_bn on an RTX 4090 in mixed precision. SHARE is what a cluster reaches of it, see
`benchmarks/ray_run.py`.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from vggenc import Options, VGG19Encoder, extract
from vggenc.images import ImageDataset, decode
from vggenc.inputs import ImageList, find_images
from vggenc.weights import REGISTRY

ROUNDS = 5


def decoding(images: ImageList) -> float:
    """Seconds of one core to read, decode and resize a picture; the median of some rounds."""
    dataset = ImageDataset(images, REGISTRY[0].preprocess, Options())
    seconds = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        for i in range(len(images.paths)):
            dataset[i]
        seconds.append((time.perf_counter() - begun) / len(images.paths))
    return statistics.median(seconds)


def row_bytes(images: ImageList) -> float:
    """Bytes on disk for a row with the four pooled stages, of a whole part of pieces of the pictures."""
    encoder = VGG19Encoder(1, weights="OXFORD_V1")
    rng = np.random.default_rng(0)
    pictures = [decode(images.file(i)) for i in range(len(images.paths))]
    with tempfile.TemporaryDirectory() as scratch:
        folder, output = Path(scratch) / "pieces", Path(scratch) / "features"
        folder.mkdir()
        for i in range(256):
            picture = pictures[i % len(pictures)]
            x, y = (int(rng.integers(side // 2)) for side in picture.size)
            piece = picture.crop((x, y, x + picture.width // 2, y + picture.height // 2))
            piece.save(folder / f"{i:05}.png")
        extract(folder, encoder, output=output, options=Options(engine="auto"))
        return (output / "part-00000.parquet").stat().st_size / 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pictures")
    parser.add_argument("--images", type=float, default=100e6)
    parser.add_argument("--gpus", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1663)
    parser.add_argument("--share", type=float, default=0.85)
    arguments = parser.parse_args()
    images = find_images(arguments.pictures)
    read = statistics.mean(images.size(i) for i in range(len(images.paths)))
    wrote, spent = row_bytes(images), decoding(images)
    count, rate = arguments.images, arguments.rate * arguments.share
    together = rate * arguments.gpus
    print(
        f"measured on {len(images.paths)} pictures: {spent * 1e3:.1f} ms to decode, {read:.0f} bytes each, ",
        end="",
    )
    print(f"{wrote:.0f} bytes a row")
    print(f"compute     {count / together / 3600:8.1f} h at {rate:.0f} images/s a GPU")
    print(f"decoding    {rate * spent:8.1f} cores a GPU, {together * spent:.0f} in all")
    print(f"network in  {together * read * 8 / 1e9:8.1f} Gbit/s, {count * read / 1e12:.1f} TB in all")
    print(f"network out {together * wrote * 8 / 1e9:8.2f} Gbit/s")
    print(f"storage     {count * wrote / 1e9:8.0f} GB in {count / 256:.0f} parts")
    print(f"requests    {count:.1e} GET, {count / 256:.1e} PUT, {count / 1000:.1e} LIST")


if __name__ == "__main__":
    main()
