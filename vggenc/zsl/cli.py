"""The commands `vggenc zsl ...`."""

import importlib.util
import json
import logging
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from vggenc.console import (
    UNFINISHED,
    Backbone,
    Device,
    Json,
    Workers,
    check_writable,
    interruptible,
    print_facts,
    print_table,
    split_outputs,
    stopped,
)
from vggenc.errors import UsageError, one_of
from vggenc.options import DEFAULT_WEIGHTS, ENGINE_NAMES
from vggenc.zsl.recipes import HEADS, PUBLISHED_BY_K, RECIPES, Recipe

# torch and the extra's libraries are imported inside the commands, so that help comes at once.

app = typer.Typer(no_args_is_help=True, help="Zero-shot learning with LFGAA (extra zsl).")
_NEEDS = ("lightning", "pytorch_metric_learning", "torchmetrics", "sklearn", "scipy", "matplotlib")

Data = Annotated[Path, typer.Argument(help="A data set: folders as AwA2 comes, or xlsa17's files.")]
Split = Annotated[str, typer.Option(help="ps: proposed, ss: standard.")]
Images = Annotated[Path | None, typer.Option(help="Folder of the images.", show_default="in the data set")]


def check_extra() -> None:
    """See that the extra is installed, and let its libraries keep their remarks to themselves.

    Raises:
        UsageError: it isn't.
    """
    if missing := [name for name in _NEEDS if not importlib.util.find_spec(name)]:
        raise UsageError(
            f"zero-shot learning needs its extra: pip install 'vggenc[zsl]' ({missing[0]} is missing)"
        )
    warnings.filterwarnings("ignore", module=r"(lightning|torchmetrics|pytorch_lightning)\..*")


def _recipe(name: str | None, k: int, split: str, heads_only: bool) -> Recipe:
    if name is None:
        name = PUBLISHED_BY_K.get(k, "awa2")
    if f"{name}-{split}" not in RECIPES:
        raise one_of("recipe", name, dict.fromkeys(key.split("-")[0] for key in RECIPES))
    return HEADS if heads_only else RECIPES[f"{name}-{split}"]


def _trained(freeze: str | None) -> str:
    if freeze is None:
        return "the whole network"
    return (
        "the heads"
        if freeze == "fc7"
        else f"the heads and fc_layers, which the weights lack (up to {freeze}: frozen)"
    )


@app.command("make-toy")
def make_toy_command(
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    images: Annotated[int, typer.Option(help="Pictures a class, 4 or more.")] = 40,
    seed: Annotated[int, typer.Option(help="The same seed draws the same pictures.", min=0)] = 0,
) -> None:
    """Draw a small data set of coloured shapes, in AwA2's layout."""
    from vggenc.zsl.toy import SEEN, UNSEEN, make_toy

    make_toy(folder, images=images, seed=seed)
    typer.echo(f"{SEEN} seen and {UNSEEN} unseen classes of {images} pictures in {folder}")


@app.command("train")
def train_command(
    data: Data,
    output: Annotated[Path, typer.Option(help="Folder of the run; an unfinished one goes on.")],
    split: Split = "ps",
    images: Images = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="awa2, cub or sun: the published settings.", show_default="by the number of attributes"
        ),
    ] = None,
    heads_only: Annotated[
        bool, typer.Option("--heads-only", help="Train the heads on cached features: minutes on a CPU.")
    ] = False,
    weights: Annotated[
        str, typer.Option(help="As for extract; 'random' for random values, a control.")
    ] = DEFAULT_WEIGHTS,
    backbone: Backbone = None,
    epochs: Annotated[int | None, typer.Option(help="At most.", show_default="the recipe's")] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images in a step, a multiple of 4.", show_default="the recipe's")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side of the square seen.", show_default="224")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Of the heads' values, batches and the classes held out.", min=0)
    ] = 0,
    paper_selection: Annotated[
        bool,
        typer.Option("--paper-selection", help="Choose epoch and step on the TEST classes, as published."),
    ] = False,
    device: Device = "auto",
    devices: Annotated[int, typer.Option(help="GPUs, or CPU processes; torchrun has its own.", min=1)] = 1,
    precision: Annotated[str, typer.Option(help="fp32 or bf16 (mixed).")] = "fp32",
    engine: Annotated[
        str, typer.Option(help=f"What computes cached features: {', '.join(ENGINE_NAMES)}.")
    ] = "torch",
    num_workers: Workers = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder of the cached features, to share.", show_default="in the run's"),
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also log for TensorBoard.")] = False,
    as_json: Json = False,
) -> None:
    """Train LFGAA on the seen classes; epoch and steps are chosen on seen classes that are held out."""
    check_extra()
    if tensorboard and not importlib.util.find_spec("tensorboard"):
        raise UsageError("--tensorboard needs the package tensorboard: pip install tensorboard")
    from vggenc.zsl.data import load_data
    from vggenc.zsl.record import is_first
    from vggenc.zsl.report import draw_curves
    from vggenc.zsl.run import Setup, train

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)  # it speaks of itself
    found = load_data(data, split, images=images)
    chosen = _recipe(recipe, found.k, split, heads_only)
    chosen = replace(
        chosen,
        epochs=chosen.epochs if epochs is None else epochs,
        batch_size=chosen.batch_size if batch_size is None else batch_size,
        image_size=chosen.image_size if image_size is None else image_size,
    )
    setup = Setup(
        weights=None if weights == "random" else weights,
        backbone=backbone,
        seed=seed,
        heads_only=heads_only,
        paper_selection=paper_selection,
        device=device,
        devices=devices,
        precision=precision,
        engine=engine,
        num_workers=num_workers,
        cache=cache,
        tensorboard=tensorboard,
    )
    interruptible()
    try:
        run = train(found, output, chosen, setup)
    except (KeyboardInterrupt, SystemExit):  # the latter is what Lightning makes of it
        if not is_first():
            raise typer.Exit(UNFINISHED) from None
        kept = any(output.glob("*/last.ckpt"))
        raise stopped(f"finished epochs are in {output}" if kept else "no epoch was finished") from None
    if not is_first():
        return
    draw_curves(output, output / "curves.png")
    selection, settings = run["selection"], run["settings"]
    facts = {
        "folder": str(output),
        "split": f"{split} {settings['data']['sha256'][:16]}",
        "images": "{} to train on, {} seen and {} unseen to test on".format(*settings["data"]["images"]),
        "trained": _trained(settings["recipe"]["freeze"]),
        "epochs": selection["epochs"],
        "chosen on": selection["on"],
        "its MCA": round(selection["mca"], 4),
        "evaluate with": f"vggenc zsl evaluate {output} {data}" + (" --split ss" if split == "ss" else ""),
    }
    print_facts(facts, as_json)


