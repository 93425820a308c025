"""Whole guided trajectories against the released code (golden/README.md)."""
import numpy as np
import pytest
import torch
from conftest import fill, load_golden

from adm_repro.checkpoints import network
from adm_repro.classifier import log_prob_grad
from adm_repro.diffusion import GaussianDiffusion, named_betas
from adm_repro.sampling import SamplerConfig, sample_loop

G, SPEC = load_golden("sampling.npz"), load_golden("sampling.json")
NETWORKS = SPEC.pop("networks")
TRAJECTORY = 1e-3  # of the final state's standard deviation, float32


def denoiser(settings, kind="unet"):
    module = fill(network(kind, settings))
    return lambda *args, **kwargs: NETWORKS["damping"] * module(*args, **kwargs)


@pytest.mark.parametrize("name", SPEC)
def test_trajectory(name):
    spec = SPEC[name]
    upsampling = name.startswith("upsample")
    y = torch.tensor(spec["y"])
    settings = dict(NETWORKS["upsampler" if upsampling else "unet"])
    if not upsampling and not spec["class_conditional"]:
        settings.pop("num_classes")
    conditioning = {"y": y} if upsampling or spec["class_conditional"] else {}
    if upsampling:
        conditioning["low_res"] = torch.tensor(G[f"{name}/low_res"])
    classifier = fill(network("classifier", NETWORKS["classifier"]))
    sampler, scale = spec["sampler"], spec.get("scale", 0.0)
    config = SamplerConfig(steps=spec["respacing"], sampler="ancestral" if sampler == "ddpm" else "ddim",
                           eta=1.0 if sampler == "ddim_eta1" else 0.0, guidance_scale=scale)
    draw = np.random.RandomState(spec["seed"])
    noise = lambda _: torch.tensor(draw.standard_normal((2, 3, 16, 16)), dtype=torch.float32)
    first, seen = noise(0), []
    final = sample_loop(denoiser(settings, "superres" if upsampling else "unet"), GaussianDiffusion(named_betas(spec["schedule"], 1000)),
                        first, noise, config, lambda x, t: log_prob_grad(classifier, x, t, y), conditioning, lambda step, x: seen.append(x))
    assert len(seen) == 10
    if not upsampling:
        expected = torch.tensor(G[f"{name}/first"])
        assert (seen[0] - expected).abs().max() <= TRAJECTORY * expected.std()
    expected = torch.tensor(G[f"{name}/final"])
    assert (final - expected).abs().max() <= TRAJECTORY * expected.std()
