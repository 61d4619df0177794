"""A plain zero-shot baseline: ridge regression from pooled stages to attributes, cosine to the classes.

    python examples/ridge_baseline.py DATA [--split ps] [--image-size 128] [--features FOLDER]

DATA is a set in AwA2's layout or xlsa17's. Only the regression is trained, on the seen classes' images.
"""

import argparse
import tempfile

import numpy as np
from sklearn.linear_model import Ridge

from vggenc import Options, VGG19Encoder, extract, read_features
from vggenc.zsl import cosine, load_data, mean_class_accuracy

STAGES = ["conv4_4", "conv5_4"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("--split", default="ps")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--weights", default="OXFORD_V1")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--alpha", type=float, default=1.0, help="of the ridge, on standardised features")
    parser.add_argument("--features", help="folder that keeps the features; a second run reads them")
    given = parser.parse_args()

    data = load_data(given.data, given.split)
    encoder = VGG19Encoder(data.k, weights=given.weights)
    options = Options(image_size=given.image_size, engine=given.engine)
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.features or f"{scratch}/features"
        extract(
            data.images(np.arange(len(data.paths))), encoder, STAGES, folder, options=options, progress=True
        )
        table = read_features(folder)
    features = np.concatenate([np.array(table[stage].to_pylist(), np.float32) for stage in STAGES], axis=1)
    features = (features - features[data.trainval].mean(0)) / (features[data.trainval].std(0) + 1e-6)
    classes = data.attributes / np.linalg.norm(data.attributes, axis=1, keepdims=True)
    ridge = Ridge(alpha=given.alpha * features.shape[1])
    ridge.fit(features[data.trainval], classes[data.labels[data.trainval]])

    def accuracy(images: np.ndarray, among: np.ndarray) -> float:
        scores = cosine(ridge.predict(features[images]), classes[among])
        return mean_class_accuracy(among[scores.argmax(1)], data.labels[images], len(classes))

    print(
        f"CZSL MCA {100 * accuracy(data.test_unseen, data.unseen):.1f}, chance {100 / len(data.unseen):.1f}"
    )
    if len(data.test_seen):
        everything = np.sort(np.concatenate([data.seen, data.unseen]))
        print(f"seen, among the seen {100 * accuracy(data.test_seen, data.seen):.1f}")
        seen, unseen = accuracy(data.test_seen, everything), accuracy(data.test_unseen, everything)
        print(f"GZSL U {100 * unseen:.1f}, S {100 * seen:.1f}, H {200 * seen * unseen / (seen + unseen):.1f}")


if __name__ == "__main__":
    main()
