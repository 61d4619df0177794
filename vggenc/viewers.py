"""The commands that show what came out: show, similar, report."""

import json
from pathlib import Path
from typing import Annotated

import typer

from vggenc.console import (
    FAILED_IMAGES,
    K_WITHOUT_HEADS,
    Backbone,
    Device,
    Json,
    Weights,
    Workers,
    check_viz,
    check_writable,
    print_facts,
    print_table,
    printable,
)
from vggenc.errors import UsageError
from vggenc.inputs import find_images
from vggenc.options import DEFAULT_WEIGHTS
from vggenc.places import place
from vggenc.zsl.cli import check_extra

# torch is imported inside the commands, so that help comes at once.


def show(
    inputs: Annotated[list[str], typer.Argument(help="Image files, folders, globs, @list.txt.")],
    output: Annotated[Path, typer.Option(help="Folder to write; a sheet is named as its image, and .png.")],
    weights: Weights = DEFAULT_WEIGHTS,
    backbone: Backbone = None,
    names: Annotated[
        Path | None, typer.Option(help="File with a name for each attribute, one a line.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side of the square seen.", show_default="the weights' own, 224")
    ] = None,
    num_workers: Workers = None,
    device: Device = "auto",
) -> None:
    """Draw what the network sees in each image: stages, channels, attributes on one PNG sheet (extra viz).

    Sheets lie in the folder as their images do below the deepest folder common to all. Exit code: 0 all fine,
    1 could not finish, 2 wrong usage, 3 finished with failed images.
    """
    check_viz()
    images = find_images(inputs)
    from vggenc.checkpoint import load
    from vggenc.encoder import VGG19Encoder
    from vggenc.engines import pick_device
    from vggenc.options import Options
    from vggenc.visualize import read_names
    from vggenc.visualize import show as draw_sheets

    where = pick_device(device)
    checkpoint = load(weights, backbone)
    encoder = VGG19Encoder(checkpoint.k or K_WITHOUT_HEADS, weights=checkpoint).to(where)
    options = Options(image_size=image_size, num_workers=num_workers)
    listed = read_names(names, encoder.k) if names else None
    failed = 0
    for sheet in draw_sheets(images, encoder, output, names=listed, options=options, progress=True):
        failed += sheet.file is None
        if sheet.file is None:
            typer.echo(f"{printable(sheet.path)}: {printable(sheet.error or '')}", err=True)
        else:
            typer.echo(printable(str(sheet.file)))
    if failed:
        typer.echo(f"{failed} of {len(images.paths)} images failed", err=True)
        raise typer.Exit(FAILED_IMAGES)


def similar(
    query: Annotated[str, typer.Argument(help="An image file, or its URL.")],
    features: Annotated[str, typer.Argument(help="A folder that 'vggenc extract' wrote, or its URL.")],
    by: Annotated[str | None, typer.Option(help="Output to compare by.", show_default="the deepest")] = None,
    top: Annotated[int, typer.Option(help="Neighbours, at most.", min=1)] = 12,
    sheet: Annotated[
        Path | None, typer.Option(help="PNG file for a contact sheet, replaced if it exists (extra viz).")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="For an image that isn't in the folder.", show_default="those of the folder"),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Find the images of a features folder that are nearest to an image, by the cosine of an output."""
    if sheet:
        check_viz()
        check_writable(sheet)
    from vggenc.engines import pick_device
    from vggenc.parts import compared, read_manifest
    from vggenc.sheets import save
    from vggenc.similar import contact_sheet
    from vggenc.similar import similar as find_similar

    found = find_similar(query, features, by=by, top=top, weights=weights, device=pick_device(device))
    if sheet:
        save(contact_sheet(query, features, found, by=by), sheet)
    if as_json:
        typer.echo(json.dumps([neighbour._asdict() for neighbour in found], indent=2))
    else:
        heading = f"cosine of {compared(read_manifest(features), by)}"
        print_table([{heading: f"{one.cosine:.4f}", "path": printable(one.path)} for one in found])


def report(
    where: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_FEATURES", help="A folder of 'vggenc extract' or of 'vggenc zsl train'."
        ),
    ],
    html: Annotated[Path, typer.Option(help="File to write; replaced if it exists.")],
    by: Annotated[
        str | None,
        typer.Option(
            help="Of features: the output that map and clusters are made of.", show_default="the deepest"
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Of a run: its data set.", show_default="where it was in training")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Of a run: folder of the images.", show_default="as in training, or in --data"),
    ] = None,
    device: Device = "auto",
    num_workers: Annotated[
        int | None, typer.Option(help="Of a run: decoding processes.", show_default="cores - 1")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make one HTML page of a features folder or a zero-shot run, which opens in any browser, offline."""
    check_writable(html)
    folder = place(where)
    from vggenc.page import write_page
    from vggenc.parts import MANIFEST
    from vggenc.zsl.record import RUN

    if (folder / MANIFEST).is_file():
        if data or images:
            raise UsageError(f"--data and --images are for a run; {folder} is a features folder")
        check_viz()
        from vggenc.features_page import features_page

        kind, text = "features", features_page(folder, by=by, progress=True)
    elif (folder / RUN).is_file():
        if by:
            raise UsageError(f"--by is for a features folder; {folder} is a zero-shot run")
        check_extra()
        from vggenc.engines import pick_device
        from vggenc.options import Options
        from vggenc.zsl.run_page import run_page

        options = Options(num_workers=num_workers)
        kind = "zero-shot run"
        text = run_page(
            folder, data=data, images=images, options=options, device=pick_device(device), progress=True
        )
    else:
        raise UsageError(
            f"{folder} is neither a features folder of 'vggenc extract' (it has no {MANIFEST}) nor a run of "
            f"'vggenc zsl train' (it has no {RUN})"
        )
    write_page(html, text)
    print_facts({"file": str(html), "of": kind, "MB": round(html.stat().st_size / 1e6, 2)}, as_json)
