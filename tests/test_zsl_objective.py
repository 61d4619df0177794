import math

import pytest
import torch

from vggenc.encoder import EncoderOutput
from vggenc.zsl.objective import Objective


def output(attributes, latent) -> EncoderOutput:
    leaves = (torch.as_tensor(x, dtype=torch.float32).clone().requires_grad_() for x in (attributes, latent))
    return EncoderOutput(*leaves)


def random(images, classes=3, k=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, k, generator=generator) for n in (images, images, classes)]


def plain_triplets(latent, labels):
    """The batch-hard triplet loss of Hermans et al. (2017), in loops."""
    losses = []
    for i, a in enumerate(latent):
        far = [math.dist(a, b) for j, b in enumerate(latent) if labels[j] == labels[i] and j != i]
        near = [math.dist(a, b) for j, b in enumerate(latent) if labels[j] != labels[i]]
        if far and near:
            losses.append(max(max(far) - min(near) + 1, 0))
    return sum(losses) / len(losses) if losses else 0.0


def plain_cross_entropy(predicted, labels, attributes):
    losses = []
    for row, label in zip(predicted, labels, strict=True):
        logits = [sum(x * y for x, y in zip(row, prototype, strict=True)) for prototype in attributes]
        losses.append(math.log(sum(math.exp(x) for x in logits)) - logits[label])
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    "labels",
    [[0, 0, 0, 1, 1, 1, 2, 2], [0, 1, 1, 1, 0, 1, 2, 1], [2, 0, 1, 0, 2, 2, 0, 0], [0, 1] * 16],
    ids=["in order", "one image of a class", "mixed", "32 images"],
)
@pytest.mark.parametrize("scale", [0.3, 3])
def test_losses_are_those_of_a_plain_loop(labels, scale):
    predicted, latent, attributes = random(len(labels))
    latent = latent * scale
    losses = Objective(attributes, 5.0)(output(predicted, latent), torch.tensor(labels))
    triplet = plain_triplets(latent.tolist(), labels)
    entropy = plain_cross_entropy(predicted.tolist(), labels, attributes.tolist())
    assert losses.latent.item() == pytest.approx(triplet, rel=1e-4)
    assert losses.attribute.item() == pytest.approx(entropy, rel=1e-4)
    assert losses.total.item() == pytest.approx(triplet + 5 * entropy, rel=1e-4)


def test_a_right_triangle_and_undecided_attributes_are_worth_1_and_beta_times_log_2():
    # Anchor (0, 0): 4 - 3 + 1 = 2. Anchor (4, 0): 4 - 5 + 1 = 0, which counts. Anchor (0, 3) has no positive.
    given = output(torch.zeros(3, 2), [[0, 0], [4, 0], [0, 3]])
    losses = Objective(torch.eye(2), 3.0)(given, torch.tensor([0, 0, 1]))
    assert losses.latent.item() == pytest.approx(1)
    assert losses.attribute.item() == pytest.approx(math.log(2))
    assert losses.total.item() == pytest.approx(1 + 3 * math.log(2))


@pytest.mark.parametrize(
    ("labels", "latent", "expected"),
    [
        ([1, 1, 1, 1], None, 0),  # nothing negative
        ([0, 1, 2, 3], None, 0),  # nothing positive
        ([2], None, 0),
        ([0, 0, 1, 1], torch.ones(4, 4), 1),  # all at distance 0: the margin
        ([0, 0, 1, 1], torch.zeros(4, 4), 1),
        ([0, 0, 1, 1] * 8, torch.full((32, 4), 7.1), 1),
        ([0, 0, 1, 1], torch.tensor([[0.0] * 4, [0.0] * 4, [9.0] * 4, [9.0] * 4]), 0),  # well apart
    ],
    ids=["one class", "one image a class", "one image", "identical", "zeros", "32 identical", "apart"],
)
def test_degenerate_batches_have_the_loss_of_the_definition_and_finite_gradients(labels, latent, expected):
    predicted, drawn, attributes = random(len(labels), classes=4)
    given = output(predicted, drawn if latent is None else latent)
    losses = Objective(attributes, 1.0)(given, torch.tensor(labels))
    losses.total.backward()
    assert losses.latent.item() == pytest.approx(expected)
    assert torch.isfinite(given.latent.grad).all()
    assert torch.isfinite(given.attributes.grad).all()
    assert given.attributes.grad.any()


def test_all_zero_is_worth_the_margin_and_log_of_the_number_of_classes():
    given = output(torch.zeros(4, 5), torch.zeros(4, 5))
    losses = Objective(torch.zeros(3, 5), 1.0)(given, torch.tensor([0, 0, 1, 1]))
    losses.total.backward()
    assert losses.total.item() == pytest.approx(1 + math.log(3))
    assert torch.isfinite(given.latent.grad).all()
    assert not given.attributes.grad.any()


def test_each_loss_teaches_its_own_output_and_beta_weighs_the_attributes():
    predicted, latent, attributes = random(6)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    gradients = []
    for beta in (1.0, 5.0):
        given = output(predicted, latent)
        Objective(attributes, beta)(given, labels).total.backward()
        gradients.append((given.attributes.grad, given.latent.grad))
    torch.testing.assert_close(gradients[1][0], 5 * gradients[0][0])
    torch.testing.assert_close(gradients[1][1], gradients[0][1])
    assert gradients[0][0].any()
    assert gradients[0][1].any()


def test_a_step_along_the_gradient_lowers_the_total():
    predicted, latent, attributes = random(8)
    labels, objective = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2]), Objective(attributes, 1.0)
    given = output(predicted, latent)
    before = objective(given, labels).total
    before.backward()
    after = objective(output(*(x.detach() - 0.01 * x.grad for x in given)), labels).total
    assert after < before


def test_half_precision_outputs_are_computed_in_float32():
    predicted, latent, attributes = random(6)
    labels, objective = torch.tensor([0, 0, 1, 1, 2, 2]), Objective(attributes, 1.0)
    half = [x.bfloat16() for x in (predicted, latent)]
    losses = objective(EncoderOutput(*half), labels)
    assert {loss.dtype for loss in losses} == {torch.float32}
    torch.testing.assert_close(losses, objective(EncoderOutput(*(x.float() for x in half)), labels))


def test_attributes_are_no_weights_to_train_or_save():
    objective = Objective(torch.eye(2), 1.0)
    assert not list(objective.parameters())
    assert not objective.state_dict()


def test_alignment_is_one_minus_the_mean_cosine_with_what_sets_the_own_class_apart():
    classes = torch.tensor([[12.0, 50.0], [10.0, 50.0]])  # apart from their mean by (1, 0) and (-1, 0)
    output = EncoderOutput(torch.tensor([[3.0, 4.0], [0.0, -1.0]]), torch.zeros(2, 2))
    losses = Objective(classes, beta=0.0, alignment=10.0)(output, torch.tensor([0, 1]))
    assert losses.alignment.item() == pytest.approx(1 - (0.6 - 0.0) / 2)
    assert losses.total.item() == pytest.approx(10 * losses.alignment.item())
