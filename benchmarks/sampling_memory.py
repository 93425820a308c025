"""50,000 images of 64 pixels, drawn, assembled and scored: how much memory each of the three steps takes at its peak. One thread.

    python benchmarks/sampling_memory.py --out benchmarks/results/sampling_memory.json     # about 15 minutes and 1.4 GB of disk

What is measured is what grows or should not grow with the number of images: files, blocks, features, distances. So the networks are stand-ins.
The model is a U-Net of random weights that looks at means of 8x8 pixels, walked in two DDIM steps; images are scored twice, through `adm-repro evaluate`
with a small feature network of random weights, and with as many features as Inception has (2048 pooled, 2023 spatial), which are made of sums of pixels.
Each step is a process of its own, whose peak resident memory the kernel reports. The recorded seconds are those
of a machine that did other work beside, and say little.
"""
import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import numpy as np
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from adm_repro.batches import open_batch
from adm_repro.checkpoints import save_network
from adm_repro.cli import main as adm_repro
from adm_repro.evaluation import evaluate
from adm_repro.features import FeatureConfig, FeatureNet, FeatureSpace
from adm_repro.runs import hardware
from adm_repro.unet import UNet, UNetConfig


class Sums(FeatureSpace):
    """As many numbers as Inception gives, for next to nothing: mixed sums of pixels."""

    name, sha256, in_papers = "sums", "0" * 64, False
    lengths, frechet_names, suffixes = {"pool": 2048, "spatial": 2023}, {"pool": "d", "spatial": "s"}, {}
    metric_names = {"precision": "precision", "recall": "recall"}
    mix = torch.randn(192, 4071, generator=torch.Generator().manual_seed(0)) / 192**0.5

    def check(self, shape):
        pass

    def layers(self, images):
        sums = images.reshape(len(images), 8, 8, 8, 8, 3).mean((2, 4), dtype=np.float32).reshape(len(images), 192) / 255
        features = torch.relu(torch.from_numpy(sums) @ self.mix)
        return {"pool": features[:, :2048].contiguous(), "spatial": features[:, 2048:].contiguous()}


def prepare(folder: Path) -> None:
    """Networks of random weights, and a reference of 10,000 blurred images."""
    torch.manual_seed(0)
    model = UNet(UNetConfig(64, width=32, channel_mult=(1, 1), depth=1, attention_resolutions=(), head_channels=32, classes=1000))
    with torch.no_grad():
        for parameter in model.parameters():  # no zero-initialised layers
            parameter.add_(0.05 * torch.randn(parameter.shape))
    save_network(folder / "model.safetensors", model, noise_schedule="cosine")
    save_network(folder / "features.safetensors", FeatureNet(FeatureConfig(64, 3, classes=10, width=8)))
    coarse = np.random.default_rng(0).integers(0, 256, (10_000, 8, 8, 3), dtype=np.uint8)
    np.savez(folder / "reference.npz", arr_0=coarse.repeat(8, 1).repeat(8, 2))


def draw(folder: Path, count: int) -> None:
    whole = UNet.forward
    UNet.forward = lambda self, x, t, y=None: F.interpolate(whole(self, F.avg_pool2d(x, 8), t, y), scale_factor=8)
    arguments = ["sample", str(folder / "model.safetensors"), "--out", str(folder / "drawn"), "--num", str(count), "--steps", "ddim2", "--device", "cpu", "--json"]
    result = CliRunner().invoke(adm_repro, arguments, catch_exceptions=False)
    drawn = json.loads(result.stdout)
    report(samples=drawn["made"], block_size=drawn["settings"]["block_size"], file_gib=round((folder / "drawn" / "samples.npz").stat().st_size / 2**30, 2))


def score_small(folder: Path, count: int) -> None:
    arguments = [str(folder / "reference.npz"), str(folder / "drawn" / "samples.npz"), "--features", str(folder / "features.safetensors"), "--device", "cpu"]
    result = CliRunner().invoke(adm_repro, ["evaluate", *arguments, "--no-cache", "--json"], catch_exceptions=False)
    report(samples=json.loads(result.stdout)["samples"])


def score_large(folder: Path, count: int) -> None:
    report(samples=evaluate(folder / "reference.npz", folder / "drawn" / "samples.npz", Sums()).samples)


def report(**what) -> None:
    print(json.dumps(what | {"peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)}))


STEPS = {"draw": (draw, "drawn and assembled"), "score_small": (score_small, "scored by adm-repro evaluate, 64 features"),
         "score_large": (score_large, "scored with features of Inception's sizes")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--scratch", help="folder for the images; it is left empty")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.step:
        return STEPS[options.step][0](options.folder, options.count)
    rows = []
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        prepare(Path(folder))
        for step, (_, what) in STEPS.items():
            start = time.perf_counter()
            command = [sys.executable, __file__, "--step", step, "--folder", folder, "--count", str(options.count)]
            child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            said = json.loads(child.stdout.splitlines()[-1])
            rows.append({"what": f"{options.count} images of 64 pixels, {what}", **said, "seconds": round(time.perf_counter() - start, 1)})
            print(rows[-1])
        assert len(open_batch(Path(folder, "drawn", "samples.npz"))) == options.count
    results = {"rows": rows, "peak_gib": max(row["peak_gib"] for row in rows), "hardware": hardware(), "threads": 1, "python": platform.python_version(),
               "packages": {"numpy": np.__version__, "torch": torch.__version__}}
    if options.out:
        Path(options.out).write_text(json.dumps(results, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
