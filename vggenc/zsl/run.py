"""A training run: epochs, steps and calibration chosen on validation classes, then an encoder."""

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE

from vggenc.checkpoint import Checkpoint, load
from vggenc.encoder import VGG19Encoder
from vggenc.engines import pick, pick_device
from vggenc.errors import StoreError, UsageError, one_of
from vggenc.options import Options
from vggenc.parts import read_features
from vggenc.zsl.balance import balance_stages, scale_stages
from vggenc.zsl.batches import Grids, cache_grids, check_grid
from vggenc.zsl.data import ZSLData
from vggenc.zsl.evaluation import Predictions, Result, best_calibration, best_steps, evaluate, predict
from vggenc.zsl.recipes import Recipe
from vggenc.zsl.record import FORMAT, GRIDS, RUN, is_first, open_run, read_run, write_json
from vggenc.zsl.training import LAST, History, Training, fit

_PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}
"""And Lightning's names for them."""
_PATIENCE = 3600
"""Seconds that other processes wait for the first one's cached maps."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a run is told besides its recipe.

    Attributes:
        weights: as for `VGG19Encoder`; None for random values, a control.
        backbone: likewise.
        seed: of the heads' values, batches, crops and dropout, and of the classes held out; 0 or more.
        heads_only: train the heads on maps that are computed once; also `fc_layers` that the weights lack.
        paper_selection: choose epoch and step on the unseen classes' test images, as the published code does.
        device: `cpu`, `cuda`, `cuda:1`, or `auto` for a GPU where there is one.
        devices: how many; more than one train with DDP. Under torchrun of no effect: its processes train.
        precision: `fp32` or `bf16` (mixed).
        engine: what computes the cached maps, as in `Options`.
        num_workers: processes that read images; None: one less than there are cores.
        cache: folder of the cached maps, for runs of the same data, weights and size; None: the run's.
        tensorboard: also log for TensorBoard.

    Raises:
        UsageError: a seed, a number of devices or a precision that can't be meant.
    """

    weights: str | None
    backbone: str | None = None
    seed: int = 0
    heads_only: bool = False
    paper_selection: bool = False
    device: str = "auto"
    devices: int = 1
    precision: str = "fp32"
    engine: str = "torch"
    num_workers: int | None = None
    cache: str | os.PathLike[str] | None = None
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise UsageError(f"seed must be 0 to {2**32 - 1}; got {self.seed}")
        if self.devices < 1:
            raise UsageError(f"devices must be 1 or more; got {self.devices}")
        if self.precision not in _PRECISIONS:
            raise one_of("precision", self.precision, _PRECISIONS)


def train(data: ZSLData, output: str | os.PathLike[str], recipe: Recipe, setup: Setup) -> dict[str, Any]:
    """Train LFGAA on the seen classes of a split, and write the encoder to a folder; a stopped run goes on.

    First a third of the seen classes is held out (`ZSLData.hold_out`): after each epoch the rest's encoder is
    evaluated on them. Of the epochs after the last fall of the learning rates the one with the best CZSL MCA,
    averaged over the ways of inference, decides how many epochs there will be, and the steps of
    self-adaptation and the calibration are those that did best then. Then an encoder is trained for as many
    epochs on all seen classes. With `paper_selection` there is one training, evaluated on the unseen classes
    after each epoch, and the best of them is kept.

    Returns:
        What `run.json` in the folder holds; `selection` among it.

    Raises:
        UsageError: a folder with other files, a run with other settings, a device or engine that isn't here.
        DataError: an image that can't be read, or too few seen classes to hold some out.
        StoreError: a folder that another process writes, or that can't be written.
    """
    folder = Path(output)
    checkpoint = None if setup.weights is None else load(setup.weights, setup.backbone)
    if setup.heads_only:
        has_fc = checkpoint is not None and "fc_layers" in checkpoint.trained
        recipe = replace(recipe, freeze="fc7" if has_fc else "conv5_4")
    facts = _facts(data, recipe, setup, checkpoint)
    device = pick_device(setup.device)
    if device.type == "cuda" and device.index is None:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    options = Options(
        image_size=recipe.image_size,
        engine=setup.engine,
        num_workers=setup.num_workers,
        allow_untrained=True,
    )
    if setup.heads_only:
        pick(options, device)
        check_grid(options)
    if not setup.paper_selection:
        data.hold_out(setup.seed)  # what can't be held out is told before anything is written
    first = is_first()
    lock = FileLock(folder / ".vggenc-lock", timeout=0)
    if first:
        open_run(folder, facts, lock)
    try:
        return _Run(folder, data, recipe, setup, facts, first, device, options)()
    finally:
        if first:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()


