"""Zero-shot learning with LFGAA (Liu et al., ICCV 2019), as the extra `zsl`."""

from typing import TYPE_CHECKING

from vggenc.lazy import names_on_demand

if TYPE_CHECKING:
    from vggenc.zsl.data import ZSLData as ZSLData
    from vggenc.zsl.data import load_data as load_data
    from vggenc.zsl.evaluation import Predictions as Predictions
    from vggenc.zsl.evaluation import evaluate as evaluate
    from vggenc.zsl.evaluation import predict as predict
    from vggenc.zsl.inference import combined as combined
    from vggenc.zsl.inference import cosine as cosine
    from vggenc.zsl.inference import latent_prototypes as latent_prototypes
    from vggenc.zsl.inference import self_adaptation as self_adaptation
    from vggenc.zsl.metrics import class_accuracies as class_accuracies
    from vggenc.zsl.metrics import harmonic_mean as harmonic_mean
    from vggenc.zsl.metrics import mean_class_accuracy as mean_class_accuracy
    from vggenc.zsl.objective import Losses as Losses
    from vggenc.zsl.objective import Objective as Objective
    from vggenc.zsl.recipes import RECIPES as RECIPES
    from vggenc.zsl.recipes import Recipe as Recipe
    from vggenc.zsl.report import make_report as make_report
    from vggenc.zsl.run import Setup as Setup
    from vggenc.zsl.run import train as train
    from vggenc.zsl.toy import make_toy as make_toy

__all__, __getattr__ = names_on_demand(
    __name__,
    {
        "data": ["ZSLData", "load_data"],
        "evaluation": ["Predictions", "evaluate", "predict"],
        "inference": ["combined", "cosine", "latent_prototypes", "self_adaptation"],
        "metrics": ["class_accuracies", "harmonic_mean", "mean_class_accuracy"],
        "objective": ["Losses", "Objective"],
        "recipes": ["RECIPES", "Recipe"],
        "report": ["make_report"],
        "run": ["Setup", "train"],
        "toy": ["make_toy"],
    },
)
