"""What half precision and the fast arrangement change in the images of trained networks, over whole guided trajectories. Nothing is timed.

    adm-repro reproduce conditional-s1-seed10 --size digits       # trains what is needed: a model, its guide, the feature network
    python benchmarks/precision.py --runs runs/digits --out benchmarks/results/precision.json     # about 40 minutes of one core

The networks are those of the digits experiment (8x8 pixels); the hashes of their weights are compared with the committed records. Every way of computing draws the same
images from the same noise as the plain float32 networks: seed by seed, all labels equally often, the same labels for all seeds. Three questions:

- How far is an image from the float32 one, against the distance of two float32 images of the same label from two seeds?
- How many pixels differ after they are stored as bytes?
- How far are the two sets apart (Frechet distance in the feature space of the data set), against two float32 sets from two seeds? And is a set of the one way further
  from a float32 set with another seed than a float32 set is?

fp16 on a CPU is ten times slower than float32: there it is drawn with DDIM's 25 steps only, and from two seeds.
"""
import argparse
import itertools
import json
import os
import statistics
import time
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import numpy as np
import torch
from common import about_machine, read, write
from torch import Tensor

from adm_repro.checkpoints import load_network
from adm_repro.classifier import log_prob_grad
from adm_repro.data import load_digits_dataset
from adm_repro.diffusion import GaussianDiffusion, named_betas
from adm_repro.fast import FastNetwork
from adm_repro.features import ClassifierSpace, extract
from adm_repro.files import sha256
from adm_repro.inception import full_float32
from adm_repro.metrics import FeatureStatistics, feature_statistics, frechet_distance
from adm_repro.sampling import SamplerConfig, sample_images, to_uint8

RECORDS = Path(__file__).parents[1] / "reports" / "digits" / "records"
SETTINGS = {f"{name}, scale {scale:g}": SamplerConfig(steps, sampler, guidance_scale=scale)
            for name, steps, sampler in (("ancestral 250", "250", "ancestral"), ("DDIM 25", "ddim25", "ddim")) for scale in (1.0, 10.0)}
WAYS = {"fast fp32": "fp32", "bf16": "bf16", "fp16": "fp16"}  # beside the plain float32 networks


