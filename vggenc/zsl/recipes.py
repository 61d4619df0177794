"""How LFGAA is trained on each data set, as published (Liu et al., ICCV 2019)."""

from dataclasses import dataclass

from vggenc.errors import UsageError

PER_CLASS = 4
"""Images of each class in a batch, so that the latent triplets have positives."""
CLIP = 5.0
"""Largest norm of the gradient."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a training run is told.

    Attributes:
        epochs: passes over the training images.
        backbone_lr: learning rate of Adam for the stages.
        fc_lr: for `fc_layers` and `fc4`, whose many inputs make each step a long one.
        head_lr: for the other heads.
        beta: weight of the attribute cross-entropy beside the latent triplets.
        alignment: weight of an addition to LFGAA's loss; see `vggenc.zsl.Objective`.
        batch_size: images in a step, a multiple of 4; fewer where there are too few classes for 4 of each.
        decay_every: epochs after which the rates fall to a tenth; None: never.
        freeze: the deepest stage that doesn't train; None: all train.
        image_size: side of the square seen, in pixels.
        augment: cut out random squares and mirror half of them; of no effect on cached maps.

    Raises:
        UsageError: a value out of range.
    """

    epochs: int = 15
    backbone_lr: float = 1e-5
    fc_lr: float = 1e-5
    head_lr: float = 1e-5
    beta: float = 1.0
    alignment: float = 0.0
    batch_size: int = 32
    decay_every: int | None = None
    freeze: str | None = None
    image_size: int = 224
    augment: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.epochs <= 10_000:
            raise UsageError(f"epochs must be 1 to 10000; got {self.epochs}")
        if self.batch_size < PER_CLASS or self.batch_size % PER_CLASS:
            raise UsageError(f"batch_size must be a multiple of {PER_CLASS}; got {self.batch_size}")
        if self.decay_every is not None and self.decay_every < 1:
            raise UsageError(f"decay_every must be 1 or more; got {self.decay_every}")
        if not min(self.backbone_lr, self.fc_lr, self.head_lr, self.beta, self.alignment) >= 0:
            raise UsageError("learning rates, beta and alignment must be 0 or more")

    @property
    def last_fall(self) -> int:
        """Epochs before the last fall of the rates; 0 where they never fall."""
        return (self.epochs - 1) // self.decay_every * self.decay_every if self.decay_every else 0


def _published(lr: float = 1e-5, **others: float) -> Recipe:
    return Recipe(backbone_lr=lr, fc_lr=lr, head_lr=lr, **others)  # type: ignore[arg-type]


RECIPES = {
    "awa2-ss": _published(),
    "awa2-ps": _published(beta=5, batch_size=24),
    "cub-ss": _published(),
    "cub-ps": _published(3e-5, beta=5),
    "sun-ss": _published(epochs=20),
    "sun-ps": _published(5e-5, batch_size=24, decay_every=10),
}
"""By data set and split."""
PUBLISHED_BY_K = {85: "awa2", 312: "cub", 102: "sun"}
"""Which data set has how many attributes."""
HEADS = Recipe(epochs=5, backbone_lr=0, fc_lr=1e-4, head_lr=1e-3, alignment=10, decay_every=3)
"""For heads on cached features, which begin far from where a whole network does."""
