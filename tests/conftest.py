"""What the tests share: no network, small encoders that cost little, and picture files."""

import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from vggenc import VGG19Encoder
from vggenc.checkpoint import Checkpoint
from vggenc.cli import main
from vggenc.places import place
from vggenc.weights import REGISTRY
from vggenc.zsl import load_data, make_toy

ROOT = Path(__file__).parent.parent
PHOTOGRAPHS = ROOT / "examples" / "images"
SHARED_DATA = ROOT.parent / "shared" / "data"


def pytest_collection_modifyitems(config, items):
    for item in items:
        for marker, why in (
            ("slow", "takes minutes"),
            ("network", "downloads 1.1 GB"),
            ("browser", "needs chromium"),
        ):
            if item.get_closest_marker(marker) and marker not in config.option.markexpr:
                item.add_marker(pytest.mark.skip(reason=f"{why}; run it with -m {marker}"))


@pytest.fixture(autouse=True)
def alone(request, monkeypatch, tmp_path_factory):
    """Nothing reaches the network, and nothing is found in this machine's caches."""
    if request.node.get_closest_marker("network"):
        return
    monkeypatch.setenv("TORCH_HOME", str(tmp_path_factory.getbasetemp() / "torch-home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("VGGENC_WEIGHTS", raising=False)
    resolve = socket.getaddrinfo

    def local_only(host, *args, **kwargs):
        if host not in ("localhost", "127.0.0.1"):
            raise socket.gaierror(f"the tests block the network: {host}")
        return resolve(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", local_only)


@pytest.fixture(scope="session")
def oxford() -> VGG19Encoder:
    return VGG19Encoder(3, weights="OXFORD_V1").eval()


_BODIES: dict[str, dict[str, torch.Tensor]] = {}


@pytest.fixture
def make_encoder() -> Callable[..., VGG19Encoder]:
    """Random encoders in evaluation mode, with values that make every layer matter.

    Their 140 M values of stages and `fc_layers` are drawn once a backbone and shared; with `own=True` the
    stages are the encoder's own, and what it does to `fc_layers` must be undone.
    """

    def make(k: int = 5, backbone: str = "vgg19_bn", *, own: bool = False) -> VGG19Encoder:
        torch.manual_seed(0)
        if backbone not in _BODIES:
            body = VGG19Encoder(1, backbone=backbone, weights=None).state_dict()
            _BODIES[backbone] = {key: v for key, v in body.items() if key.startswith(("conv", "fc_layers"))}
            _randomise_norms(_BODIES[backbone])
        state = {
            key: v.clone() if own and key.startswith("conv") else v for key, v in _BODIES[backbone].items()
        }
        held = frozenset(key.split(".")[0] for key in state)
        given = Checkpoint("test", "0" * 64, backbone, REGISTRY[0].preprocess, state, held)
        encoder = VGG19Encoder(k, weights=given).eval()
        heads = {key: v for key, v in encoder.state_dict().items() if key not in state}
        for key, value in heads.items():
            if value.ndim > 1:
                value.normal_(0, 0.05)
            elif key.endswith("bias"):
                value.normal_(0, 0.3)
        _randomise_norms(heads)
        return encoder

    return make


def _randomise_norms(state: dict[str, torch.Tensor]) -> None:
    for key, value in state.items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif key.endswith("running_mean"):
            value.normal_(0, 0.1)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 224, 224, generator=torch.Generator().manual_seed(1))


class Result(NamedTuple):
    """What a command came to."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def vggenc(monkeypatch, capfd) -> Callable[..., Result]:
    """Runs the command in this process, which has torch loaded already."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["vggenc", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return Result(caught.value.code or 0, *capfd.readouterr())

    return run


class Terminal(io.StringIO):
    """Something to put in the place of standard error, in a test: pytest sets its own before each."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def watchful_loader(monkeypatch) -> None:
    """PyTorch looks after its workers every half second, not every five, so that dead ones show soon."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)
    waits = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(waits, "__defaults__", (0.5,))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten small noise pictures in two levels of folders."""
    root = tmp_path / "pictures"
    (root / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(10):
        pixels = rng.integers(0, 256, (40 + i, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / ("deep" if i % 3 == 0 else ".") / f"{i}.png")
    return root


@pytest.fixture
def narrow(monkeypatch) -> None:
    """Encoders whose fully connected layers are 16 wide instead of 4096: 120 M values fewer."""
    build = VGG19Encoder._build

    def build_narrow(encoder: VGG19Encoder) -> None:
        build(encoder)
        relu, dropout = torch.nn.ReLU, torch.nn.Dropout
        layers = [torch.nn.Linear(25088, 16), relu(), dropout(), torch.nn.Linear(16, 16), relu()]
        encoder.fc_layers = torch.nn.Sequential(*layers)
        encoder.fc4 = torch.nn.Linear(16, 2 * encoder.k)

    monkeypatch.setattr(VGG19Encoder, "_build", build_narrow)
    monkeypatch.setattr("vggenc.engines.FC_WIDTH", 16)


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zsl") / "toy"
    make_toy(folder, images=8)
    return folder


@pytest.fixture
def data(toy):
    return load_data(toy)


@pytest.fixture(scope="session")
def server():
    """Where an S3 server listens, on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
        process.kill()


@pytest.fixture
def bucket(server, monkeypatch, tmp_path):
    """A new bucket's URL."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    url = f"s3://bucket-{os.getpid()}-{time.monotonic_ns()}"
    place(url).fs.mkdir(url)
    return url


@pytest.fixture
def photos(bucket, folder):
    """The ten pictures of `folder` in the bucket, and three files that are none."""
    (folder / "cut.png").write_bytes((folder / "1.png").read_bytes()[:400])
    (folder / "empty.jpg").touch()
    (folder / "odd #%20?.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("no picture by its name")
    place(bucket).fs.put(f"{folder}/", f"{bucket}/photos/", recursive=True)
    return f"{bucket}/photos"
