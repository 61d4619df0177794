import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_zsl_training import SMALL, fresh

from vggenc import DataError, Options
from vggenc.zsl import Predictions, evaluate, make_report, predict
from vggenc.zsl.batches import Grids, ImageBatches, cache_grids
from vggenc.zsl.evaluation import METHODS


@torch.no_grad()
def test_predictions_are_those_of_forward_and_of_the_cached_maps(data, narrow, tmp_path):
    encoder = fresh(data).encoder.eval()
    which = np.array([3, 40, 7])
    found = predict(encoder, data, which, options=SMALL)
    dataset = ImageBatches(
        data.images(which), data.labels[which], encoder.preprocess.at(32), seed=0, augment=False
    )
    pixels = dataset[[(0, 0), (1, 0), (2, 0)]][0]
    expected = encoder(encoder.preprocess.normalize(pixels))
    np.testing.assert_allclose(found.attributes[which], expected.attributes, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found.latent[which], expected.latent, rtol=1e-4, atol=1e-4)
    assert np.isnan(found.latent[0]).all()
    cache_grids(encoder, data.images(np.arange(len(data.paths))), tmp_path / "grids", SMALL)
    cached = predict(encoder.train(), data, which, grids=Grids(tmp_path / "grids"))
    assert encoder.training
    np.testing.assert_allclose(cached.latent[which], expected.latent, rtol=1e-4, atol=1e-4)


def test_attributes_of_the_classes_themselves_are_evaluated_as_perfect(data):
    own = data.attributes[data.labels]
    results = evaluate(data, Predictions(own, own))
    assert set(results) == set(METHODS)
    for method in ("attributes", "hybrid"):
        assert results[method]["czsl"]["mca"] == 1
        assert [results[method]["gzsl"][name] for name in ("unseen", "seen", "h")] == [1, 1, 1]
    assert [method for method, result in results.items() if result["transductive"]] == [
        "self-adaptation",
        "self-adaptation, Euclidean",
    ]


def test_calibration_moves_images_from_seen_to_unseen_classes(data):
    noise = np.random.default_rng(0).normal(0, 60, (len(data.paths), data.k)).astype(np.float32)
    predictions = Predictions(data.attributes[data.labels] + noise, noise)
    plain, moved = (evaluate(data, predictions, calibration=x)["attributes"]["gzsl"] for x in (0.0, 0.3))
    assert moved["unseen"] > plain["unseen"]
    assert moved["seen"] < plain["seen"]


def test_a_class_without_test_images_is_left_out_and_named(data, narrow, tmp_path):
    fewer = replace(data, test_unseen=data.test_unseen[data.labels[data.test_unseen] != data.unseen[0]])
    encoder = fresh(data).encoder
    encoder.mark_trained()
    encoder.save_pretrained(tmp_path / "model")
    report = make_report(tmp_path / "model", fewer, options=Options(image_size=32, num_workers=0))
    assert report["left_out"] == [data.classes[data.unseen[0]]]
    assert len(report["results"]["attributes"]["czsl"]["by_class"]) == 4
    assert report["chance"] == 1 / 5


@torch.no_grad()
def test_nan_in_predictions_is_an_error_that_names_an_image(data, narrow, tmp_path):
    encoder = fresh(data).encoder
    cache_grids(encoder, data.images(np.arange(len(data.paths))), tmp_path, SMALL)
    encoder.fc4.bias.fill_(float("nan"))
    with pytest.raises(DataError, match=re.escape(f"{data.paths[3]}: NaN or infinity")):
        predict(encoder, data, np.array([3]), grids=Grids(tmp_path))
