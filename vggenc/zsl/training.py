"""One phase of training: batches in, an encoder out, with a checkpoint after every epoch."""

import csv
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vggenc.encoder import EncoderOutput, VGG19Encoder
from vggenc.errors import DataError, VggencError
from vggenc.loading import init_worker
from vggenc.progress import progress_bar
from vggenc.whole import whole_file
from vggenc.zsl.batches import Batch, ClassBalanced, GridBatches, Grids, ImageBatches
from vggenc.zsl.data import ZSLData
from vggenc.zsl.objective import Objective
from vggenc.zsl.recipes import CLIP, Recipe

LAST = "last.ckpt"
LOSSES = ("loss", "attribute_loss", "latent_loss", "alignment_loss")
History = list[dict[str, Any]]
"""A row an epoch: `epoch`, the mean losses, and what was evaluated after it."""


class GlobalBatchNorm1d(nn.BatchNorm1d):
    """Batch norm over the batches of all processes, on any device; elsewhere as usual.

    PyTorch's own `SyncBatchNorm` needs a GPU.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `(N, k)`."""
        if not (self.training and _world() > 1):
            return super().forward(x)
        own = slice(_rank() * len(x), (_rank() + 1) * len(x))
        return super().forward(gathered(x))[own]


class _Gather(torch.autograd.Function):
    """The rows of all processes; the gradient of a process's own rows is the sum over all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """From `(n, ...)` to `(world * n, ...)`."""
        pieces = [torch.empty_like(x) for _ in range(_world())]
        torch.distributed.all_gather(pieces, x)
        return torch.cat(pieces)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """From `(world * n, ...)` to `(n, ...)`."""
        gradient = gradient.clone()
        torch.distributed.all_reduce(gradient)
        return gradient.chunk(_world())[_rank()]


def gathered(x: Tensor) -> Tensor:
    """The rows of all processes in their order; gradients flow back to where they came from."""
    if _world() == 1:
        return x
    rows: Tensor = _Gather.apply(x.contiguous())
    return rows


def _world() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


class Training(lightning.LightningModule):
    """LFGAA's training of an encoder on the seen classes of a split.

    Every epoch is drawn by the seed and its own number, so that a run that was stopped goes on as if it
    hadn't been. With several processes the losses are those of the whole batch.

    Args:
        encoder: trained in place.
        data: the split.
        recipe: how.
        seed: of batches, crops and dropout.
        grids: cached maps of all images of `data`; None: the images are read, and augmented.
        num_workers: processes that read them.
        watch: called after each epoch in the first process, for what it finds worth a row of the history.
    """

    def __init__(
        self,
        encoder: VGG19Encoder,
        data: ZSLData,
        recipe: Recipe,
        *,
        seed: int,
        grids: Grids | None = None,
        num_workers: int = 0,
        watch: Callable[[int], dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.objective = Objective(
            torch.from_numpy(data.attributes[data.seen]), recipe.beta, recipe.alignment
        )
        self.history: History = []
        self._data, self._recipe, self._seed = data, recipe, seed
        self._grids, self._num_workers, self._watch = grids, num_workers, watch
        self._losses: list[Tensor] = []
        for name in ("bn1", "bn2"):
            norm = GlobalBatchNorm1d(encoder.k)
            norm.load_state_dict(getattr(encoder, name).state_dict())
            setattr(encoder, name, norm)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Batches of the training images."""
        data = self._data
        labels = np.searchsorted(data.seen, data.labels[data.trainval])
        batches = ClassBalanced(
            labels, self._recipe.batch_size, seed=self._seed, rank=_rank(), world=_world()
        )
        dataset: GridBatches | ImageBatches
        if self._grids is not None:
            dataset = GridBatches(self._grids, data.trainval, labels)
        else:
            preprocess = self.encoder.preprocess.at(self._recipe.image_size)
            dataset = ImageBatches(
                data.images(data.trainval), labels, preprocess, seed=self._seed, augment=self._recipe.augment
            )
        workers = 0 if self._grids is not None else self._num_workers
        start = {"worker_init_fn": init_worker(), "persistent_workers": True} if workers else {}
        return DataLoader(dataset, sampler=batches, batch_size=None, num_workers=workers, **start)  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        """Adam, with the rates of the recipe."""
        recipe = self._recipe
        groups = self.encoder.param_groups(
            backbone_lr=recipe.backbone_lr, fc_lr=recipe.fc_lr, head_lr=recipe.head_lr
        )
        # Unfused, a step takes longer than the gradients on a CPU.
        optimizer = torch.optim.Adam(groups, fused=True)
        if recipe.decay_every is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, recipe.decay_every)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}

    def training_step(self, batch: Batch, index: int) -> Tensor:
        """The loss of a batch, over all processes."""
        # Dropout is drawn by the batch's place, whatever else used random numbers before.
        place = np.random.SeedSequence([self._seed, self.current_epoch, index, _rank()])
        torch.manual_seed(int(place.generate_state(1)[0]))
        inputs, labels, failures = batch
        if failures:
            raise DataError(f"{failures[0]} (an image to train on)")
        if isinstance(inputs, list):
            outputs = self.encoder.heads(inputs, {"attributes", "latent"})
            output = EncoderOutput(outputs["attributes"], outputs["latent"])
        else:
            output = self.encoder(self.encoder.preprocess.normalize(inputs))
        output = EncoderOutput(*map(gathered, output))
        losses = self.objective(output, gathered(labels))
        self._losses.append(torch.stack([loss.detach() for loss in losses]))
        total: Tensor = losses.total
        return total

    def on_train_epoch_end(self) -> None:
        """Write a row of the history."""
        means = torch.stack(self._losses).mean(0).tolist()
        self._losses.clear()
        if not np.isfinite(means).all():
            raise VggencError(
                f"the losses of epoch {self.current_epoch + 1} are NaN or infinite; lower rates may help"
            )
        row = {"epoch": self.current_epoch, **dict(zip(LOSSES, means, strict=True))}
        if self._watch is not None:
            found = self._watch(self.current_epoch) if self.trainer.is_global_zero else {}
            row |= self.trainer.strategy.broadcast(found)
        self.history.append(row)
        for name, value in row.items():
            if isinstance(value, float):
                self.log(name, value, rank_zero_only=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the history."""
        checkpoint["history"] = self.history

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up again."""
        self.history = checkpoint["history"]


class _Keeper(Checkpoint):
    """After each epoch and its evaluation: the history as a table; a checkpoint, whole or the last one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        partial = self._folder / f".{LAST}"
        trainer.save_checkpoint(partial)  # by all processes, though the first one writes
        if trainer.is_global_zero:
            assert isinstance(module, Training)
            write_history(self._folder / "history.csv", module.history)
            os.replace(partial, self._folder / LAST)


class _Progress(Callback):
    """A bar on standard error where that is a terminal."""

    def __init__(self, title: str) -> None:
        self._title = title

    def on_train_epoch_start(self, trainer: lightning.Trainer, _: lightning.LightningModule) -> None:
        self._bar = progress_bar(
            int(trainer.num_training_batches),
            shown=trainer.is_global_zero,
            unit="batch",
            desc=f"{self._title}, epoch {trainer.current_epoch + 1}/{trainer.max_epochs}",
        )

    def on_train_batch_end(self, _: lightning.Trainer, module: lightning.LightningModule, *__: Any) -> None:
        assert isinstance(module, Training)
        if not self._bar.disable:
            self._bar.set_postfix(loss=f"{module._losses[-1][0]:.3f}", refresh=False)
        self._bar.update()

    def on_train_epoch_end(self, *_: Any) -> None:
        self._bar.close()


def fit(
    module: Training,
    folder: Path,
    *,
    epochs: int,
    title: str = "training",
    device: torch.device | None = None,
    devices: int = 1,
    precision: str = "32-true",
    tensorboard: bool = False,
) -> History:
    """Train for some epochs in all, going on with what the folder holds.

    Args:
        module: what to train.
        folder: of this phase: `last.ckpt`, `history.csv`.
        epochs: in all.
        title: of the progress bar.
        device: where; None: the CPU.
        devices: how many; more than one train with DDP. Under torchrun of no effect: its processes train.
        precision: Lightning's name for it.
        tensorboard: also log for TensorBoard.

    Raises:
        DataError: an image that can't be read.
        VggencError: losses that become NaN or infinite.
    """
    device = device or torch.device("cpu")
    nodes = 1
    if torch.distributed.is_torchelastic_launched():
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    several = devices * nodes > 1
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        warnings.filterwarnings("ignore", ".*`isinstance\\(treespec, LeafSpec\\)`.*")
        trainer = lightning.Trainer(
            accelerator=device.type,
            devices=devices if device.index is None or several else [device.index],
            num_nodes=nodes,
            strategy="ddp" if several else "auto",
            precision=precision,  # type: ignore[arg-type]
            max_epochs=epochs,
            gradient_clip_val=CLIP,
            callbacks=[_Keeper(folder), _Progress(title)],
            logger=TensorBoardLogger(folder, name="", version="tensorboard") if tensorboard else False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            sync_batchnorm=several and device.type != "cpu",
            log_every_n_steps=10,
        )
        last = folder / LAST
        trainer.fit(module, ckpt_path=last if last.exists() else None, weights_only=True)
    return module.history


def write_history(file: Path, history: History) -> None:
    """Write the numbers of a history as CSV."""
    rows = [{key: value for key, value in row.items() if isinstance(value, (int, float))} for row in history]
    with whole_file(file) as partial, partial.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
