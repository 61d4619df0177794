"""The command line: arguments, one call, an exit code."""

import os
import re
import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from vggenc import __version__, tools, viewers
from vggenc.console import (
    FAILED_IMAGES,
    K_WITHOUT_HEADS,
    UNFINISHED,
    USAGE,
    Backbone,
    Device,
    Json,
    Outputs,
    Weights,
    Workers,
    interruptible,
    print_facts,
    printable,
    split_outputs,
    stopped,
)
from vggenc.errors import UsageError, VggencError
from vggenc.inputs import find_images
from vggenc.options import (
    DEFAULT_WEIGHTS,
    DTYPES,
    ENGINE_NAMES,
    MIN_SIZE,
    POOLS,
    PRECISIONS,
    Cluster,
    Options,
)
from vggenc.zsl.cli import app as zsl_app

_ADDRESS = re.compile(r"auto|local|[^/\s]*(//)?[^/\s]+:\d+")
# torch is imported inside the commands, so that help comes at once.

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, help="VGG19 multi-level image features."
)
weights_app = typer.Typer(
    no_args_is_help=True, help="Pretrained weights: what there is, fetching, verifying."
)
app.add_typer(weights_app, name="weights")
app.add_typer(zsl_app, name="zsl")


def main() -> None:
    """Run the command line; errors of this package become one line and an exit code."""
    _open_streams()
    try:
        app(_with_addresses(sys.argv[1:]), prog_name="vggenc")
    except VggencError as error:
        typer.echo("error: " + "\n".join(map(printable, str(error).split("\n"))), err=True)
        sys.exit(USAGE if isinstance(error, UsageError) else UNFINISHED)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "memory" not in str(error):  # PyTorch's own kind
            raise
        reason = str(error).splitlines()[0] if str(error) else "out of memory"
        typer.echo(f"error: {reason}; a smaller --batch-size or --image-size needs less", err=True)
        sys.exit(UNFINISHED)
    except OSError as error:  # such as a full disk behind standard output
        typer.echo(f"error: {error}", err=True)
        sys.exit(UNFINISHED)


def _with_addresses(arguments: list[str]) -> list[str]:
    """The arguments, with `auto` after a `--ray` that no address follows."""
    found = []
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=True):
        found.append(argument)
        if argument == "--ray" and not _ADDRESS.fullmatch(after):
            found.append("auto")
    return found


def _open_streams() -> None:
    """Put the null device where the caller closed a standard stream; else a file of ours gets its number."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        name = ("stdin", "stdout", "stderr")[number]
        setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
    os.close(number)


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
        typer.Argument(
            help="Image files, folders, glob patterns, URLs (s3://...), or @list.txt with a file a line."
        ),
    ],
    output: Annotated[
        str, typer.Option(help="Folder or URL to write; an unfinished run in it is resumed.")
    ] = "features",
    outputs: Outputs = None,
    pool: Annotated[
        str, typer.Option(help=f"How a stage's map is handed out: {', '.join(POOLS)} (the whole map).")
    ] = Options.pool,
    weights: Weights = DEFAULT_WEIGHTS,
    backbone: Backbone = None,
    batch_size: Annotated[int, typer.Option(help="Images computed at a time.")] = Options.batch_size,
    part_size: Annotated[
        int | None, typer.Option(help="Rows in a part on disk.", show_default="256; 32 for whole maps")
    ] = Options.part_size,
    num_workers: Workers = Options.num_workers,
    device: Device = "auto",
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
    full_decode: Annotated[
        bool, typer.Option("--full-decode", help="Decode large JPEGs at their full size: slower, and exact.")
    ] = Options.full_decode,
    max_pixels: Annotated[int, typer.Option(help="A larger image is a failed one.")] = Options.max_pixels,
    allow_untrained: Annotated[
        bool, typer.Option("--allow-untrained", help="Also write features of layers that were never trained.")
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="Compute on a Ray cluster: HOST:PORT of its head; alone: the one this machine belongs to.",
            show_default="compute in this process",
        ),
    ] = None,
    ray_workers: Annotated[
        int | None,
        typer.Option(help="Of them that compute on the cluster.", show_default="all it has room for"),
    ] = None,
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
        full_decode=full_decode,
        max_pixels=max_pixels,
        allow_untrained=allow_untrained,
    )
    # What needs no torch comes first, so that a slip is told at once.
    cluster = None if ray is None else Cluster(address=ray, workers=ray_workers, device=device)
    if cluster and num_workers is not None:
        raise UsageError("--num-workers is for this machine; how many decode on a cluster is Ray's to say")
    if ray_workers and not cluster:
        raise UsageError("--ray-workers goes with --ray")
    names = split_outputs(outputs)
    images = find_images(inputs)
    interruptible()
    try:
        from vggenc.checkpoint import load
        from vggenc.encoder import VGG19Encoder
        from vggenc.engines import pick_device
        from vggenc.pipeline import extract

        where = pick_device("cpu" if cluster else device)
        checkpoint = load(weights, backbone)
        encoder = VGG19Encoder(checkpoint.k or K_WITHOUT_HEADS, weights=checkpoint).to(where)
        with redirect_stdout(sys.stderr):  # where Ray tells of workers that died
            summary = extract(
                images,
                encoder,
                names,
                output,
                options=options,
                cluster=cluster,
                overwrite=overwrite,
                progress=True,
            )
    except KeyboardInterrupt as stop:
        if not stop.args:
            raise stopped("nothing was written") from None
        raise stopped(f"{stop.args[0]} of {len(images.paths)} rows are in {output}", "--overwrite") from None
    facts = {
        "images": summary.images,
        "failed": summary.failed,
        "computed": summary.computed,
        "images/s": summary.images_per_second and round(summary.images_per_second, 2),
        "first part s": summary.first_part and round(summary.first_part, 2),
        "engine": summary.engine,
        "precision": summary.precision,
        "folder": summary.folder,
    }
    if summary.failed:
        typer.echo(f"{summary.failed} of {summary.images} images failed:", err=True)
        for path, reason in summary.failures:
            typer.echo(f"  {printable(path)}: {printable(reason)}", err=True)
        if summary.failed > len(summary.failures):
            typer.echo("  ... (all of them: rows with status 'failed')", err=True)
    print_facts(facts, as_json)
    if summary.failed:
        raise typer.Exit(FAILED_IMAGES)


app.command("info")(tools.info)
app.command("export")(tools.export)
app.command("benchmark")(tools.benchmark)
app.command("show")(viewers.show)
app.command("similar")(viewers.similar)
app.command("report")(viewers.report)
weights_app.command("list")(tools.weights_list)
weights_app.command("fetch")(tools.weights_fetch)
weights_app.command("verify")(tools.weights_verify)
