"""Several processes train what one would train; killed, the run goes on with another number of them."""
import hashlib
import json
import math
import os
import shutil
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from adm_repro.classifier import ClassifierConfig, NoisyClassifier
from adm_repro.data import load_digits_dataset
from adm_repro.diffusion import GaussianDiffusion, cosine_betas
from adm_repro.processes import launch, rank
from adm_repro.training import (
    DenoisingObjective,
    NoisyClassificationObjective,
    TrainConfig,
    TrainingDiverged,
    train,
    training_step_seconds,
)
from adm_repro.unet import UNet, UNetConfig

SHAPE = dict(image_size=8, in_channels=1, width=64, channel_mult=(1, 1), depth=1, attention_resolutions=(4,), head_channels=32, classes=10)
CONFIG = TrainConfig(5, 12, learning_rate=2e-4, ema_rate=0.9, log_every=1, save_every=2)
DIFFUSION = GaussianDiffusion(cosine_betas(1000))
BATCH = CONFIG.batch_size


@dataclass(frozen=True)
class Disturbed(DenoisingObjective):
    """At one place in the line of images, or in one process, something happens."""

    place: int = -1
    factor: float = 1.0  # of the loss there
    deadly: bool = False  # the process is killed there
    room: tuple = (99, 99)  # images that fit into the first process, and into the second

    def __call__(self, network, images, labels, places, seed):
        if len(images) > self.room[rank()]:
            raise torch.OutOfMemoryError(f"{len(images)} images")
        losses = super().__call__(network, images, labels, places, seed)
        if self.place in places and self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return losses | {"loss": losses["loss"] * torch.where(places == self.place, self.factor, 1.0)}


PLAIN = DenoisingObjective(DIFFUSION)
LAST = 4 * BATCH - 1  # the last place of the fourth step: with several processes it is the last process's
RUNS = {
    "unet": (PLAIN, CONFIG),
    "pieces": (PLAIN, replace(CONFIG, microbatch=4, gradient_checkpointing=True)),
    "fp16 overflow": (Disturbed(DIFFUSION, LAST, float("inf")), replace(CONFIG, precision="fp16", ema_rate=None)),
    "classifier": (NoisyClassificationObjective(DIFFUSION), replace(CONFIG, ema_rate=None, weight_decay=0.05, anneal=True)),
    "cramped": (Disturbed(DIFFUSION, room=(99, 2)), CONFIG),
    "sharded": (PLAIN, replace(CONFIG, sharded=True)),
    "sharded pieces": (PLAIN, replace(CONFIG, sharded=True, microbatch=4, gradient_checkpointing=True)),
    "sharded fp16 overflow": (Disturbed(DIFFUSION, LAST, float("inf")), replace(CONFIG, sharded=True, precision="fp16")),
    "diverged": (Disturbed(DIFFUSION, LAST, float("nan")), CONFIG),
    "undivided": (PLAIN, replace(CONFIG, batch_size=13)),
}


def network(name="unet"):
    return NoisyClassifier(ClassifierConfig(**SHAPE)) if name == "classifier" else UNet(UNetConfig(**SHAPE))


def run(name, folder, said=None):
    """Train in a folder's folder; what a process saw at the end is written to a file of its own."""
    objective, config = RUNS[name]
    net = network(name)
    try:
        path = train(net, objective, load_digits_dataset(), config, folder / name, progress=False, keep=[2])
        sharded = hasattr(net, "unshard")  # then no process holds the whole
        weights = path.read_bytes() if sharded else b"".join(p.detach().numpy().tobytes() for p in net.parameters())
        seen = f"{path.exists()}, {hashlib.sha256(weights).hexdigest()}"
    except (TrainingDiverged, ValueError) as error:
        seen = f"{type(error).__name__}: {error}"
    (folder / f"{said or name}.{rank()}.txt").write_text(seen)


def start(processes, *arguments):
    return launch(processes, str(Path(__file__)), *map(str, arguments), environment={"PYTHONPATH": str(ROOT)})


