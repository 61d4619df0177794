"""vggenc against installed peers: vgg19_bn features of the same pictures with the same weights, in turns.

Each contender takes RGB pictures of 224x224 and gives numpy arrays: the means of the four stages, or (`fc7`)
the second fully connected layer, all that img2vec_pytorch gives. Values are compared first.

    python benchmarks/peers.py [PICTURES] [--weights vgg19_bn.pth] [--rounds 5] [--images 8]

WEIGHTS is a state dict of torchvision's vgg19_bn; random values by default, which take as long.
"""

import argparse
import importlib.util
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torchvision.models import VGG, get_model_builder
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms.functional import normalize, to_tensor

from vggenc import Options, VGG19Encoder
from vggenc.engines import Engine, installed
from vggenc.images import decode
from vggenc.inputs import find_images
from vggenc.stages import STAGE_NAMES, STAGES

Pictures = list[Image.Image]
Arrays = dict[str, np.ndarray]
Contender = Callable[[Pictures], Arrays]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def batch(pictures: Pictures) -> torch.Tensor:
    return torch.stack([normalize(to_tensor(picture), MEAN, STD) for picture in pictures])


def means(maps: Arrays | dict[str, torch.Tensor]) -> Arrays:
    return {name: value.mean((2, 3)).numpy() for name, value in maps.items()}


def of_torchvision(network: VGG) -> Contender:
    nodes = {f"features.{stage.end['vgg19_bn'] - 1}": stage.name for stage in STAGES[:-1]}
    extractor = create_feature_extractor(network, {**nodes, "features.51": "conv5_4"})

    @torch.no_grad()
    def run(pictures: Pictures) -> Arrays:
        return means(extractor(batch(pictures)))

    return run


def of_timm(network: VGG) -> Contender:
    import timm

    model = timm.create_model("vgg19_bn", pretrained=False, num_classes=0).eval()
    stages = {key: value for key, value in network.state_dict().items() if key.startswith("features.")}
    model.load_state_dict(stages, strict=False)

    @torch.no_grad()
    def run(pictures: Pictures) -> Arrays:
        maps = model.forward_intermediates(
            batch(pictures), indices=[1, 2, 3, 4], stop_early=True, intermediates_only=True
        )
        return means(dict(zip(STAGE_NAMES, maps, strict=True)))

    return run


def of_img2vec(network: VGG) -> Contender:
    from img2vec_pytorch import Img2Vec, img_to_vec

    img_to_vec.vgg19_bn = lambda weights: network  # in place of the download
    model = Img2Vec(model="vgg19")
    return lambda pictures: {"fc7": model.get_vec(pictures)}


def of_vggenc(encoder: VGG19Encoder, outputs: tuple[str, ...], engine: str, precision: str) -> Contender:
    computing = Engine(encoder, outputs, Options(engine=engine, precision=precision))

    def run(pictures: Pictures) -> Arrays:
        pixels = torch.stack([torch.from_numpy(np.asarray(picture).copy()) for picture in pictures])
        return computing(pixels.permute(0, 3, 1, 2))

    return run


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("pictures", nargs="*", default=["examples/images"])
    parser.add_argument("--weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=8)
    options = parser.parse_args()

    network = get_model_builder("vgg19_bn")(init_weights=False).eval()
    if options.weights:
        network.load_state_dict(torch.load(options.weights, weights_only=True))
    with tempfile.TemporaryDirectory() as scratch:
        torch.save(network.state_dict(), f"{scratch}/vgg19_bn.pth")
        encoder = VGG19Encoder(1, weights=f"{scratch}/vgg19_bn.pth")

    contenders: dict[str, Contender] = {"torchvision create_feature_extractor": of_torchvision(network)}
    if importlib.util.find_spec("timm"):
        contenders["timm forward_intermediates"] = of_timm(network)
    for engine, precision in (("torch", "fp32"), ("ncnn", "fp32"), ("ncnn", "bf16")):
        if installed(engine):
            contenders[f"vggenc {engine} {precision}"] = of_vggenc(encoder, STAGE_NAMES, engine, precision)
    if importlib.util.find_spec("img2vec_pytorch"):
        contenders["img2vec_pytorch (fc7)"] = of_img2vec(network)
    contenders["vggenc torch fp32 (fc7)"] = of_vggenc(encoder, ("fc7",), "torch", "fp32")

    images = find_images(options.pictures)
    files = itertools.islice(itertools.cycle(range(len(images.paths))), options.images)
    side = encoder.preprocess.crop
    pictures = [decode(images.file(i)).resize((side, side)) for i in files]
    expected: Arrays = {}
    for name, run in contenders.items():  # also warms them up
        for output, value in run(pictures).items():
            right = expected.setdefault(output, value)
            difference = np.abs(value - right).max() / np.abs(right).max()
            if difference > (2e-2 if "bf16" in name else 1e-4):
                raise SystemExit(f"{name} differs in {output} by {difference:.1e}")

    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(options.rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run(pictures)
            seconds[name].append(time.perf_counter() - start)
    speed = {name: options.images / statistics.median(times) for name, times in seconds.items()}
    first = next(iter(speed.values()))
    width = max(map(len, speed))
    print(f"{torch.get_num_threads()} threads, {options.images} pictures a round, {options.rounds} rounds")
    print(f"{'':<{width}}  images/s  ratio")
    for name, value in speed.items():
        print(f"{name:<{width}}  {value:8.2f}  {value / first:5.2f}")


if __name__ == "__main__":
    main()
