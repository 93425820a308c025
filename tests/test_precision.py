"""What half precision does to images, and what benchmarks/precision.py and benchmarks/training_step.py have recorded."""
import importlib.util
import json

import numpy as np
import pytest
import torch
from conftest import ROOT

from adm_repro.classifier import ClassifierConfig, NoisyClassifier, log_prob_grad
from adm_repro.diffusion import GaussianDiffusion, named_betas
from adm_repro.fast import FastNetwork
from adm_repro.metrics import feature_statistics
from adm_repro.sampling import SamplerConfig, sample_images
from adm_repro.unet import UNet, UNetConfig

SHAPE = dict(image_size=8, in_channels=1, width=32, channel_mult=(1, 1), depth=1, attention_resolutions=(4,), head_channels=16, classes=10)
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def precision():
    spec = importlib.util.spec_from_file_location("precision", ROOT / "benchmarks" / "precision.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_half_precision_moves_a_guided_image_less_than_another_seed(precision):
    torch.manual_seed(0)
    networks = [UNet(UNetConfig(**SHAPE)), NoisyClassifier(ClassifierConfig(**SHAPE))]
    for network in networks:
        for parameter in network.eval().requires_grad_(False).parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    config, indices = SamplerConfig("10", guidance_scale=3.0), torch.arange(8)

    def drawn(seed, *way):
        net, guide = (FastNetwork(network, *way) for network in networks) if way else networks
        return sample_images(net, GaussianDiffusion(named_betas("linear", 1000)), config, seed, indices, (1, 8, 8), lambda x, t: log_prob_grad(guide, x, t, indices), {"y": indices})
    plain, other = drawn(0), drawn(1)
    apart = np.median(precision.of_one_image(other, plain))
    assert np.median(precision.of_one_image(drawn(0, "fp32"), plain)) < 1e-5
    assert 1e-5 < np.median(precision.of_one_image(drawn(0, "bf16"), plain)) < 0.05 * apart


def test_differences_are_those_of_images_of_bytes_and_of_sets(precision):
    a = torch.zeros(2, 1, 2, 2)
    b = a.clone()
    b[0, 0, 0, 0] = 0.01  # a level is 2 / 255
    assert precision.of_one_image(1 + a, 1 + b) == pytest.approx([0.01 / (3 + 1.01**2)**0.5, 0], rel=1e-6)
    assert precision.in_bytes(a, b) == {"pixels_that_differ": 1 / 8, "mean_levels": 1 / 8, "largest_levels": 1}
    draw = np.random.default_rng(0)
    sets = [draw.normal(size=(400, 4)).astype(np.float32) for _ in range(3)]
    statistics = [feature_statistics(features) for features in sets]
    near = precision.of_sets([feature_statistics(features + 1e-4) for features in sets], statistics, statistics[0])
    far = precision.of_sets([feature_statistics(features + 1) for features in sets], statistics, statistics[0])
    assert near["same_seed_no_larger"] and near["other_seed_within_the_seeds"] and near["same_seed"]["mean"] == pytest.approx(4e-8, rel=0.01)
    assert not far["same_seed_no_larger"] and not far["other_seed_within_the_seeds"] and far["other_seed_minus_two_float32_seeds"]["mean"] == pytest.approx(4, rel=0.1)
    assert near["two_float32_seeds"]["of"] == near["other_seed"]["of"] == 6


def test_recorded_images_of_half_precision_are_those_of_float32_as_far_as_seeds_tell():
    recorded = json.loads((RESULTS / "precision.json").read_text())
    assert recorded["weights_of_the_committed_records"] == {"conditional-seed10": True, "classifier-seed10": True}
    rows = {(row["setting"], row["way"]): row for row in recorded["rows"]}
    assert {(f"{sampler}, scale {scale}", "bf16") for sampler in ("ancestral 250", "DDIM 25") for scale in (1, 10)} <= rows.keys()
    for row in rows.values():
        assert row["images"]["median_of_the_seeds_median"] < 0.01 and row["frechet"]["same_seed_no_larger"] and row["frechet"]["other_seed_within_the_seeds"]


def test_recorded_steps_agree_with_the_originals():
    recorded = json.loads((RESULTS / "training_step_cpu.json").read_text())
    agreements = [row for size in recorded.values() for row in size["rows"] if row["what"] == "the first step agrees"]
    assert {row["who"] for row in agreements} == {"ours", "ours, fast"}
    assert all(row["relative_difference_of_the_loss"] < 1e-6 and row["relative_difference_of_the_gradients_norm"] < 1e-4 for row in agreements)
