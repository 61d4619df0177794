"""A bar with rate and remaining time on standard error, where that is a terminal."""

import shutil
from typing import Any

from tqdm import tqdm


def progress_bar(total: int, *, shown: bool, unit: str = "img", **options: Any) -> Any:
    """A bar of tqdm, which a context closes; without a terminal, or with `shown=False`, it shows nothing."""
    width = shutil.get_terminal_size().columns  # also where a terminal says that it has none
    return tqdm(total=total, unit=unit, ncols=width, disable=None if shown else True, **options)
