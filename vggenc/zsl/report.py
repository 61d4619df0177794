"""What an evaluation came to: for machines, as a table, and as curves."""

import csv
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE

from vggenc.checkpoint import load
from vggenc.encoder import VGG19Encoder
from vggenc.errors import DataError, UsageError
from vggenc.options import Options
from vggenc.pipeline import iter_features
from vggenc.zsl import xlsa17
from vggenc.zsl.batches import Grids
from vggenc.zsl.data import ZSLData
from vggenc.zsl.evaluation import Predictions, evaluate, predict
from vggenc.zsl.record import GRIDS, RUN, read_run

REPORT = "report.json"
Report = dict[str, Any]


def make_report(
    run: str | Path,
    data: ZSLData,
    *,
    calibration: float | None = 0.0,
    options: Options | None = None,
    device: Any = "cpu",
    progress: bool = False,
) -> Report:
    """Evaluate a training run, or any trained encoder, on a split.

    Args:
        run: a folder that `train` wrote, one of `save_pretrained`, or a file such as a checkpoint of LFGAA.
        data: the split; for a training run the one that it was trained on.
        calibration: as for `evaluate`; None: what the run chose on its validation classes.
        options: how images are read and computed; `image_size` is the run's own.
        device: where the encoder runs.
        progress: show a bar on standard error where that is a terminal, if images are read.

    Returns:
        `data`, `run` (its settings), `selection`, `calibration`, `chance`, `left_out` (classes without test
        images), `results` (see `evaluate`), and `best`: the method with the highest CZSL MCA.

    Raises:
        UsageError: weights that don't fit the data, or another split than the run's.
    """
    encoder, about = load_encoder(Path(run), device)
    predictions = judge(Path(run), encoder, about, data, options or Options(), progress=progress)
    return summarize(encoder, about, data, predictions, calibration)


def judge(
    run: Path,
    encoder: VGG19Encoder,
    about: dict[str, Any],
    data: ZSLData,
    options: Options,
    *,
    progress: bool = False,
) -> Predictions:
    """What the encoder of a run says of all images of its split.

    Args:
        run: as for `make_report`.
        encoder: with `about`, from `load_encoder`.
        about: what the run was told.
        data: the split.
        options: as for `make_report`.
        progress: likewise.

    Raises:
        UsageError: as for `make_report`.
        DataError: an image that can't be read.
    """
    there, here = about.get("settings", {}).get("data", {}).get("sha256"), data.sha256()
    if there not in (None, here):
        raise UsageError(f"{run} was trained on another split ({there[:16]}) than this one ({here[:16]})")
    if encoder.k != data.k:
        raise UsageError(f"{run} predicts {encoder.k} attributes; the classes here have {data.k}")
    encoder.check_trained(["attributes", "latent"])
    grids = run / (about.get("grids") or GRIDS)
    which = np.concatenate([data.trainval, data.test_seen, data.test_unseen])
    return predict(
        encoder,
        data,
        which,
        grids=Grids(grids) if about.get("grids") and grids.is_dir() else None,
        options=_options(about, options),
        progress=progress,
    )


def summarize(
    encoder: VGG19Encoder,
    about: dict[str, Any],
    data: ZSLData,
    predictions: Predictions,
    calibration: float | None,
) -> Report:
    """The report on an encoder's predictions; see `make_report`."""
    selection = about.get("selection") or {}
    if calibration is None:
        calibration = float(selection.get("calibration", 0.0))
    results = evaluate(data, predictions, steps=selection.get("steps"), calibration=calibration)
    tested = np.union1d(data.labels[data.test_unseen], data.labels[data.test_seen])
    expected = data.unseen if not len(data.test_seen) else np.concatenate([data.seen, data.unseen])
    return {
        "data": {
            "split": data.split,
            "sha256": data.sha256(),
            "seen": [data.classes[i] for i in data.seen],
            "unseen": [data.classes[i] for i in data.unseen],
            "images": [len(data.trainval), len(data.test_seen), len(data.test_unseen)],
        },
        "run": about.get("settings")
        or {"weights": encoder.weights_name, "weights_sha256": encoder.weights_sha256},
        "selection": selection or None,
        "calibration": calibration,
        "chance": 1 / len(data.unseen),
        "left_out": [data.classes[i] for i in np.setdiff1d(expected, tested)],
        "results": results,
        "best": max(results, key=lambda method: float(results[method]["czsl"]["mca"])),
        "versions": {name: version(name) for name in ("vggenc", "torch")},
    }


def table(report: Report) -> list[dict[str, str]]:
    """The rows of a printed table, in percent; `T` marks a transductive method, as in the papers."""
    rows = []
    for method, result in report["results"].items():
        row = {"method": method, "": "T" if result["transductive"] else "I"}
        row["step"] = str(result["czsl"].get("step", ""))
        row["CZSL MCA"] = f"{100 * result['czsl']['mca']:.1f}"
        for name in ("unseen", "seen", "h"):
            cell = f"{100 * result['gzsl'][name]:.1f}" if "gzsl" in result else "-"
            row[f"GZSL {name[0].upper()}"] = cell
        rows.append(row)
    rows.append(
        {**dict.fromkeys(rows[0], ""), "method": "chance", "CZSL MCA": f"{100 * report['chance']:.1f}"}
    )
    return rows


