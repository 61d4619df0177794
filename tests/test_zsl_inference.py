import math
import warnings

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score

from vggenc.errors import UsageError
from vggenc.zsl.inference import combined, cosine, latent_prototypes, self_adaptation
from vggenc.zsl.metrics import class_accuracies, harmonic_mean, mean_class_accuracy

RNG = np.random.default_rng(0)
ATTRIBUTES, LATENT = RNG.normal(size=(40, 6)), 2 * RNG.normal(size=(40, 6))
PROTOTYPES = RNG.uniform(0, 100, (5, 6))


# The method once more, in loops over plain lists.


def normed(v):
    length = math.sqrt(sum(x * x for x in v))
    return [x / length if length else 0.0 for x in v]


def cos(a, b):
    return sum(x * y for x, y in zip(normed(a), normed(b), strict=True))


def mean(vectors):
    return [sum(column) / len(vectors) for column in zip(*vectors, strict=True)]


def both_scores(attributes, latent, prototypes, latent_prototypes, metric):
    scores = []
    for a, v in zip(attributes, latent, strict=True):
        by_attributes = [cos(a, p) for p in prototypes]
        if metric == "cosine":
            by_latent = [cos(v, p) for p in latent_prototypes]
        else:
            by_latent = [
                1 / (1 + sum((x - y) ** 2 for x, y in zip(v, p, strict=True))) for p in latent_prototypes
            ]
            by_attributes, by_latent = normed(by_attributes), normed(by_latent)
        scores.append([x + y for x, y in zip(by_attributes, by_latent, strict=True)])
    return scores


def adapted(attributes, latent, prototypes, metric, bias):
    steps = [[[cos(a, p) + b for p, b in zip(prototypes, bias, strict=True)] for a in attributes]]
    for _ in range(10):
        labels = [row.index(max(row)) for row in steps[-1]]
        new, new_latent = [], []
        for c in range(len(prototypes)):
            members = [i for i, label in enumerate(labels) if label == c] or range(len(labels))
            new.append(mean([normed(attributes[i]) for i in members]))
            new_latent.append(mean([normed(latent[i]) if metric == "cosine" else latent[i] for i in members]))
        scores = both_scores(attributes, latent, new, new_latent, metric)
        steps.append([[x + b for x, b in zip(row, bias, strict=True)] for row in scores])
    return steps


def test_mean_class_accuracy_is_scikit_learns_balanced_accuracy():
    labels = RNG.choice(7, 200, p=[0.4, 0.2, 0.2, 0.1, 0.05, 0.03, 0.02])
    predicted = np.where(RNG.random(200) < 0.5, labels, RNG.choice(7, 200))
    assert set(labels) == set(range(7))
    found = mean_class_accuracy(predicted, labels, 7)
    assert found == pytest.approx(balanced_accuracy_score(labels, predicted), abs=1e-6)