@app.command("evaluate")
def evaluate_command(
    run: Annotated[Path, typer.Argument(help="A folder of train or save_pretrained, or LFGAA's checkpoint.")],
    data: Data,
    split: Split = "ps",
    images: Images = None,
    image_size: Annotated[int | None, typer.Option(help="Of other than train's.", show_default="224")] = None,
    calibration: Annotated[
        str, typer.Option(help="Calibrated stacking for GZSL: a number, or auto for what validation chose.")
    ] = "0",
    output: Annotated[
        Path | None,
        typer.Option(
            help="JSON file to write, replaced if it exists.", show_default="report.json in the run's folder"
        ),
    ] = None,
    device: Device = "auto",
    engine: Annotated[str, typer.Option(help=f"What computes: {', '.join(ENGINE_NAMES)}.")] = "torch",
    num_workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Conventional and generalised accuracy by attributes, self-adaptation and hybrid inference."""
    check_extra()
    from vggenc.engines import pick_device
    from vggenc.options import Options
    from vggenc.zsl.data import load_data
    from vggenc.zsl.record import write_json
    from vggenc.zsl.report import REPORT, make_report, notes, table

    try:
        value = None if calibration == "auto" else float(calibration)
    except ValueError:
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise UsageError(f"--calibration must be a number or auto; got {calibration!r}")
    file = output or (run / REPORT if run.is_dir() else None)
    if file:
        check_writable(file)
    found = load_data(data, split, images=images)
    options = Options(engine=engine, image_size=image_size, num_workers=num_workers)
    report = make_report(
        run, found, calibration=value, options=options, device=pick_device(device), progress=True
    )
    if file:
        write_json(file, report)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    print_table(table(report))
    for line in notes(report):
        typer.echo(line)
    if file:
        typer.echo(f"all figures: {file}")


@app.command("export-features")
def export_features_command(
    run: Annotated[Path, typer.Argument(help="A folder of train or save_pretrained, or a file of weights.")],
    data: Data,
    output: Annotated[Path, typer.Option(help="Folder to write; its .mat files are replaced.")],
    format: Annotated[str, typer.Option(help="xlsa17.")] = "xlsa17",
    outputs: Annotated[str, typer.Option(help="Features, separated by commas; several are joined.")] = "fc7",
    split: Split = "ps",
    images: Images = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side of the square seen.", show_default="the run's, else 224")
    ] = None,
    device: Device = "auto",
    engine: Annotated[str, typer.Option(help=f"What computes: {', '.join(ENGINE_NAMES)}.")] = "torch",
    num_workers: Workers = None,
) -> None:
    """Write features and splits as res101.mat and att_splits.mat, which other repositories read."""
    check_extra()
    if format != "xlsa17":
        raise one_of("format", format, ["xlsa17"])
    from vggenc.engines import pick_device
    from vggenc.options import Options
    from vggenc.zsl.data import load_data
    from vggenc.zsl.report import export_features

    found = load_data(data, split, images=images)
    options = Options(engine=engine, image_size=image_size, num_workers=num_workers)
    shape = export_features(
        run,
        found,
        output,
        split_outputs([outputs]),
        options=options,
        device=pick_device(device),
        progress=True,
    )
    typer.echo(f"{shape[1]} features of {shape[0]} images in {output}")