def notes(report: Report) -> list[str]:
    """What must be known to read the table."""
    data, selection = report["data"], report["selection"]
    split = {"ps": "proposed split", "ss": "standard split"}.get(data["split"], data["split"])
    images = "{} to train on, {} seen and {} unseen to test on".format(*data["images"])
    lines = [
        f"{split} {data['sha256'][:16]}: {len(data['seen'])} seen and {len(data['unseen'])} unseen classes; "
        f"images: {images}"
    ]
    if selection:
        lines.append(f"epoch {selection['epochs']} and steps chosen on {selection['on']}")
    else:
        lines.append("epoch and steps not chosen by this package; self-adaptation after its last step")
    if report["left_out"]:
        lines.append(f"without a test image, left out: {', '.join(report['left_out'])}")
    if report["calibration"]:
        lines.append(f"GZSL with calibrated stacking, {report['calibration']:g} a cosine")
    lines.append("I: inductive. T: transductive, learns from the unlabelled test images")
    lines.append(f"best of these in CZSL: {report['best']}")
    return lines


def export_features(
    run: str | Path,
    data: ZSLData,
    folder: Path,
    outputs: Sequence[str],
    *,
    options: Options,
    device: Any = "cpu",
    progress: bool = False,
) -> tuple[int, int]:
    """Write features of all images, and the split, in xlsa17's layout.

    Args:
        run: as for `make_report`.
        data: the split.
        folder: to write.
        outputs: names, as for `VGG19Encoder.encode`; their vectors are joined.
        options: as for `make_report`.
        device: likewise.
        progress: likewise.

    Returns:
        Numbers of images and of features.

    Raises:
        UsageError: outputs that were never trained.
        DataError: an image that can't be read.
    """
    encoder, about = load_encoder(Path(run), device)
    everything = data.images(np.arange(len(data.paths)))
    values = []
    how = _options(about, options)
    for batch in iter_features(everything, encoder, outputs, options=how, progress=progress):
        if bad := [row for row in batch.rows if row.status != "ok"]:
            raise DataError(f"{data.root / bad[0].path} can't be used: {bad[0].error}")
        values.append(
            np.concatenate([part.reshape(len(part), -1) for part in batch.features.values()], axis=1)
        )
    features = np.concatenate(values).astype(np.float32)
    xlsa17.write(folder, data, features)
    return features.shape[0], features.shape[1]


def load_encoder(run: Path, device: Any) -> tuple[VGG19Encoder, dict[str, Any]]:
    """The encoder of a run or of any weights, and what `run.json` holds; nothing for other weights.

    Raises:
        UsageError: a run that isn't finished, or a folder of other things.
    """
    about = read_run(run) if (run / RUN).is_file() else {}
    if run.is_dir() and not (run / SAFETENSORS_SINGLE_FILE).exists():
        raise UsageError(
            f"{run} isn't finished; the command that began it goes on"
            if about
            else f"{run} is neither a run of 'vggenc zsl train' nor a folder of save_pretrained"
        )
    checkpoint = load(run)
    return VGG19Encoder(checkpoint.k or 1, weights=checkpoint).to(device), about


def _options(about: dict[str, Any], options: Options) -> Options:
    """Some options at the image size that a run was trained with."""
    size = about.get("settings", {}).get("recipe", {}).get("image_size") or options.image_size
    return replace(options, image_size=size)


def read_histories(run: Path) -> dict[str, list[dict[str, float]]]:
    """The rows of `history.csv` of each phase that a run has: `selection` and `training`."""
    found = {}
    for phase in ("selection", "training"):
        if (run / phase / "history.csv").is_file():
            with (run / phase / "history.csv").open() as stream:
                found[phase] = [{key: float(x) for key, x in row.items()} for row in csv.DictReader(stream)]
    return found


def draw_curves(run: Path, file: Path) -> None:
    """Losses, and the accuracy on validation classes, by epoch, as a PNG file."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    histories = read_histories(run)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for phase, rows in histories.items():
        epochs = [row["epoch"] + 1 for row in rows]
        style = "--" if phase == "selection" else "-"
        for name, colour in (("attribute_loss", "tab:blue"), ("latent_loss", "tab:orange")):
            label = f"{name.replace('_', ' ')}, {phase}"
            left.plot(epochs, [row[name] for row in rows], style, color=colour, marker=".", label=label)
        if "mca" in rows[0]:
            right.plot(epochs, [100 * row["mca"] for row in rows], style, marker=".", color="tab:green")
    about = read_run(run)["selection"] or {}
    if about:
        right.axvline(about["epochs"], color="0.6", linewidth=1)
        right.set_title(f"MCA on {about['on'].split(',')[0]}", fontsize="medium")
    left.set_title("losses on the training images", fontsize="medium")
    left.legend(fontsize="small")
    left.set_ylim(bottom=0)
    right.set_ylabel("%")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
