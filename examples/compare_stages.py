"""How well does each stage tell classes apart? 1-nearest-neighbour accuracy, trained against random weights.

DATA is a folder with a sub-folder of images for each class, or a Parquet file with the columns `image`
(encoded image files) and `label`. Each image is compared with all others by cosine of its pooled stages.

    python examples/compare_stages.py DATA --weights OXFORD_V1 --image-size 64 --classes ::10
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from vggenc import Options, VGG19Encoder, iter_features
from vggenc.images import Preprocess


def unpack(data: Path, folder: Path, classes: slice) -> Path:
    """Write the images of a Parquet file to a folder for each class."""
    table = pq.read_table(data, columns=["image", "label"])
    wanted = sorted(set(table["label"].to_pylist()))[classes]
    for i, (image, label) in enumerate(zip(*(column.to_pylist() for column in table.columns), strict=True)):
        if label in wanted:
            (folder / str(label)).mkdir(exist_ok=True)
            (folder / str(label) / f"{i}.jpg").write_bytes(image)
    return folder


def accuracies(encoder: VGG19Encoder, files: list[str], size: int) -> dict[str, float]:
    """Share of images whose nearest other image has the same class, for each stage."""
    # The whole image, without a crop: it may be no larger than what the encoder sees.
    encoder.preprocess = Preprocess(encoder.preprocess.mean, encoder.preprocess.std, resize=size, crop=size)
    batches = list(iter_features(files, encoder, options=Options(batch_size=50, allow_untrained=True)))
    ok = [row.status == "ok" for batch in batches for row in batch.rows]
    labels = np.array([Path(file).parent.name for file in files])[ok]
    found = {}
    for name in batches[0].features:
        rows = np.concatenate([batch.features[name] for batch in batches])[ok]
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        similarity = rows @ rows.T
        np.fill_diagonal(similarity, -1)
        found[name] = float((labels[similarity.argmax(1)] == labels).mean())
    return found


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", default="OXFORD_V1")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--classes", default=":", help="START:STOP:STEP of the sorted classes")
    options = parser.parse_args()
    classes = slice(*(int(n) if n else None for n in options.classes.split(":")))
    with tempfile.TemporaryDirectory() as scratch:
        if options.data.is_dir():
            folders = sorted(folder for folder in options.data.iterdir() if folder.is_dir())[classes]
        else:
            folders = sorted(unpack(options.data, Path(scratch), classes).iterdir())
        files = [str(file) for folder in folders for file in sorted(folder.iterdir())]
        pretrained = VGG19Encoder(1, weights=options.weights)
        random = VGG19Encoder(1, backbone=pretrained.backbone, weights=None)
        print(f"{len(files)} images, {len(folders)} classes, {options.image_size} pixels")
        print(f"{'stage':8} {pretrained.weights_name:>14} {'random':>8}")
        scores = [accuracies(encoder, files, options.image_size) for encoder in (pretrained, random)]
        for name in scores[0]:
            print(f"{name:8} {scores[0][name]:14.3f} {scores[1][name]:8.3f}")


if __name__ == "__main__":
    main()
