"""A page on a zero-shot run: what was asked and chosen, accuracies, confusions, where attention lay."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vggenc.charts import Curve, chart, confusion_matrix
from vggenc.encoder import VGG19Encoder
from vggenc.errors import ImageError, UsageError
from vggenc.images import read
from vggenc.options import Options
from vggenc.page import Cell, Html, Section, facts, join, missing, page, percent, picture, table, tag
from vggenc.progress import progress_bar
from vggenc.visualize import attention_sheet, read_names
from vggenc.zsl import report
from vggenc.zsl.data import ZSLData, load_data, tail
from vggenc.zsl.evaluation import Predictions, confusion, margins

SHEETS = 4
"""Of best images, and of worst ones."""
MOST_CLASSES = 60
"""For which the confusion matrix is shown whole; else the largest of its numbers are."""
_SETTINGS = {"czsl": "among the unseen classes", "gzsl": "among all classes"}


@dataclass(frozen=True, eq=False)
class _Judged:
    """A run with all that its page is made of; `about` is what `run.json` holds."""

    folder: Path
    about: dict[str, Any]
    encoder: VGG19Encoder
    data: ZSLData
    options: Options
    predictions: Predictions
    summary: report.Report


def run_page(
    run: Path,
    *,
    data: Path | None = None,
    images: Path | None = None,
    options: Options | None = None,
    device: Any = "cpu",
    progress: bool = False,
) -> str:
    """A page on what `vggenc zsl train` wrote; the same run and data give the same page.

    Args:
        run: its folder.
        data: the data set, where it isn't any more where it was in training.
        images: folder of the images, likewise; None: in `data`.
        options: how images are read and computed; `image_size` is the run's own.
        device: where the encoder runs.
        progress: show a bar on standard error, where that is a terminal, while attention is drawn.

    Raises:
        UsageError: a run that isn't finished, or data that aren't its own or aren't there.
        DataError: an image that can't be read while all are judged.
    """
    options = options or Options()
    encoder, about = report.load_encoder(run, device)
    split = _data(run, about, data, images)
    predictions = report.judge(run, encoder, about, split, options)
    summary = report.summarize(encoder, about, split, predictions, 0.0)
    judged = _Judged(run, about, encoder, split, options, predictions, summary)
    best = summary["results"][summary["best"]]
    lead = (
        f"{100 * best['czsl']['mca']:.1f} % mean class accuracy on {len(split.unseen)} unseen classes by "
        f"{summary['best']}, where chance is {100 * summary['chance']:.1f} %."
    )
    sections = [
        Section("Summary", _summary(judged)),
        Section("Accuracies", _accuracies(summary)),
        Section("Curves", _curves(judged)),
        Section("Classes", _classes(judged)),
        Section("Confusions", _confusions(judged)),
        Section("Attention", _attention(judged, progress)),
    ]
    return page(f"Zero-shot run {run.absolute().name}", lead, sections)


def _data(run: Path, about: dict[str, Any], data: Path | None, images: Path | None) -> ZSLData:
    noted = about["data"]
    if data is None and noted is None:
        raise UsageError(f"{run} doesn't say where its data set lies; name it with --data (data=)")
    name = about["settings"]["data"]["split"]
    if data is not None:
        return load_data(data, name, images=images)
    if not Path(noted["folder"]).is_dir():
        raise UsageError(
            f"the data set of {run} isn't at {noted['folder']} any more; name it with --data (data=)"
        )
    return load_data(noted["folder"], name, images=images or noted["images"])


def _summary(run: _Judged) -> Html:
    data, settings, selection = run.data, run.about["settings"], run.about["selection"]
    recipe = settings["recipe"]
    rates = ", ".join(f"{recipe[f'{part}_lr']:g}" for part in ("backbone", "fc", "head"))
    return facts(
        {
            "Data set": data.folder,
            "Split": f"{data.split} {settings['data']['sha256'][:16]}",
            "Classes": f"{len(data.seen)} seen, {len(data.unseen)} unseen",
            "Weights": f"{settings['weights']} ({settings['backbone']})",
            "Trained": "heads on cached maps" if settings["heads_only"] else "the network",
            "Frozen": f"up to {recipe['freeze']}" if recipe["freeze"] else "nothing",
            "Image size": "{0} x {0} pixels".format(recipe["image_size"]),
            "Rates of stages, fc_layers, heads": rates,
            "Batch": f"{recipe['batch_size']} images",
            "Seed": settings["seed"],
            "Epochs": f"{selection['epochs']} of at most {recipe['epochs']}",
            "MCA where they were chosen": f"{100 * selection['mca']:.1f} %",
            "Chosen on": f"{selection['on']}: {', '.join(selection['classes'])}",
            "Versions": ", ".join(f"{name} {number}" for name, number in settings["versions"].items()),
        }
    )


def _accuracies(summary: report.Report) -> Html:
    rows = report.table(summary)
    columns = ["Method", "Kind", "Step", "CZSL MCA", "GZSL U", "GZSL S", "GZSL H"]
    cells = [[row["method"], row[""], *map(_number, list(row.values())[2:])] for row in rows]
    lines = (tag("li", {}, line) for line in report.notes(summary))
    return join([table("Accuracies in percent", columns, cells), tag("ul", {"class": "note"}, *lines)])


def _number(text: str) -> Cell:
    return Cell(float(text), text) if text not in ("", "-") else Cell(None, None)


def _curves(run: _Judged) -> Html:
    histories = report.read_histories(run.folder)
    losses, accuracies = [], []
    for phase, rows in histories.items():
        for colour, name in enumerate(("attribute_loss", "latent_loss")):
            points = [(row["epoch"] + 1, row[name]) for row in rows]
            label = f"{name.replace('_', ' ')}, {phase}"
            losses.append(Curve(label, points, colour, dashed=phase == "selection"))
        if "mca" in rows[0]:
            points = [(row["epoch"] + 1, 100 * row["mca"]) for row in rows]
            accuracies.append(Curve(f"MCA, {phase}", points, 2, dashed=phase == "selection"))
    selection = run.about["selection"]
    charts = []
    if losses:
        charts.append(chart("Losses on the training images", "mean over an epoch", losses))
    if accuracies:
        title = f"MCA on {selection['on'].split(',')[0]}"
        charts.append(chart(title, "percent", accuracies, mark=selection["epochs"]))
    if not charts:
        return tag("p", {}, "The run's history.csv files are gone.")
    note = f"The dotted line marks the epoch chosen, {selection['epochs']}." if accuracies else ""
    return join([tag("div", {"class": "charts"}, *charts), tag("p", {"class": "note"}, note)])


def _classes(run: _Judged) -> Html:
    data, summary = run.data, run.summary
    methods = list(dict.fromkeys(["attributes", summary["best"]]))
    shown = [(setting, method) for method in methods for setting in _SETTINGS]
    shown = [(setting, method) for setting, method in shown if setting in summary["results"][method]]
    columns = ["Class", "Kind", "Test images", *(f"{setting.upper()}, {method}" for setting, method in shown)]
    tested = np.bincount(
        data.labels[np.concatenate([data.test_seen, data.test_unseen])], minlength=len(data.classes)
    )
    rows = []
    for kind, members in (("unseen", data.unseen), ("seen", data.seen)):
        for i in members:
            name = data.classes[i]
            found = [summary["results"][m][setting]["by_class"].get(name) for setting, m in shown]
            rows.append([name, kind, int(tested[i]), *map(percent, found)])
    note = "CZSL: among the unseen classes. GZSL: among all. Seen classes are judged in GZSL alone."
    return join(
        [table("Accuracy of each class, in percent", columns, rows), tag("p", {"class": "note"}, note)]
    )


def _confusions(run: _Judged) -> Html:
    data = run.data
    parts = [
        tag("p", {"class": "note"}, "By attributes alone; a row is a true class, its numbers are images.")
    ]
    for setting, among in _SETTINGS.items():
        if setting == "gzsl" and not len(data.test_seen):
            continue
        rows, counts = confusion(data, run.predictions, setting)
        names = [data.classes[i] for i in rows]
        right, total = int(counts.trace()), int(counts.sum())
        parts.append(tag("h3", {}, f"{setting.upper()}, {among}: {right:,} of {total:,} right"))
        if len(names) <= MOST_CLASSES:
            parts.append(confusion_matrix(f"Images of each class, {among}", names, counts))
        else:
            parts.append(_largest(names, counts, among))
    return join(parts)


def _largest(names: list[str], counts: NDArray[np.int64], among: str) -> Html:
    wrong = counts * (1 - np.eye(len(counts), dtype=int))
    order = np.argsort(-wrong, axis=None, kind="stable")[: 4 * MOST_CLASSES]
    pairs = [divmod(int(place), len(names)) for place in order if wrong.flat[place]]
    rows = [[names[i], names[j], int(wrong[i, j])] for i, j in pairs]
    return table(f"The most frequent mistakes {among}", ["True", "Predicted", "Images"], rows)


def _attention(run: _Judged, progress: bool) -> Html:
    nearest, margin = margins(run.data, run.predictions)
    order = np.argsort(-margin, kind="stable")
    count = max(1, min(SHEETS, len(order) // 2))
    try:
        names = read_names(run.data.folder / "predicates.txt", run.data.k)
    except UsageError:
        names = None
    note = (
        "Test images of unseen classes by their margin: the cosine of the predicted attributes with those of "
        "the true class, minus the highest one with another unseen class."
    )
    parts = [tag("p", {"class": "note"}, note)]
    with progress_bar(2 * count, shown=progress, desc="attention") as bar:
        for title, places in (("Best", order[:count]), ("Worst", order[::-1][:count])):
            sheets = []
            for place in places:
                row = run.data.test_unseen[place]
                caption = _caption(run.data, row, nearest[place], float(margin[place]))
                sheets.append(tag("li", {}, _sheet(run, row, caption, names)))
                bar.update()
            parts += [tag("h3", {}, f"{title} {count}"), tag("ul", {"class": "sheets"}, *sheets)]
    return join(parts)


def _caption(data: ZSLData, row: int, nearest: int, margin: float) -> str:
    true, found = data.classes[data.labels[row]], data.classes[nearest]
    verdict = "right" if true == found else f"taken for {found}"
    return f"{tail(data.paths[row])}: {verdict}, margin {margin:+.3f}"


def _sheet(run: _Judged, row: int, caption: str, names: list[str] | None) -> Html:
    path, size = run.data.paths[row], run.about["settings"]["recipe"]["image_size"]
    try:
        image = read(run.data.root / path, max_pixels=run.options.max_pixels).image
    except ImageError as error:  # it was there when its maps were cached
        return missing(f"can't be shown: {error}", path, caption)
    sheet = attention_sheet(image, run.encoder, names, image_size=size)
    return picture(sheet, f"Attention on {caption}", caption)
