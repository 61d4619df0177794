"""What the commands share: options of the same meaning, and how results are printed."""

import json
import re
from typing import Annotated, Any

import typer

from vggenc.options import check_outputs
from vggenc.stages import BACKBONES, OUTPUTS, STAGE_NAMES

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Weights = Annotated[
    str, typer.Option(help="A name of 'vggenc weights list', a file, or a folder of save_pretrained.")
]
Backbone = Annotated[
    str | None, typer.Option(help=f"{' or '.join(BACKBONES)}.", show_default="the one that has the weights")
]
Outputs = Annotated[
    list[str] | None,
    typer.Option(
        help=f"Features to compute, separated by commas: {', '.join(OUTPUTS)}.",
        show_default=",".join(STAGE_NAMES),
    ),
]
K_WITHOUT_HEADS = 85
"""Attributes of an encoder whose weights hold no heads; no output that is trained depends on it."""


def split_outputs(given: list[str] | None) -> tuple[str, ...]:
    """The outputs named on the command line, the stages where none is.

    Raises:
        UsageError: an unknown one.
    """
    return check_outputs(STAGE_NAMES if given is None else re.findall(r"[^,\s]+", ",".join(given)))


def print_facts(facts: dict[str, Any], as_json: bool) -> None:
    """A line for each fact."""
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        text = " ".join(value) if isinstance(value, list) else value
        typer.echo(f"{name:{width}}  {'-' if text in (None, '') else text}")


def print_table(rows: list[dict[str, Any]]) -> None:
    """A line for each row, under the names of its cells."""
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        typer.echo("  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip())