class _Run:
    def __init__(
        self,
        folder: Path,
        data: ZSLData,
        recipe: Recipe,
        setup: Setup,
        facts: dict[str, Any],
        first: bool,
        device: torch.device,
        options: Options,
    ) -> None:
        self.folder, self.data, self.recipe, self.setup, self.facts = folder, data, recipe, setup, facts
        self.first, self.device, self.options = first, device, options
        self.scales: dict[str, int] | None = None
        self.grids = self._cached() if setup.heads_only else None

    def __call__(self) -> dict[str, Any]:
        selection = read_run(self.folder)["selection"] if (self.folder / RUN).exists() else None
        if selection is None:
            selection = self._train_as_published() if self.setup.paper_selection else self._select()
            self._write(selection)
        if not (self.folder / SAFETENSORS_SINGLE_FILE).exists():
            encoder = self._encoder()
            self._fit(encoder, self.data, "training", selection["epochs"])
            self._save(encoder)
        if self.first:
            # Gigabytes that nobody needs any more, and what a kill left.
            for pattern in (f"*/{LAST}", f".{SAFETENSORS_SINGLE_FILE}.*", f".{RUN}*"):
                for file in self.folder.glob(pattern):
                    file.unlink()
        return {**self.facts, "selection": selection}

    def _save(self, encoder: VGG19Encoder) -> None:
        if self.first:
            encoder.mark_trained()
            encoder.save_pretrained(self.folder)

    def _select(self) -> dict[str, Any]:
        split = self.data.hold_out(self.setup.seed)
        encoder = self._encoder()

        def watch(_: int) -> dict[str, Any]:
            predictions = self._predict(encoder, split)
            results = evaluate(split, predictions)
            return {
                "mca": float(np.mean([_best_mca(result) for result in results.values()])),
                "calibration": best_calibration(split, predictions),
                "results": results,
            }

        history = self._fit(encoder, split, "selection", self.recipe.epochs, watch)
        # Before the last fall of the rates an epoch's accuracy is mostly noise, and so would be the choice.
        settled = [row for row in history if row["epoch"] >= self.recipe.last_fall]
        best = max(settled, key=lambda row: float(row["mca"]))
        return {
            "on": "seen classes held out for validation",
            "classes": [split.classes[i] for i in split.unseen],
            "epochs": best["epoch"] + 1,
            "mca": best["mca"],
            "calibration": best["calibration"],
            "steps": best_steps(best["results"]),
        }

    def _train_as_published(self) -> dict[str, Any]:
        encoder = self._encoder()

        def watch(epoch: int) -> dict[str, Any]:
            results = evaluate(self.data, self._predict(encoder, self.data))
            mca = max(map(_best_mca, results.values()))
            so_far = max((row["mca"] for row in module.history), default=-1.0)
            if mca > so_far:
                self._save(encoder)
            return {"mca": mca, "results": results}

        module = self._module(encoder, self.data, watch)
        history = self._fit_module(module, "training", self.recipe.epochs)
        best = max(history, key=lambda row: float(row["mca"]))
        return {
            "on": "TEST images of unseen classes, as published",
            "classes": [self.data.classes[i] for i in self.data.unseen],
            "epochs": best["epoch"] + 1,
            "mca": best["mca"],
            "calibration": 0.0,
            "steps": best_steps(best["results"]),
        }

    def _encoder(self) -> VGG19Encoder:
        """What each phase begins with, the same each time."""
        torch.manual_seed(self.setup.seed)
        backbone = None if self.setup.weights is not None else self.setup.backbone
        encoder = VGG19Encoder(
            self.data.k,
            backbone=backbone,
            weights=None if self.setup.weights is None else load(self.setup.weights, self.setup.backbone),
        )
        encoder.to(self.device)
        if self.scales is None:
            self.scales = balance_stages(encoder, self.data, self.options)
        else:
            scale_stages(encoder, self.scales)
        if self.recipe.freeze:
            encoder.freeze(self.recipe.freeze)
        return encoder

    def _module(
        self, encoder: VGG19Encoder, split: ZSLData, watch: Callable[[int], dict[str, Any]] | None
    ) -> Training:
        workers = self.setup.num_workers
        return Training(
            encoder,
            split,
            self.recipe,
            seed=self.setup.seed,
            grids=self.grids,
            num_workers=max(0, (os.cpu_count() or 1) - 1) if workers is None else workers,
            watch=watch,
        )

    def _fit_module(self, module: Training, phase: str, epochs: int) -> History:
        return fit(
            module,
            self.folder / phase,
            epochs=epochs,
            title=phase,
            device=self.device,
            devices=self.setup.devices,
            precision=_PRECISIONS[self.setup.precision],
            tensorboard=self.setup.tensorboard,
        )

    def _fit(
        self,
        encoder: VGG19Encoder,
        split: ZSLData,
        phase: str,
        epochs: int,
        watch: Callable[[int], dict[str, Any]] | None = None,
    ) -> History:
        return self._fit_module(self._module(encoder, split, watch), phase, epochs)

    def _predict(self, encoder: VGG19Encoder, split: ZSLData) -> Predictions:
        which = np.concatenate([split.trainval, split.test_seen, split.test_unseen])
        return predict(encoder, split, which, grids=self.grids, options=self.options)

    def _cached(self) -> Grids:
        folder = Path(self.setup.cache) if self.setup.cache else self.folder / GRIDS
        if self.first:
            everything = self.data.images(np.arange(len(self.data.paths)))
            try:
                cache_grids(self._encoder(), everything, folder, self.options)
            except UsageError as error:
                if self.setup.cache:
                    raise UsageError(f"{folder} can't be the cache of this run: {error}") from error
                # From before an image was mended, or with another engine; they are this run's alone.
                cache_grids(self._encoder(), everything, folder, self.options, overwrite=True)
        begun = time.monotonic()
        while not self.first:
            try:
                read_features(folder, ["path"])
                break
            except (UsageError, StoreError):
                if time.monotonic() - begun > _PATIENCE:
                    raise
                time.sleep(1)
        return Grids(folder)

    def _write(self, selection: dict[str, Any]) -> None:
        if self.first:
            write_json(self.folder / RUN, {**self.facts, "selection": selection})


