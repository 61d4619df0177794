"""What a feature run can be told. Free of torch, so that help texts are quick."""

from collections.abc import Iterable
from dataclasses import dataclass

from vggenc.errors import UsageError, one_of
from vggenc.stages import OUTPUTS, STAGE_NAMES

DEFAULT_WEIGHTS = "IMAGENET1K_V1"
POOLS = ("avg", "max", "grid", "none")
# Arithmetic -> the engines that have it, the fastest on CPUs first (measured by `vggenc benchmark`).
ENGINES = {
    "fp32": ("ncnn", "openvino", "torch"),
    "bf16": ("openvino", "ncnn", "torch"),
    "fp16": ("torch",),
    "int8": ("openvino",),
}
ENGINE_NAMES = ("torch", "ncnn", "openvino", "auto")
PRECISIONS = (*ENGINES, "auto")
DTYPES = ("float32", "float16")
CLUSTER_DEVICES = ("auto", "cuda", "cpu")
MAX_K = 100_000
"""Attributes: more would take gigabytes for one layer."""
MIN_SIZE = 32
"""Pixels: below it VGG19's five poolings leave nothing."""
MAX_PIXELS = 1024**3 // 4 // 3
"""Pillow's own limit for an image that may be a decompression bomb."""
RANGES = {
    "image_size": (MIN_SIZE, 8192),
    "batch_size": (1, 65_536),
    "part_size": (1, 1_000_000),
    "num_workers": (0, 1024),
    "max_pixels": (1, 2**31),
}
"""The numbers that options can have, both ends included."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """How features are computed and written; the command line has an option for each field.

    Attributes:
        pool: how the map of a stage is handed out: `avg` or `max` for one vector, `grid` for what the heads
            see of it (larger maps are max-pooled to 14x14 cells), `none` for the whole map.
        image_size: side in pixels of the square the encoder sees, 32 or more; None: what the weights expect
            (224). The shorter side is resized to 256/224 of it, as for the weights' own size.
        engine: what computes: `torch`, `ncnn`, `openvino` (the latter two are extras, for CPUs), or `auto`
            for the fastest installed one that has the precision.
        precision: arithmetic: `fp32`, `bf16`, `fp16` (torch), `int8` (openvino, calibrated on a sample of the
            images first), or `auto`: bf16 where the hardware has it, else fp32.
        compile: let `torch.compile` work on the engine torch; a minute's start for long runs.
        dtype: how values are handed out and written: `float32` or `float16`.
        batch_size: images computed at a time; it changes values by rounding only.
        part_size: rows in one part on disk; None: 256, or 32 with maps.
        num_workers: processes that decode images; None: one less than there are cores, 0: decode in this
            process.
        full_decode: decode JPEGs at their full size, as torchvision's pipeline does. Otherwise those whose
            shorter side is at least four times what it is resized to are decoded at a half, a quarter or an
            eighth, never to less than twice: much quicker, and under 1/255 away in the mean.
        max_pixels: a larger image (width x height) becomes a failed row.
        allow_untrained: hand out features of layers that were never trained.

    Raises:
        UsageError: a value out of range; the message names it and what is allowed.
    """

    pool: str = "avg"
    image_size: int | None = None
    engine: str = "torch"
    precision: str = "fp32"
    compile: bool = False
    dtype: str = "float32"
    batch_size: int = 32
    part_size: int | None = None
    num_workers: int | None = None
    full_decode: bool = False
    max_pixels: int = MAX_PIXELS
    allow_untrained: bool = False

    def __post_init__(self) -> None:
        choices = {"pool": POOLS, "engine": ENGINE_NAMES, "precision": PRECISIONS, "dtype": DTYPES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise one_of(name, getattr(self, name), allowed)
        if "auto" not in (self.engine, self.precision) and self.engine not in ENGINES[self.precision]:
            able = [precision for precision, engines in ENGINES.items() if self.engine in engines]
            raise one_of(f"precision of the engine {self.engine}", self.precision, able)
        if self.compile and self.engine != "torch":
            raise UsageError(f"compile goes with the engine torch, not with {self.engine!r}")
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            optional = type(self).__dataclass_fields__[name].default is None
            if value is None and optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise UsageError(f"{name} must be a whole number from {least} to {most}; got {value!r}")

    @property
    def rows_per_part(self) -> int:
        """Rows in one part on disk, with the default resolved."""
        return self.part_size or (256 if self.pool in ("avg", "max") else 32)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A Ray cluster that computes instead of this process (extra `ray`).

    Attributes:
        address: of its head, `host:port`; `auto` for the cluster this machine belongs to (or `$RAY_ADDRESS`),
            and where there is none, one that is started here for the run.
        workers: how many compute at once; None: as many as there is room for. On GPUs a worker has one, on
            CPUs all cores of the smallest node but one, which decodes.
        device: what computes: `cuda`, `cpu`, or `auto` for GPUs where the cluster has any.

    Raises:
        UsageError: no such device, fewer than one worker, or an address of Ray's client.
    """

    address: str = "auto"
    workers: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.device not in CLUSTER_DEVICES:
            raise one_of("device of a cluster", self.device, CLUSTER_DEVICES)
        if self.address.startswith("ray://"):
            raise UsageError(
                "Ray Data doesn't go through ray://; run the command on the cluster: ray job submit"
            )
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"workers must be 1 or more; got {self.workers}")


def check_outputs(outputs: Iterable[str] = STAGE_NAMES) -> tuple[str, ...]:
    """The names of `outputs`, once each and in the order given.

    Raises:
        UsageError: an unknown name, none at all, or a bare string.
    """
    if isinstance(outputs, str):
        raise UsageError(f"outputs must be a list of names, such as [{outputs!r}]; got a string")
    names = tuple(dict.fromkeys(outputs))
    for name in names:
        if name not in OUTPUTS:
            raise one_of("an output", name, OUTPUTS)
    if not names:
        raise UsageError(f"no outputs asked for; there are {', '.join(OUTPUTS)}")
    return names
