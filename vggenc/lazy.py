"""Public names that are imported on first use, so that `vggenc --help` doesn't wait for torch."""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def names_on_demand(package: str, public: dict[str, list[str]]) -> tuple[list[str], Callable[[str], Any]]:
    """What a package takes for its `__all__` and `__getattr__`.

    Args:
        package: its name.
        public: names by the module of the package that has them.
    """
    home = {name: module for module, names in public.items() for name in names}

    def get(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f"{package}.{home[name]}"), name)
        setattr(import_module(package), name, value)
        return value

    return sorted(home), get