def trained(runs: Path, job: str) -> tuple[Path, bool]:
    """The weights of a job, and whether they are those of the committed record."""
    found = sorted(runs.glob(f"{job}-*/weights.safetensors"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise SystemExit(f"{runs} holds no weights of {job}: adm-repro reproduce conditional-s1-seed10 --size digits")
    recorded = json.loads((RECORDS / f"{job}.json").read_text())["result"].get("weights_sha256")
    return found[-1], sha256(found[-1]) == recorded


def of_one_image(a: Tensor, b: Tensor) -> list[float]:
    """Relative difference of every image of a set from the same of another."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    return ((a - b).norm(dim=1) / b.norm(dim=1)).tolist()


def in_bytes(a: Tensor, b: Tensor) -> dict[str, float]:
    """What is left of a difference in stored images."""
    levels = (to_uint8(a).int() - to_uint8(b).int()).abs().double()
    return {"pixels_that_differ": float((levels > 0).double().mean()), "mean_levels": float(levels.mean()), "largest_levels": float(levels.max())}


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "least": min(values), "most": max(values), "of": len(values)}


def of_images(own: list[Tensor], plain: list[Tensor]) -> dict:
    """Sets of one way against the float32 sets of the same seeds, image by image; float32 sets of different seeds beside."""
    near = sorted(itertools.chain.from_iterable(of_one_image(a, b) for a, b in zip(own, plain)))
    apart = sorted(itertools.chain.from_iterable(of_one_image(a, b) for a, b in itertools.combinations(plain, 2)))
    quantiles = lambda values: {f"{q:g} %": float(np.quantile(values, q / 100)) for q in (50, 95, 100)}
    stored = [in_bytes(a, b) for a, b in zip(own, plain)]
    return {"relative_difference": quantiles(near), "of_two_seeds": quantiles(apart), "median_of_the_seeds_median": float(np.median(near) / np.median(apart)),
            **{name: statistics.fmean(row[name] for row in stored) for name in ("pixels_that_differ", "mean_levels")}, "largest_levels": max(row["largest_levels"] for row in stored)}


def of_sets(own: list[FeatureStatistics], plain: list[FeatureStatistics], data: FeatureStatistics) -> dict:
    """Frechet distances: to the float32 set of the same seed, of other seeds, and to the training images."""
    pairs = [(i, j) for i in range(len(own)) for j in range(len(plain)) if i != j]
    across, seeds = [frechet_distance(own[i], plain[j]) for i, j in pairs], [frechet_distance(plain[i], plain[j]) for i, j in pairs]
    to_data, plain_to_data = [frechet_distance(a, data) for a in own], [frechet_distance(b, data) for b in plain[:len(own)]]
    same = [frechet_distance(a, b) for a, b in zip(own, plain)]
    return {"same_seed": spread(same), "two_float32_seeds": spread(seeds), "other_seed": spread(across),
            "other_seed_minus_two_float32_seeds": spread([a - b for a, b in zip(across, seeds)]),
            "to_training_images": spread(to_data), "float32_to_training_images": spread(plain_to_data),
            "to_training_images_minus_float32": spread([a - b for a, b in zip(to_data, plain_to_data)]),
            "same_seed_no_larger": max(same) <= min(seeds), "other_seed_within_the_seeds": min(seeds) <= statistics.fmean(across) <= max(seeds)}


class Drawn:
    """Images of every way, setting and seed."""

    def __init__(self, options):
        self.options, device = options, options.device
        runs = Path(options.runs)
        self.files = {job: trained(runs, job) for job in ("conditional-seed10", "classifier-seed10", "features")}
        (self.unet, about), (self.guide, _), (net, _) = (load_network(path) for path, _ in self.files.values())
        self.diffusion, self.space = GaussianDiffusion(named_betas(about["noise_schedule"], 1000)), ClassifierSpace(net)
        self.networks = {"fp32": (self.unet.to(device).eval().requires_grad_(False), self.guide.to(device).eval().requires_grad_(False))}
        for way in options.ways:
            self.networks[way] = tuple(FastNetwork(network, WAYS[way], device=device) for network in self.networks["fp32"])

    def images(self, way: str, config: SamplerConfig, seed: int) -> Tensor:
        (net, guide), made = self.networks[way], []
        for indices in torch.arange(self.options.images, device=self.options.device).split(self.options.batch):
            y = indices % 10
            with full_float32():  # a GPU's shortcuts would hide what is looked for
                made.append(sample_images(net, self.diffusion, config, seed, indices, (1, 8, 8), lambda x, t, guide=guide, y=y: log_prob_grad(guide, x, t, y), {"y": y}).float().cpu())
        return torch.cat(made)

    def statistics(self, images: np.ndarray) -> FeatureStatistics:
        return feature_statistics(np.concatenate([layers["features"] for layers in extract(self.space, np.array_split(images, -(-len(images) // 256)))]))

    def seeds(self, way: str, config: SamplerConfig) -> int:
        """How many seeds are affordable; none for what takes hours."""
        if way != "fp16" or self.options.device != "cpu":
            return self.options.seeds
        return min(2, self.options.seeds) if config.sampler == "ddim" else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs/digits", help="folder of the digits size's runs")
    parser.add_argument("--images", type=int, default=380, help="of a set; a multiple of 10")
    parser.add_argument("--batch", type=int, default=380)
    parser.add_argument("--seeds", type=int, default=4, help="sets of every kind; 2 or more")
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--settings", nargs="*", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", help="JSON file; rows that are not drawn again stay in it")
    options = parser.parse_args()
    if options.images % 10 or options.images < 10 or options.seeds < 2:
        parser.error(f"--images must be a multiple of 10 and --seeds at least 2, got {options.images} and {options.seeds}")
    torch.set_num_threads(1)
    drawn, began = Drawn(options), time.perf_counter()
    again = set(itertools.product(options.settings, options.ways))
    rows = [row for row in read(options.out).get("rows", []) if (row["setting"], row["way"]) not in again]
    data = drawn.statistics(load_digits_dataset().images())
    for name in options.settings:
        config = SETTINGS[name]
        plain = [drawn.images("fp32", config, seed) for seed in range(options.seeds)]
        measured = [drawn.statistics(to_uint8(images).numpy()) for images in plain]
        for way in options.ways:
            own = [drawn.images(way, config, seed) for seed in range(drawn.seeds(way, config))]
            if not own:
                continue
            sets = of_sets([drawn.statistics(to_uint8(images).numpy()) for images in own], measured, data)
            rows.append({"setting": name, "way": way, "seeds": len(own), "images": of_images(own, plain), "frechet": sets})
            shown = rows[-1]["images"]
            print(f"{time.perf_counter() - began:6.0f} s  {name}, {way}: relative difference {shown['relative_difference']['50 %']:.2e} (95 %: {shown['relative_difference']['95 %']:.2e}), "
                  f"two seeds {shown['of_two_seeds']['50 %']:.3f}; bytes that differ {shown['pixels_that_differ']:.2%}; Frechet {sets['same_seed']['mean']:.2e} (same seed), "
                  f"{sets['other_seed']['mean']:.4f} (other seed), {sets['two_float32_seeds']['mean']:.4f} (two float32 seeds)", flush=True)
            results = {"rows": rows, "images": options.images, "batch": options.batch,
                       "weights_of_the_committed_records": {job: same for job, (_, same) in drawn.files.items() if job != "features"},
                       "weights_sha256": {job: sha256(path) for job, (path, _) in drawn.files.items()}}
            write(options.out, results | about_machine(options.device))


if __name__ == "__main__":
    main()