@pytest.mark.parametrize(
    ("predicted", "labels", "expected"),
    [
        ([0, 0, 1, 1, 2], [0, 0, 0, 1, 1], [2 / 3, 1 / 2, np.nan]),  # none of the last class
        ([0, 0, 0], [0, 0, 0], [1, np.nan, np.nan]),
        ([2, 1, 0], [0, 1, 2], [0, 1, 0]),  # one image a class
        ([], [], [np.nan, np.nan, np.nan]),
        ([0, 1], [0, 0], [0.5]),  # one class in the table, but another predicted
    ],
)
def test_accuracies_are_those_counted_by_hand(predicted, labels, expected):
    predicted, labels = np.array(predicted, np.int64), np.array(labels, np.int64)
    found = class_accuracies(predicted, labels, len(expected))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    counted = [x for x in expected if not np.isnan(x)]
    hand = sum(counted) / len(counted) if counted else np.nan
    assert mean_class_accuracy(predicted, labels, len(expected)) == pytest.approx(hand, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize(
    ("seen", "unseen", "h"), [(0.934, 0.270, 0.4189), (0.5, 0.5, 0.5), (1, 0, 0), (0, 1, 0), (0, 0, 0)]
)
def test_harmonic_mean_is_the_published_one(seen, unseen, h):
    assert harmonic_mean(seen, unseen) == pytest.approx(h, abs=5e-5)


def test_cosine_is_the_plain_one():
    plain = [[cos(a, p) for p in PROTOTYPES] for a in ATTRIBUTES]
    np.testing.assert_allclose(cosine(ATTRIBUTES, PROTOTYPES), plain, atol=1e-12)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_combined_scores_are_those_of_a_plain_loop(metric):
    pair = (PROTOTYPES, LATENT[:5])
    plain = both_scores(ATTRIBUTES, LATENT, *pair, metric)
    np.testing.assert_allclose(combined(ATTRIBUTES, LATENT, pair, metric), plain, atol=1e-12)


@pytest.mark.parametrize("bias", [[0.0] * 5, [-0.3, 0.0, 0.2, 0.1, 0.5]])
@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_every_step_of_self_adaptation_is_that_of_a_plain_loop(metric, bias):
    plain = adapted(ATTRIBUTES.tolist(), LATENT.tolist(), PROTOTYPES.tolist(), metric, bias)
    found = list(self_adaptation(ATTRIBUTES, LATENT, PROTOTYPES, metric=metric, bias=np.array(bias)))
    assert not np.array_equal(np.argmax(plain[0], 1), np.argmax(plain[10], 1))
    np.testing.assert_allclose(found, plain, atol=1e-10)


@pytest.mark.parametrize(
    ("metric", "first_step"),
    [
        (
            "cosine",
            [
                [1 + 1, 2 / 29**0.5 + 0.5**0.5],
                [20 / 29 + 1, 5 / 29**0.5 + 0.5**0.5],
                [0 + 0, 5 / 29**0.5 + 0.5**0.5],
            ],
        ),
        (
            "euclidean",  # distances² (0, 1/2), (0, 1/2), (2, 1/2)
            [
                [29**0.5 / 33**0.5 + 3 / 13**0.5, 2 / 33**0.5 + 2 / 13**0.5],
                [20 / 1125**0.5 + 3 / 13**0.5, 5 * 29**0.5 / 1125**0.5 + 2 / 13**0.5],
                [0 + 1 / 5**0.5, 1 + 2 / 5**0.5],
            ],
        ),
    ],
)
def test_first_step_worked_by_hand_moves_the_second_image_to_the_class_of_its_like(metric, first_step):
    attributes = np.array([[3.0, 0], [20, 21], [0, 5]])
    latent = np.array([[1.0, 0], [1, 0], [0, 1]])
    before, after = self_adaptation(attributes, latent, np.eye(2), metric=metric, steps=1)
    np.testing.assert_allclose(before, [[1, 0], [20 / 29, 21 / 29], [0, 1]])
    np.testing.assert_allclose(after, first_step)
    assert before.argmax(1).tolist() == [0, 1, 1]
    assert after.argmax(1).tolist() == [0, 0, 1]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_a_pseudo_class_without_images_takes_the_mean_of_all(metric):
    prototypes = np.array([[1.0, 1], [-1, 0], [0, -1]])
    before, after = self_adaptation(np.eye(2), np.eye(2), prototypes, metric=metric, steps=1)
    assert before.argmax(1).tolist() == [0, 0]
    hand = 2 / 2**0.5 if metric == "cosine" else 2 / 3**0.5
    np.testing.assert_allclose(after, np.full((2, 3), hand))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_of_one_class_every_image_is(metric):
    for scores in self_adaptation(ATTRIBUTES, LATENT, PROTOTYPES[:1], metric=metric):
        assert scores.shape == (40, 1)
        assert np.isfinite(scores).all()


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_one_image_a_class_stays_where_it_is(metric):
    for scores in self_adaptation(10 * PROTOTYPES, LATENT[:5], PROTOTYPES, metric=metric):
        assert scores.argmax(1).tolist() == [0, 1, 2, 3, 4]


def test_of_equal_scores_the_lowest_class_wins():
    for scores in self_adaptation(np.eye(2), np.eye(2), np.ones((3, 2))):  # exact in any order of sums
        assert (scores == scores[:, :1]).all()
        assert not scores.argmax(1).any()
    prototypes = np.array([[0.0, 1], [1, 0], [1, 0]])
    *_, after = self_adaptation(np.eye(2), np.eye(2), prototypes, steps=1)
    np.testing.assert_allclose(
        after[0], [0, 2, 2 / 2**0.5]
    )  # the second class took the image, the third none


def test_vectors_of_zeros_fit_every_class_by_0_without_a_warning():
    zeros = np.zeros((3, 6), np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not cosine(zeros, PROTOTYPES).any()
        assert not cosine(ATTRIBUTES, zeros).any()
        assert not combined(zeros, zeros, (PROTOTYPES, PROTOTYPES)).any()
        assert not np.any(list(self_adaptation(zeros, zeros, zeros)))
        euclidean = list(self_adaptation(zeros, zeros, PROTOTYPES.astype(np.float32), metric="euclidean"))
    np.testing.assert_allclose(euclidean[-1], np.full((3, 5), 5**-0.5), rtol=1e-6)  # equal distances


def test_bias_moves_labels_towards_the_class_it_favours():
    for favoured in range(5):
        bias = np.where(np.arange(5) == favoured, 9.0, 0.0)
        for scores in self_adaptation(ATTRIBUTES, LATENT, PROTOTYPES, bias=bias):
            assert (scores.argmax(1) == favoured).all()


def test_ten_steps_follow_the_attributes_alone_unless_told_otherwise():
    assert len(list(self_adaptation(ATTRIBUTES, LATENT, PROTOTYPES))) == 11
    (only,) = self_adaptation(ATTRIBUTES, LATENT, PROTOTYPES, steps=0)
    np.testing.assert_array_equal(only, cosine(ATTRIBUTES, PROTOTYPES))


def test_scores_stay_float32():
    single = [x.astype(np.float32) for x in (ATTRIBUTES, LATENT, PROTOTYPES)]
    for metric in ("cosine", "euclidean"):
        assert {scores.dtype for scores in self_adaptation(*single, metric=metric)} == {np.dtype(np.float32)}


def test_an_unknown_metric_is_told_which_there_are():
    with pytest.raises(UsageError, match="metric must be one of cosine, euclidean; got 'cityblock'"):
        combined(ATTRIBUTES, LATENT, (PROTOTYPES, PROTOTYPES), "cityblock")
    with pytest.raises(UsageError, match="cityblock"):
        list(self_adaptation(ATTRIBUTES, LATENT, PROTOTYPES, metric="cityblock"))


@pytest.mark.parametrize("seen", [[0, 2, 3], [1, 4], [0, 1, 2, 3], [2]])
def test_latent_prototypes_are_means_and_their_mixtures_by_the_closed_form(seen):
    seen = np.array(seen)
    labels = np.resize(seen, 40)
    found = latent_prototypes(LATENT, labels, PROTOTYPES, seen)
    means = np.array([mean([v for v, label in zip(LATENT, labels, strict=True) if label == c]) for c in seen])
    np.testing.assert_allclose(found[seen], means)
    directions = np.array([normed(row) for row in PROTOTYPES])
    centred = directions - directions.mean(1, keepdims=True)  # the intercept takes each class's mean
    a = centred[seen]
    for other in set(range(5)) - {*seen}:
        weights = np.linalg.solve(a @ a.T + np.eye(len(seen)), a @ centred[other])
        np.testing.assert_allclose(found[other], weights @ means, atol=1e-12)


def test_an_unseen_class_like_the_one_seen_class_takes_its_latent_prototype_shrunk():
    attributes = np.array([[3.0, 4, 3, 4], [6, 8, 6, 8]])
    found = latent_prototypes(np.full((1, 4), 2.0), np.array([0]), attributes, np.array([0]))
    squares = 4 * (0.5 / 50**0.5) ** 2  # of (3, 4, 3, 4) at length 1, centred
    np.testing.assert_allclose(found[1], np.full(4, 2 * squares / (squares + 1)))


def test_without_unseen_classes_latent_prototypes_are_the_means_of_single_images():
    order = np.array([4, 2, 0, 1, 3])
    found = latent_prototypes(LATENT[:5].astype(np.float32), order, PROTOTYPES, np.arange(5))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[order], LATENT[:5].astype(np.float32))
