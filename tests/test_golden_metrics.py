"""Metrics against the original evaluator (TensorFlow) and scipy (golden/README.md)."""
import numpy as np
import pytest
import torch
from conftest import load_golden

from adm_repro.metrics import feature_statistics, frechet_distance, inception_score, manifold_radii, precision_recall

G = load_golden("metrics.npz")
SETS = sorted({key.split("/")[0] for key in G.files} - {"inception_score"})
FRECHET = 1e-6  # relative


def features(name):
    return (G[f"{name}/{kind}_features"].astype(np.float32) for kind in ("reference", "sample"))


@pytest.mark.parametrize("name", SETS)
def test_frechet_distance(name):
    reference, samples = map(feature_statistics, features(name))
    expected = float(G[f"{name}/frechet_distance"])
    assert frechet_distance(reference, samples) == pytest.approx(expected, rel=FRECHET)
    assert frechet_distance(samples, reference) == pytest.approx(expected, rel=FRECHET)


@pytest.mark.parametrize("name", SETS)
def test_precision_and_recall_are_exact_with_float16_distances(name):
    reference, samples = features(name)
    assert precision_recall(reference, samples) == (float(G[f"{name}/precision"]), float(G[f"{name}/recall"]))


@pytest.mark.parametrize("name", SETS)
def test_float32_distances_differ_by_one_sample_at_most(name):
    reference, samples = features(name)
    precision, recall = precision_recall(reference, samples, distances="float32")
    assert abs(precision - float(G[f"{name}/precision"])) <= 1.001 / len(samples)
    assert abs(recall - float(G[f"{name}/recall"])) <= 1.001 / len(reference)


@pytest.mark.parametrize("name", SETS)
def test_radii_are_exact_with_float16_distances(name):
    reference, _ = features(name)
    assert np.array_equal(manifold_radii(torch.from_numpy(reference)).numpy(), G[f"{name}/reference_radii"][:, 0])


@pytest.mark.parametrize(("split", "key"), [(10**9, "one_split"), (500, "splits_of_500")])
def test_inception_score(split, key):
    assert inception_score(G["inception_score/probabilities"], split) == pytest.approx(float(G[f"inception_score/{key}"]), rel=1e-9)
