"""The fast training step: what the plain one computes, in one process or two, sharded or not, and without waiting for the device."""
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file

from adm_repro.classifier import ClassifierConfig, NoisyClassifier
from adm_repro.data import load_digits_dataset
from adm_repro.diffusion import GaussianDiffusion, cosine_betas
from adm_repro.processes import launch
from adm_repro.training import (
    DenoisingObjective,
    NoisyClassificationObjective,
    TrainConfig,
    TrainingDiverged,
    UpsamplingObjective,
    _begun,
    _look,
    _may_step,
    check_run,
    train,
    training_step_seconds,
)
from adm_repro.unet import UNet, UNetConfig, Upsampler

SHAPE = dict(image_size=8, in_channels=1, width=32, channel_mult=(1, 2), depth=1, attention_resolutions=(4,), head_channels=32)
CONFIG = TrainConfig(5, 12, learning_rate=2e-4, ema_rate=0.9, log_every=1, save_every=2)
DIFFUSION = GaussianDiffusion(cosine_betas(1000))
PLAIN = DenoisingObjective(DIFFUSION)


@dataclass(frozen=True)
class Overflowing(DenoisingObjective):
    """The loss is infinite at one place of the fourth step."""

    def __call__(self, network, images, labels, places, seed):
        losses = super().__call__(network, images, labels, places, seed)
        return losses | {"loss": losses["loss"] * torch.where(places == 3 * CONFIG.batch_size, float("inf"), 1.0)}


RUNS = {
    "alone": (PLAIN, CONFIG),
    "bf16": (PLAIN, replace(CONFIG, precision="bf16")),
    "fp16": (Overflowing(DIFFUSION), replace(CONFIG, precision="fp16")),
    "pieces": (PLAIN, replace(CONFIG, microbatch=4, gradient_checkpointing=True)),
    "sharded": (PLAIN, replace(CONFIG, sharded=True)),
    "sharded fp16": (Overflowing(DIFFUSION), replace(CONFIG, sharded=True, precision="fp16")),
    "lost": (Overflowing(DIFFUSION), replace(CONFIG, log_every=5, save_every=5)),
}


def run(name, folder, fast, keep=()):
    objective, config = RUNS[name]
    return train(UNet(UNetConfig(**SHAPE, classes=10)), objective, load_digits_dataset(), config, folder / name, progress=False, fast=fast, keep=keep)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_training(one, other, tolerance=1e-4, weights=1e-5):
    for a, b in zip(log(one), log(other), strict=True):
        for key in ("step", "loss", "mse", "vlb", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=tolerance, abs=tolerance / 5, nan_ok=True), (a["step"], key)
    for key, value in load_file(one / "weights.safetensors").items() if weights else ():
        torch.testing.assert_close(load_file(other / "weights.safetensors")[key], value, rtol=weights, atol=weights)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    for name in ("alone", "bf16", "fp16", "pieces"):
        run(name, folder, fast=False)
    return folder


@pytest.mark.parametrize("name", ["alone", "bf16", "fp16", "pieces"])
def test_the_fast_step_trains_what_the_plain_one_trains(plain, tmp_path, name):
    run(name, tmp_path, fast=True, keep=[2])
    half = name.endswith("16")
    assert_same_training(plain / name, tmp_path / name, 2e-2 if half else 1e-4, 0 if half else 1e-5)
    assert [math.isfinite(line["loss"]) for line in log(tmp_path / name)] == [True, True, True, name != "fp16", True]
    assert all(line["fast"] for line in log(tmp_path / name)) and not any("fast" in line for line in log(plain / name))
    assert (tmp_path / name / "weights-2.safetensors").exists()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    assert launch(2, str(Path(__file__)), str(folder), environment={"PYTHONPATH": str(ROOT)}) == 0
    return folder


@pytest.mark.parametrize(("name", "alone"), [("alone", "alone"), ("pieces", "alone"), ("sharded", "alone"), ("sharded fp16", "fp16")])
def test_two_fast_processes_train_what_a_plain_one_trains(plain, two, name, alone):
    half = name.endswith("16")
    assert_same_training(plain / alone, two / name, 2e-2 if half else 1e-4, 0 if half else 1e-5)
    assert all(line["fast"] and line["processes"] == 2 for line in log(two / name))


