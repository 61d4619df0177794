"""What LFGAA is trained for (Liu et al., ICCV 2019)."""

from typing import NamedTuple

from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import BatchHardMiner
from pytorch_metric_learning.reducers import MeanReducer
from torch import Tensor, nn
from torch.nn import functional as F

from vggenc.encoder import EncoderOutput

MARGIN = 1.0


class Losses(NamedTuple):
    """Means over a batch."""

    total: Tensor
    attribute: Tensor
    latent: Tensor
    alignment: Tensor


class Objective(nn.Module):
    """Batch-hard triplets on the latent vectors, and cross-entropy of the attributes over the seen classes.

    Args:
        attributes: `(seen classes, k)`, not normalised: the logits are their products with the predictions.
        beta: weight of the cross-entropy.
        alignment: weight of 1 - cosine of the predicted attributes with what sets the class's apart from the
            mean of all classes. LFGAA has no such term: cross-entropy over few classes leaves most directions
            of the attributes to chance, in which unseen classes differ too.
    """

    def __init__(self, attributes: Tensor, beta: float, alignment: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("attributes", attributes, persistent=False)
        self.register_buffer("apart", attributes - attributes.mean(0), persistent=False)
        self.beta, self.alignment = beta, alignment
        distance = LpDistance(normalize_embeddings=False)
        self._miner = BatchHardMiner(distance=distance)
        self._triplet = TripletMarginLoss(margin=MARGIN, distance=distance, reducer=MeanReducer())

    def forward(self, output: EncoderOutput, labels: Tensor) -> Losses:
        """The losses of a batch.

        Args:
            output: of N images.
            labels: `(N,)`, rows of the seen classes.
        """
        assert isinstance(self.attributes, Tensor)
        assert isinstance(self.apart, Tensor)
        attribute = F.cross_entropy(output.attributes.float() @ self.attributes.T, labels)
        latent = output.latent.float()
        triplet = self._triplet(latent, labels, self._miner(latent, labels))
        alignment = 1 - F.cosine_similarity(output.attributes.float(), self.apart[labels]).mean()
        total = triplet + self.beta * attribute + self.alignment * alignment
        return Losses(total, attribute, triplet, alignment)
