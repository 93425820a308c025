"""`adm-repro train`: several processes, folders of images, runs that end badly."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file

from adm_repro.checkpoints import load_network

TINY = [f"--set={setting}" for setting in ("width=32", "channel_mult=[1,1]", "depth=1", "attention_resolutions=[4]", "head_channels=32", "dropout=0")]
DIGITS = ["--data", "digits", "--set=image_size=8", "--set=in_channels=1", *TINY]
SHORT = ["--iterations", "3", "--batch-size", "8", "--learning-rate", "1e-4", "--log-every", "1", "--precision", "fp32", "--device", "cpu"]


def command(*arguments, **environment):
    return subprocess.run([sys.executable, "-m", "adm_repro.cli", "train", *arguments], cwd=ROOT, capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment)


def test_two_processes_of_the_command_train_what_one_trains(tmp_path):
    one, two = (command("imagenet64", *DIGITS, *SHORT, "--out", str(tmp_path / name), *more) for name, more in (("one", ()), ("two", ("--processes", "2", "--keep", "2"))))
    assert one.returncode == 0, one.stderr
    assert two.returncode == 0, two.stderr
    assert "2 processes of 4 images per step" in two.stderr and two.stderr.count("differs from the paper: batch_size 8 (the paper: 2048)") == 1
    assert two.stdout.splitlines()[-1].startswith(f"{tmp_path / 'two' / 'weights.safetensors'}: 3 steps; averaged weights")
    a, b = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=1e-5, atol=2e-5)
    assert [json.loads(line)["processes"] for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()] == [2, 2, 2]
    assert (tmp_path / "two" / "weights-2.safetensors").exists()
    assert load_network(tmp_path / "two" / "weights.safetensors")[1]["noise_schedule"] == "cosine"


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for kind in ("cats", "dogs"):
        (tmp_path / "images" / kind).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(tmp_path / "images" / kind / f"{i}.png")
    return tmp_path


def test_a_folder_of_images_is_read_by_other_processes_and_cropped_at_random(folder):
    arguments = ["imagenet64-classifier", "--data", str(folder / "images"), "--set=image_size=16", *TINY, *SHORT]
    logs = {}
    for workers, crop in ((0, "random"), (2, "random"), (0, "center")):
        out = folder / f"{workers}{crop}"
        result = command(*arguments, "--out", str(out), "--workers", str(workers), "--set", f"crop={crop}")
        assert result.returncode == 0, result.stderr
        assert "12 images in 2 classes" in result.stderr
        assert ("crop" in result.stderr) == (crop == "center"), "a random crop is the paper's for a classifier"
        logs[workers, crop] = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert logs[0, "random"] == logs[2, "random"] != logs[0, "center"]


def test_a_run_that_ends_badly_says_so_in_one_line(folder):
    result = command("imagenet64", *DIGITS, *SHORT, "--out", str(folder / "run"), "--learning-rate", "1e30")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("adm-repro: the loss is not finite at step 2")
    (folder / "images" / "cats" / "0.png").write_bytes(b"no image")
    result = command("imagenet64", "--data", str(folder / "images"), "--set=image_size=16", *TINY, *SHORT, "--out", str(folder / "other"))
    assert result.returncode == 2
    assert "cats/0.png" in result.stderr.splitlines()[-1]
    assert not (folder / "other" / "weights.safetensors").exists()


def test_the_error_of_a_process_is_the_last_word(tmp_path):
    result = command("imagenet64", *DIGITS, *SHORT, "--out", str(tmp_path), "--processes", "2", "--learning-rate", "1e30")
    assert result.returncode == 2
    first, second = result.stderr.splitlines()[-2:]
    assert first.startswith("adm-repro: the loss is not finite at step 2")
    assert second == "when that is mended, the same command continues"
