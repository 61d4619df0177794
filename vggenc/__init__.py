"""VGG19 multi-level features for PyTorch."""

from typing import TYPE_CHECKING

from vggenc.lazy import names_on_demand

if TYPE_CHECKING:
    from vggenc.compute import FeatureBatch as FeatureBatch
    from vggenc.encoder import EncoderOutput as EncoderOutput
    from vggenc.encoder import VGG19Encoder as VGG19Encoder
    from vggenc.errors import DataError as DataError
    from vggenc.errors import ExportError as ExportError
    from vggenc.errors import ImageError as ImageError
    from vggenc.errors import StoreError as StoreError
    from vggenc.errors import UsageError as UsageError
    from vggenc.errors import VggencError as VggencError
    from vggenc.errors import WeightsError as WeightsError
    from vggenc.export import export_network as export_network
    from vggenc.init import weight_init as weight_init
    from vggenc.options import Cluster as Cluster
    from vggenc.options import Options as Options
    from vggenc.parts import read_features as read_features
    from vggenc.pipeline import Summary as Summary
    from vggenc.pipeline import extract as extract
    from vggenc.pipeline import iter_features as iter_features

__version__ = "0.1.0"

_names, __getattr__ = names_on_demand(
    __name__,
    {
        "compute": ["FeatureBatch"],
        "encoder": ["EncoderOutput", "VGG19Encoder"],
        "errors": [
            "DataError",
            "ExportError",
            "ImageError",
            "StoreError",
            "UsageError",
            "VggencError",
            "WeightsError",
        ],
        "export": ["export_network"],
        "init": ["weight_init"],
        "options": ["Cluster", "Options"],
        "pipeline": ["Summary", "extract", "iter_features"],
        "parts": ["read_features"],
    },
)
__all__ = [*_names, "__version__"]


def __dir__() -> list[str]:
    return __all__
