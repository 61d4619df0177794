"""Training a backbone: what is frozen, what is computed twice, which parameters learn how fast."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from vggenc.errors import UsageError, one_of
from vggenc.stages import MODULES, OUTPUTS, STAGE_NAMES


class FineTuning(nn.Module):
    """What `VGG19Encoder` offers to a training loop; it speaks of the modules of the stage table."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen: tuple[str, ...] = ()
        """Names of the modules that don't train."""
        self.grad_checkpointing = False

    def freeze(self, upto: str = STAGE_NAMES[-1]) -> None:
        """Stop training the stages up to and with `upto`, batch-norm statistics included.

        It survives `.train()`; `unfreeze()` ends it.

        Args:
            upto: a stage's name, or `"fc7"` for all stages and `fc_layers`.

        Raises:
            UsageError: another name.
        """
        if upto not in (*STAGE_NAMES, "fc7"):
            raise one_of("upto", upto, (*STAGE_NAMES, "fc7"))
        self.frozen = max(self.frozen, OUTPUTS[upto], key=len)
        for name in self.frozen:
            getattr(self, name).requires_grad_(False).eval()

    def unfreeze(self) -> None:
        """Train everything again."""
        self.frozen = ()
        self.requires_grad_(True).train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode as in any module, save that frozen stages stay in evaluation mode."""
        super().train(mode)
        for name in self.frozen:
            getattr(self, name).eval()
        return self

    def param_groups(
        self,
        *,
        backbone_lr: float,
        head_lr: float,
        fc_lr: float | None = None,
        layer_decay: float | None = None,
    ) -> list[dict[str, Any]]:
        """Groups of the trainable parameters for an optimizer, batch norm and biases without weight decay.

        Args:
            backbone_lr: learning rate of the stages.
            head_lr: learning rate of the heads, which begin untrained.
            fc_lr: learning rate of `fc_layers` and `fc4`; None: `backbone_lr` and `head_lr`.
            layer_decay: factor from each stage to the one before it; conv5_4 has `backbone_lr`. None: 1.

        Raises:
            UsageError: a `layer_decay` that isn't above 0 and up to 1.
        """
        decay = 1.0 if layer_decay is None else layer_decay
        if not 0 < decay <= 1:
            raise UsageError(f"layer_decay must be above 0, up to 1; got {layer_decay!r}")
        rates = {name: backbone_lr * decay**i for i, name in enumerate(reversed(STAGE_NAMES))}
        rates["fc_layers"] = backbone_lr if fc_lr is None else fc_lr
        in_backbone = tuple(rates)
        if fc_lr is not None:
            rates["fc4"] = fc_lr
        parts: dict[tuple[str, float], list[nn.Parameter]] = {}
        for name in MODULES:
            part = "backbone" if name in in_backbone else "head"
            own = parts.setdefault((part, rates.get(name, head_lr)), [])
            own += [p for p in getattr(self, name).parameters() if p.requires_grad]
        groups = []
        for (part, lr), own in parts.items():
            flat = [p for p in own if p.ndim <= 1]
            groups.append({"name": part, "params": [p for p in own if p.ndim > 1], "lr": lr})
            groups.append({"name": f"{part}, no decay", "params": flat, "lr": lr, "weight_decay": 0.0})
        return [group for group in groups if group["params"]]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: each stage is computed again in the backward pass.

        Gradients and batch-norm statistics stay what they are without it.
        """
        self.grad_checkpointing = enable

    def checkpointed(self, stage: nn.Module, x: Tensor) -> Tensor:
        """Apply a stage, keeping only its input for the backward pass."""
        if torch.compiler.is_compiling():  # which traces the statistics' updates, and repeats none
            result: Tensor = checkpoint(stage, x, use_reentrant=False)
        elif torch.is_grad_enabled():
            result = checkpoint(stage, x, use_reentrant=False, context_fn=partial(_contexts, stage))
        else:
            result = stage(x)
        return result


def _contexts(stage: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the first and the second computation of a checkpointed stage."""
    return nullcontext(), _frozen_statistics(stage)


@contextmanager
def _frozen_statistics(stage: nn.Module) -> Iterator[None]:
    """Keep batch norm from counting a batch twice when a checkpointed stage is computed again."""
    norms = [layer for layer in stage.modules() if isinstance(layer, nn.BatchNorm2d)]
    statistics = [dict(norm.named_buffers()) for norm in norms]
    for norm, kept in zip(norms, statistics, strict=True):
        for name, value in kept.items():
            setattr(norm, name, value.clone())
    try:
        yield
    finally:
        for norm, kept in zip(norms, statistics, strict=True):
            for name, value in kept.items():
                setattr(norm, name, value)
