"""Samplers that change the numbers, at the digits size: their quality beside their speed. One thread on a CPU.

    adm-repro reproduce conditional unconditional classifier features --size digits       # the networks, if they are not there
    python benchmarks/shortcuts.py quality --runs runs/digits --out benchmarks/results/shortcuts_digits.json      # an hour; continues
    python benchmarks/shortcuts.py time --runs runs/digits --arm conditional --out benchmarks/results/shortcuts_digits.json     # 2 minutes
    python benchmarks/shortcuts.py time --runs runs/digits --arm guided --out benchmarks/results/shortcuts_digits.json          # 3 minutes

Two models: one that is told the class, without guidance, and one that is not, guided by the noisy classifier at scale 10. Each seed has networks of its own, and
draws the same labels and the same initial noise with every sampler, so that samplers are compared in pairs. Quality is the Frechet distance to the training
images among the features of the size's digit classifier, as in the report of the digits; images that no network has seen are measured in the same way. A solver's own
error is how far its images are from those at the end of the same path, walked by Heun's method in 100 steps. Seconds are processor time of a block of 64 images
(on a GPU: of the clock), all samplers in turn, round after round. The intervals were chosen after a look at 1,000 images of seed 10.
"""
import argparse
import json
import os
import resource
import statistics
from dataclasses import dataclass, field
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import numpy as np
import torch
from common import about_machine, ceiling, interleaved, read

from adm_repro.checkpoints import load_network
from adm_repro.classifier import log_prob_grad
from adm_repro.cost import guide_macs
from adm_repro.data import load_dataset
from adm_repro.diffusion import GaussianDiffusion, named_betas
from adm_repro.evaluation import evaluate, target_probability
from adm_repro.features import ClassifierSpace
from adm_repro.files import write_json
from adm_repro.metrics import seed_interval
from adm_repro.sampling import SamplerConfig, evaluations, image_labels, sample_images, to_uint8
from adm_repro.shortcuts import DeepCache, deep_cache_macs

SEEDS, IMAGES, BLOCK, TIMED, PATH_IMAGES = (10, 11, 12), 2000, 250, 64, 500
METRICS = ("frechet_distance", "precision", "recall", "target_probability")


@dataclass(frozen=True)
class Way:
    """A way to sample."""

    name: str
    steps: str
    sampler: str
    deep_cache: int = 1
    more: dict = field(default_factory=dict)  # of the sampler's settings
    path: bool = True  # ends where the deterministic path does, but for errors

    def config(self, scale: float) -> SamplerConfig:
        return SamplerConfig(steps=self.steps, sampler=self.sampler, guidance_scale=scale, **self.more)


COMMON = [Way("ancestral, 250 steps", "250", "ancestral", path=False), *(Way(f"DDIM, {n} steps", f"ddim{n}", "ddim") for n in (50, 25, 15, 10)),
          *(Way(f"DPM-Solver++(2M), {n} steps", str(n), "dpm++2m") for n in (25, 15, 10)), *(Way(f"Heun, {n} steps", str(n), "heun") for n in (25, 13)),
          *(Way(f"DDIM, 50 steps, deep features every {k}", "ddim50", "ddim", k) for k in (2, 3, 5))]
INTERVALS = [Way(f"DDIM, 50 steps, guided in {low:g} to {high:g}", "ddim50", "ddim", more={"guidance_interval": (low, high)}, path=False)
             for low, high in ((0.0, 0.5), (0.1, 0.5), (0.2, 0.8), (0.3, 1.0))]
ARMS = {"conditional": (0.0, COMMON), "guided": (10.0, COMMON + INTERVALS)}  # scale, ways
BASES = ("ancestral, 250 steps", "DDIM, 50 steps")  # what the others are compared with