def seen(folder, name, process):
    return (folder / f"{name}.{process}.txt").read_text()


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_weights(one, other, file="weights.safetensors"):
    one, other = load_file(one / file), load_file(other / file)
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    for name in RUNS:
        run(name, folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    assert start(2, "all", folder) == 0
    return folder


@pytest.mark.parametrize("name", ["unet", "pieces", "fp16 overflow", "classifier", "cramped", "sharded", "sharded pieces", "sharded fp16 overflow"])
def test_two_processes_train_what_one_trains(alone, two, name):
    tolerance = dict(rel=2e-2, abs=1e-3) if "fp16" in name else dict(rel=1e-4, abs=2e-5)
    for a, b in zip(log(alone / name), log(two / name), strict=True):
        for key in a.keys() - {"images_per_second", "microbatch", "gradient_checkpointing"}:
            assert b[key] == pytest.approx(a[key], nan_ok=True, **tolerance), (a["step"], key)
    if "fp16" not in name:
        for file in ("weights.safetensors", "weights-2.safetensors"):
            assert_same_weights(alone / name, two / name, file)
    assert len({seen(two, name, process) for process in range(2)}) == 1, "the processes' weights must be equal to the bit"
    assert seen(two, name, 0).startswith("True")
    assert all(line["processes"] == 2 for line in log(two / name))


def test_the_log_says_how_a_step_was_computed(alone, two):
    assert {line.get("microbatch") for line in log(two / "unet")} == {None}
    assert {(line["microbatch"], line["gradient_checkpointing"]) for line in log(two / "pieces")} == {(4, True)}
    assert {line["microbatch"] for line in log(two / "cramped")} == {2}, "the second process has room for two images: both take two"
    assert "processes" not in log(alone / "unet")[0]


@pytest.mark.parametrize("name", ["fp16 overflow", "sharded fp16 overflow"])
def test_an_overflow_in_one_process_is_skipped_by_all(two, name):
    assert [math.isfinite(line["loss"]) for line in log(two / name)] == [True, True, True, False, True]


def test_a_loss_that_is_lost_in_one_process_stops_all(two):
    for process in range(2):
        assert seen(two, "diverged", process).startswith("TrainingDiverged: the loss is not finite at step 4")
    assert not (two / "diverged" / "weights.safetensors").exists()


def test_a_batch_that_cannot_be_divided_is_refused(two):
    for process in range(2):
        assert "2 processes cannot share 13 images" in seen(two, "undivided", process)
    assert not (two / "undivided").exists()


def test_a_step_is_timed_without_the_others(two):
    assert float((two / "seconds").read_text()) > 0


def test_a_folder_that_only_one_process_sees_is_refused(two):
    for process in range(2):
        assert "would continue from the steps [5, 0]: they must all see the same run folder" in seen(two / "unet" if process else two, "apart", process)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    assert start(2, "killed", folder) != 0
    return folder


@pytest.mark.parametrize(("processes", "how"), [(1, "alone"), (3, "continued"), (2, "sharded")])
def test_killed_and_continued_in_another_way(alone, killed, tmp_path, processes, how):
    assert [line["step"] for line in log(killed)] == [1, 2, 3], "the second process was killed in the fourth step"
    assert not (killed / "weights.safetensors").exists()
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    if processes == 1:
        train(network(), PLAIN, load_digits_dataset(), CONFIG, tmp_path, progress=False)
    else:
        assert start(processes, how, tmp_path) == 0
    assert_same_weights(alone / "unet", tmp_path)
    assert [line["step"] for line in log(tmp_path)] == [1, 2, 3, 4, 5]
    assert [line.get("processes", 1) for line in log(tmp_path)] == [2, 2] + 3 * [processes], "the checkpoint was that of step 2"
    assert [line.get("sharded", False) for line in log(tmp_path)] == [False, False] + 3 * [how == "sharded"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, where = sys.argv[1], Path(sys.argv[2])
    if what == "all":
        for each in RUNS:
            run(each, where)
        if rank() == 1:  # alone: it must not wait for anybody
            seconds = training_step_seconds(network(), PLAIN, load_digits_dataset(), CONFIG, steps=1)
            (where / "seconds").write_text(str(seconds))
        run("unet", where / "unet" if rank() else where, "apart")
    else:
        objective = Disturbed(DIFFUSION, LAST, deadly=True) if what == "killed" else PLAIN
        train(network(), objective, load_digits_dataset(), replace(CONFIG, sharded=what == "sharded"), where, progress=False)