def _best_mca(result: Result) -> float:
    """CZSL MCA of a way of inference, at its best step."""
    czsl = result["czsl"]
    return float(max(czsl.get("by_step", [czsl["mca"]])))


def _facts(data: ZSLData, recipe: Recipe, setup: Setup, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """What decides the result."""
    settings = {
        "weights": checkpoint.name if checkpoint else "random",
        "weights_sha256": checkpoint.sha256 if checkpoint else None,
        "backbone": checkpoint.backbone if checkpoint else setup.backbone,
        "seed": setup.seed,
        "heads_only": setup.heads_only,
        "paper_selection": setup.paper_selection,
        "precision": setup.precision,
        "recipe": asdict(recipe),
        "data": {
            "split": data.split,
            "sha256": data.sha256(),
            "classes": [len(data.seen), len(data.unseen)],
            "images": [len(data.trainval), len(data.test_seen), len(data.test_unseen)],
        },
        "versions": {name: version(name) for name in ("vggenc", "torch", "lightning")},
    }
    grids = os.path.abspath(setup.cache) if setup.cache else GRIDS
    return {
        "format": FORMAT,
        "settings": settings,
        "grids": grids if setup.heads_only else None,
        # Of no effect but to be read.
        "data": {"folder": os.path.abspath(data.folder), "images": os.path.abspath(data.root)},
    }
