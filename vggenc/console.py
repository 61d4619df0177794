"""What the commands share: options of the same meaning, and how results are printed."""

import importlib.util
import json
import os
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from vggenc.errors import UsageError
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
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one.")]
Workers = Annotated[
    int | None,
    typer.Option(help="Decoding processes; 0: decode in this one.", show_default="cores - 1"),
]
FAILED_IMAGES, USAGE, UNFINISHED = 3, 2, 1
"""Exit codes besides 0."""
K_WITHOUT_HEADS = 85
"""Attributes of an encoder whose weights hold no heads; no output that is trained depends on it."""


def split_outputs(given: list[str] | None) -> tuple[str, ...]:
    """The outputs named on the command line, the stages where none is.

    Raises:
        UsageError: an unknown one.
    """
    return check_outputs(STAGE_NAMES if given is None else re.findall(r"[^,\s]+", ",".join(given)))


def printable(text: str) -> str:
    """Text for a terminal: control characters, which names of files may hold, are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def check_writable(file: Path) -> None:
    """See that a file can be written before the work that it is to hold begins.

    Raises:
        UsageError: a folder or a device, or a file in a folder that isn't there or can't be written.
    """
    folder = file.absolute().parent
    other = file.exists() and not file.is_file()  # a device would be replaced
    if other or not folder.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
        raise UsageError(f"{file} can't be written: it must be a file in a folder that is there")


def check_viz() -> None:
    """See that the extra `viz` is there.

    Raises:
        UsageError: it isn't.
    """
    if not all(map(importlib.util.find_spec, ("matplotlib", "sklearn"))):
        raise UsageError("pictures need their extra: pip install 'vggenc[viz]'")


def interruptible() -> None:
    """Let SIGTERM do what Ctrl-C does."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def stopped(what: str, *without: str) -> typer.Exit:
    """Say what a stopped command leaves, and which command goes on, `without` some options; what to raise."""
    again = shlex.join(["vggenc", *(arg for arg in sys.argv[1:] if arg not in without)])
    typer.echo(f"stopped; {what}, this goes on:\n  {again}", err=True)
    return typer.Exit(UNFINISHED)


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
