"""What --dry-run says about time: measurements in one process and in several, kept by what they depend on, and used by later plans."""
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from conftest import ROOT

from adm_repro.checkpoints import released_network, save_network
from adm_repro.cli import main
from adm_repro.cost import StepTime, keep_times, kept_times
from adm_repro.data import load_digits_dataset
from adm_repro.drawing import Drawing, drawing_conditions, drawing_seconds, measure_drawing
from adm_repro.presets import changed, preset, training_conditions
from adm_repro.pretrained import load
from adm_repro.sampling import SamplerConfig
from adm_repro.tools import _layout_of
from adm_repro.unet import UNet, UNetConfig, Upsampler

SMALL = dict(in_channels=1, width=32, channel_mult=(1, 1), depth=1, attention_resolutions=(4,), head_channels=16)
CPU = torch.device("cpu")


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("ADM_REPRO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # as in the commands' processes
    save_network(tmp_path / "model.safetensors", UNet(UNetConfig(8, **SMALL, classes=10)), noise_schedule="linear")
    save_network(tmp_path / "upsampler.safetensors", Upsampler(UNetConfig(16, **SMALL, classes=10)), noise_schedule="linear")
    return tmp_path / "model.safetensors"


def adm(*arguments):
    """The command, in processes of its own."""
    return subprocess.run([sys.executable, "-m", "adm_repro.cli", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def here(*arguments):
    """The command, in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_two_processes_measure_at_once_and_a_later_plan_knows(model, tmp_path):
    command = ["sample", model, "--out", tmp_path / "drawn", "--num", 12, "--steps", 4, "--block-size", 4, "--device", "cpu", "--processes", 2, "--dry-run"]
    measured, later = adm(*command, "--measure"), here(*command)
    assert measured.returncode == later.exit_code == 0, measured.stderr
    line = measured.stderr.splitlines()[-1]
    assert re.fullmatch(r"about .* of processor time in each of 2 processes: .* s per step of 4 images, measured here in 2 processes at once on \d{4}-\d\d-\d\d", line), measured.stderr
    assert later.stderr.splitlines()[-1] == line
    drawing = Drawing(load(model), SamplerConfig(steps="4"))
    times = kept_times(drawing_conditions(drawing, CPU), 2)
    assert [(time.images, time.processes) for time in times] == [(4, 2)]
    assert kept_times(drawing_conditions(drawing, CPU), 1) == []  # two processes slow each other down: they say nothing about one
    assert drawing_seconds(drawing, 12, 4, times, 2) == pytest.approx(2 * (4 * times[0].step + times[0].rest))  # the first makes blocks 0 and 2
    assert not (tmp_path / "drawn").exists()


def test_two_processes_measure_their_training_together(model, tmp_path):
    settings = [f"--set={setting}" for setting in ("image_size=8", "in_channels=1", "width=32", "channel_mult=[1,1]", "depth=1", "attention_resolutions=[4]", "head_channels=16")]
    command = ["train", "imagenet64", "--data", "digits", *settings, "--batch-size", 4, "--precision", "fp32", "--iterations", 50, "--device", "cpu", "--out", tmp_path / "run",
               "--processes", 2, "--dry-run"]
    measured, later = adm(*command, "--measure"), here(*command)
    assert measured.returncode == 0, measured.stderr
    assert "50 steps, without checkpoints: about " in measured.stderr and "s per step of 2 images, measured here in 2 processes at once" in measured.stderr
    assert later.stderr == measured.stderr
    assert not (tmp_path / "run").exists()


def test_what_is_measured_is_the_run_that_is_planned(model):
    """Blocks as they will be dealt, the walk as it will be, on networks that are placed as for drawing."""
    seen, whole = [], UNet.forward

    def forward(self, x, t, y=None, **more):
        seen.append((type(self).__name__, len(x), int(t[0])))
        return whole(self, x, t, y, **more)
    drawing = Drawing(load(model), SamplerConfig(steps="ddim25", sampler="ddim"), precision="bf16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UNet, "forward", forward)
        times = measure_drawing(drawing, 7, 4, seconds=0.0)
    assert [time.images for time in times] == [4, 3]
    assert [n for _, n, _ in seen] == 7 * [4] + 7 * [3]  # one step, one step; one and four that count
    assert [t for _, _, t in seen][:7] == [0, 0, 0, 999, 666, 333, 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Upsampler, "forward", lambda self, x, t, y=None, low_res=None: (seen.append(low_res.shape), torch.zeros(len(x), 2, 16, 16))[1])
        measure_drawing(Drawing(load(model.with_name("upsampler.safetensors")), SamplerConfig(steps="250")), 5, None, seconds=0.0)
    assert [shape[0] for shape in seen[15:]] == 7 * [4] + 7 * [1]  # after one without values that counts bytes: the largest power of two, and what is left


def test_times_are_kept_by_what_they_depend_on(model):
    drawing = Drawing(load(model), SamplerConfig(steps="4"))
    keys = {json.dumps(drawing_conditions(other, CPU, threads), sort_keys=True) for other, threads in (
        (drawing, 1), (drawing, 2), (Drawing(drawing.model, drawing.config, fast=True), 1), (Drawing(drawing.model, drawing.config, precision="bf16"), 1),
        (Drawing(drawing.model, SamplerConfig(steps="4", sampler="ddim")), 1), (Drawing(load(model.with_name("upsampler.safetensors")), drawing.config), 1))}
    assert len(keys) == 6
    assert drawing_conditions(Drawing(drawing.model, SamplerConfig(steps="250"), seed=3, label=2), CPU) == drawing_conditions(drawing, CPU)
    recipe, digits = preset("imagenet64"), load_digits_dataset("train")
    shapes = [training_conditions(changed(recipe, **values), digits, CPU) for values in ({}, {"precision": "bf16"}, {"width": 128}, {"gradient_checkpointing": True})]
    assert len({json.dumps(shape, sort_keys=True) for shape in shapes}) == 4
    assert training_conditions(changed(recipe, iterations=7, seed=3, learning_rate=0.5), digits, CPU) == shapes[0]


def test_a_plan_of_another_block_size_takes_the_line_and_says_so_or_nothing(model, tmp_path):
    what = drawing_conditions(Drawing(load(model), SamplerConfig()), CPU)
    keep_times(what, [StepTime(4, 0.3, when="2026-01-01"), StepTime(8, 0.5, when="2026-01-01")])
    plans = [here("sample", model, "--out", tmp_path / "drawn", "--num", 64, "--device", "cpu", "--dry-run", "--block-size", size).stderr.splitlines()[-1] for size in (16, 32)]
    assert "about 15 min: 0.900 s per step of 16 images, measured here on 2026-01-01" in plans[0]  # 4 blocks of 250 steps
    assert "an assumption" in plans[1]  # too far from what was measured


def test_a_plan_needs_no_weights_and_a_measurement_needs_a_plan(model, tmp_path):
    found = _layout_of("imagenet64-classifier")
    assert found.network.config == released_network("imagenet64-classifier").config and found.process.noise_schedule == "cosine"
    assert not any(path.suffix == ".pt" for path in (tmp_path / "cache").rglob("*"))
    for command in (["sample", model, "--out", tmp_path / "drawn"], ["train", "imagenet64", "--data", "digits", "--out", tmp_path / "run"]):
        result = here(*command, "--measure")
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert "give it together with --dry-run" in result.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("scaling_*.json")), ids=lambda path: path.stem)
def test_recorded_predictions_are_within_15_percent_of_the_runs(path):
    results, found = json.loads(path.read_text()), []
    assert {"batch", "size", "steps", "processes", "training"} <= set(results)
    for section, result in results.items():
        for row in result["rows"]:
            line = [value for key, value in row.items() if key.startswith("predicted_on_the_line")]
            for predicted, said in zip([row["predicted"], *line], [row["deviation_percent"], row.get("line_deviation_percent")]):
                found.append(100 * (predicted / row["seconds"] - 1))
                assert abs(found[-1]) < 15, (section, row)
                assert said == pytest.approx(found[-1], abs=0.1)
    assert len(found) > 15
    by_operations = [row["by_operations_deviation_percent"] for row in results["size"]["rows"]]
    assert max(map(abs, by_operations)) > 15  # why no prediction goes from one image size to another
    assert path.with_suffix(".png").exists()