def test_a_loss_that_is_lost_is_named_by_its_step_however_late_it_is_found(tmp_path):
    with pytest.raises(TrainingDiverged, match=r"not finite at step 4 \(seed 0"):
        run("lost", tmp_path, fast=True)
    assert log(tmp_path / "lost") == [] and not list((tmp_path / "lost").glob("*.safetensors"))
    with pytest.raises(TrainingDiverged, match="not finite at step 4"):  # weights of a step after it are not kept either
        run("lost", tmp_path, fast=True, keep=[4])
    assert not list((tmp_path / "lost").glob("*.safetensors"))


def test_the_first_of_several_bad_steps_is_the_one_that_is_told():
    state = _begun(UNet(UNetConfig(**SHAPE)), CONFIG, torch.device("cpu"), compiled=False, fast=True)
    for state.step, loss in enumerate((1.0, math.inf, 1.0, math.nan, 1.0)):
        assert _may_step(state, CONFIG, {"loss": torch.tensor(loss), "grad_norm": torch.tensor(1.0)})
    with pytest.raises(TrainingDiverged, match="step 2 "):
        _look(state, CONFIG)


@pytest.mark.parametrize("fast", [True, False])
def test_moments_lie_as_their_weights_do_and_files_do_not(tmp_path, fast):
    run("alone", tmp_path, fast=not fast)
    state = _begun(UNet(UNetConfig(**SHAPE, classes=10)), CONFIG, torch.device("cpu"), compiled=False, fast=fast)
    path = tmp_path / "alone" / "training.safetensors"
    with safe_open(path, "pt") as file:
        state.load(path, json.loads(file.metadata()["adm_repro"])["settings"])
        saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    wide = 0
    for name, parameter in state.network.named_parameters():
        moments = state.optimizer.state[parameter]
        assert moments["exp_avg"].stride() == moments["exp_avg_sq"].stride() == state.ema[name].stride() == parameter.stride()
        torch.testing.assert_close(moments["exp_avg"], saved[f"optimizer.{name}.exp_avg"], rtol=0, atol=0)
        torch.testing.assert_close(parameter.detach(), saved[f"network.{name}"], rtol=0, atol=0)
        wide += parameter.ndim == 4 and not parameter.is_contiguous()
    assert (wide > 0) == fast


@pytest.mark.parametrize(("network", "objective"), [
    (UNet(UNetConfig(**SHAPE, classes=10)), PLAIN), (Upsampler(UNetConfig(**SHAPE)), UpsamplingObjective(DIFFUSION, 4)),
    (NoisyClassifier(ClassifierConfig(**SHAPE, classes=10)), NoisyClassificationObjective(DIFFUSION))])
def test_no_objective_asks_the_device_for_a_value(network, objective):
    """On a device without values whoever asks for one fails: noise, loss and gradient need none."""
    diffusion = GaussianDiffusion(cosine_betas(1000))
    images, labels, places = torch.zeros(2, 1, 8, 8, device="meta"), torch.zeros(2, dtype=torch.long, device="meta"), torch.zeros(2, dtype=torch.long, device="meta")
    reported = replace(objective, diffusion=diffusion)(network.to("meta"), images, labels, places, 0)
    reported["loss"].sum().backward()
    assert all(p.grad is not None and p.grad.is_meta for p in network.parameters())
    with pytest.raises(RuntimeError, match="meta"):
        reported["loss"].sum().item()


def test_more_images_than_have_noise_are_refused():
    check_run(TrainConfig(2**24, 256))
    with pytest.raises(ValueError, match=r"16777217 steps of 256 images are more than the 2\*\*32"):
        check_run(TrainConfig(2**24 + 1, 256))


def test_a_fast_step_is_timed():
    assert training_step_seconds(UNet(UNetConfig(**SHAPE)), PLAIN, load_digits_dataset(), CONFIG, steps=1, fast=True) > 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in ("alone", "pieces", "sharded", "sharded fp16"):
        run(each, Path(sys.argv[1]), fast=True)