class Arm:
    """The networks of a model and a seed."""

    def __init__(self, name: str, seed: int, runs: Path, device: str):
        self.name, self.seed, self.device, (self.scale, self.ways) = name, seed, device, ARMS[name]
        self.files = {kind: weights(runs, f"{kind}-seed{seed}") for kind in (("conditional",) if name == "conditional" else ("unconditional", "classifier"))}
        (self.net, about), *guide = [load_network(file) for file in self.files.values()]
        self.net, self.guide = self.net.to(device).eval().requires_grad_(False), guide[0][0].to(device).eval().requires_grad_(False) if guide else None
        self.process = GaussianDiffusion(named_betas(about["noise_schedule"], 1000))

    def draw(self, way: Way, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images in [-1, 1] and labels."""
        indices = indices.to(self.device)
        labels, config, net = image_labels(self.seed, indices, 10), way.config(self.scale), self.net.config
        grad_fn = None if self.guide is None else lambda x, t: log_prob_grad(self.guide, x, t, labels)
        denoiser = DeepCache(self.net, way.deep_cache) if way.deep_cache > 1 else self.net
        return sample_images(denoiser, self.process, config, self.seed, indices, (net.in_channels, net.image_size, net.image_size), grad_fn, {"y": labels} if net.classes else {}), labels

    def cost(self, way: Way) -> dict:
        asked, guiding = evaluations(1000, way.config(self.scale))
        own, grad = asked * deep_cache_macs(self.net, way.deep_cache, asked), guiding * guide_macs(self.guide) if self.guide else 0
        return {"evaluations": asked, "guided_evaluations": guiding, "gmacs_per_image": round((own + grad) / 1e9, 4)}


def weights(runs: Path, name: str) -> Path:
    found = sorted(runs.glob(f"{name}-*/weights.safetensors"))
    if len(found) != 1:
        raise SystemExit(f"{runs} holds {len(found)} runs of {name} with weights: adm-repro reproduce conditional unconditional classifier features --size digits")
    return found[0]


def made_of(file: Path) -> str:
    """The hash of a run's weights, as its record has it."""
    result = json.loads((file.parent / "record.json").read_text())["result"]
    return result.get("weights_sha256") or result["feature_space"]


def unchanged(arm: Arm) -> None:
    """An interval that holds everything and features that are never kept change nothing."""
    plain, indices = Way("", "10", "ddim"), torch.arange(4)
    images = arm.draw(plain, indices)[0]
    whole = arm.draw(Way("", "10", "ddim", more={"guidance_interval": (0.0, 1.0)} if arm.scale else {}), indices)[0]
    net, arm.net = arm.net, DeepCache(arm.net, 1)
    kept = arm.draw(plain, indices)[0]
    arm.net = net
    assert torch.equal(images, whole) and torch.equal(images, kept)


def row_of(results: dict, arm: str, way: Way) -> dict:
    rows = results["arms"].setdefault(arm, [])
    if not any(row["what"] == way.name for row in rows):
        rows.append({"what": way.name, "by_seed": {}})
    return next(row for row in rows if row["what"] == way.name)


def quality(results: dict, runs: Path, device: str, save) -> None:
    reference, held_out = load_dataset("digits", "train", 8), load_dataset("digits", "test", 8)
    file = weights(runs, "features")
    space = ClassifierSpace(load_network(file)[0].to(device), "classifier of digits/train")
    unseen = held_out.images()
    results |= {"images": IMAGES, "seeds": list(SEEDS), "feature_space": space.identity, "weights": results.get("weights", {}),
                "unseen": {"count": len(held_out)} | measured(space, reference, unseen, held_out.labels)}
    for seed in SEEDS:
        for name in ARMS:
            arm = Arm(name, seed, runs, device)
            results["weights"] |= {f"{kind}-seed{seed}": made_of(file) for kind, file in arm.files.items()}
            unchanged(arm)
            ends = None
            for way in arm.ways:
                row = row_of(results, name, way)
                row |= arm.cost(way)
                if str(seed) in row["by_seed"]:
                    continue
                images, labels = (torch.cat(parts) for parts in zip(*(arm.draw(way, block) for block in torch.arange(IMAGES).split(BLOCK))))
                found = measured(space, reference, to_uint8(images).cpu().numpy(), labels.cpu().numpy())
                if way.path:
                    if ends is None:
                        ends = torch.cat([arm.draw(Way("", "100", "heun"), block)[0] for block in torch.arange(PATH_IMAGES).split(BLOCK)])
                    found["from_the_end_of_the_path"] = float((images[:PATH_IMAGES] - ends).square().mean().sqrt())
                row["by_seed"][str(seed)] = found
                print(name, seed, way.name, found, flush=True)
                save()


def measured(space: ClassifierSpace, reference, images: np.ndarray, labels: np.ndarray) -> dict:
    found = evaluate(reference.images(), images, space, ("frechet", "precision", "recall")).metrics
    return {key: float(found[key]) for key in METRICS[:3]} | {"target_probability": float(target_probability(space, images, labels))}


def speed(results: dict, runs: Path, device: str, name: str, rounds: int) -> None:
    arm, indices = Arm(name, SEEDS[0], runs, device), torch.arange(TIMED)
    unchanged(arm)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    timed, peak = interleaved({way.name: lambda way=way: arm.draw(way, indices) for way in arm.ways}, rounds, device), ceiling(device, torch.float32) / 1e9
    found = {way: [took / TIMED for took in seconds] for way, (_, seconds) in timed.items()}
    for way in arm.ways:
        times, row = found[way.name], row_of(results, name, way)
        gflops = 2 * row["gmacs_per_image"] / statistics.median(times)
        row |= {"seconds_per_image": {"median": statistics.median(times), "low": min(times), "high": max(times)}, "gflop_per_second": round(gflops, 2), "share_of_ceiling": round(gflops / peak, 3),
                "faster_than": {base: round(statistics.median(b / t for b, t in zip(found[base], times)), 2) for base in BASES}}
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if device == "cpu" else torch.cuda.max_memory_allocated()
    results.setdefault("timed", {})[name] = {"rounds": rounds, "images": TIMED, "clock": "processor" if device == "cpu" else "wall", "ceiling_gflop_per_second": round(peak, 1), "peak_gib": round(memory / 2**30, 2),
                                             "torch": torch.__version__} | about_machine(device)


def summarise(results: dict) -> None:
    """Means and intervals over seeds, and changes against the bases: geometric means of the seeds' ratios."""
    def over_seeds(numbers: list[float], shown=float) -> dict:
        interval = seed_interval(numbers)
        return {"mean": shown(interval.mean)} | ({"low": shown(interval.low), "high": shown(interval.high)} if len(numbers) > 1 else {})

    for rows in results["arms"].values():
        distances = {row["what"]: {seed: found["frechet_distance"] for seed, found in row["by_seed"].items()} for row in rows}
        for row in rows:
            for metric in sorted({key for found in row["by_seed"].values() for key in found}):
                row[metric] = over_seeds([found[metric] for found in row["by_seed"].values()])
            both = {base: [np.log(own / distances[base][seed]) for seed, own in distances[row["what"]].items() if seed in distances[base]] for base in BASES if base in distances}
            row["distance_against"] = {base: over_seeds(logarithms, lambda x: float(np.exp(x))) for base, logarithms in both.items() if logarithms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=["quality", "time"])
    parser.add_argument("--runs", type=Path, required=True, help="folder of the digits size: runs/digits")
    parser.add_argument("--arm", choices=ARMS, default="conditional", help="which model is timed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, required=True, help="JSON file; what it holds already is kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = read(options.out) or {"size": "digits", "arms": {}}

    def save() -> None:
        summarise(results)
        write_json(options.out, results)

    if options.section == "quality":
        quality(results, options.runs, options.device, save)
    else:
        if options.arm not in results["arms"]:
            raise SystemExit(f"{options.out} holds no quality of the {options.arm} model yet: run the section quality first")
        speed(results, options.runs, options.device, options.arm, options.rounds)
    save()


if __name__ == "__main__":
    main()
