"""Throughput against batch size, image size, steps and processes, and what `--dry-run --measure` would have said beside it.

    python benchmarks/scaling.py --out benchmarks/results/scaling_cpu.json       # about 10 minutes; also writes scaling_cpu.png
    python benchmarks/scaling.py --device cuda --out benchmarks/results/scaling_cuda.json
    python benchmarks/scaling.py --plot benchmarks/results/scaling_cpu.json      # only the picture

Each point is a run of `draw`: images on disk in the end, by guided ancestral steps of an ADM U-Net with random weights (64 channels,
three levels, attention, ten classes; classifier of 32 channels). Beside it stands the prediction: a few steps, timed by the function
behind `--dry-run --measure`, in the same round; rounds alternate, medians are kept. On a CPU each process has one thread, and seconds are
processor time, because the machine does other work (its load is recorded); the wall's are recorded where there are two processes.
"""
import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import matplotlib.pyplot as plt
import torch
from common import about_machine, clock, randomised, read, write

from adm_repro.classifier import ClassifierConfig, NoisyClassifier
from adm_repro.cost import StepTime, forward_macs, guide_macs
from adm_repro.data import load_digits_dataset
from adm_repro.diffusion import GaussianDiffusion, named_betas
from adm_repro.drawing import Drawing, draw, drawing_seconds, measure_drawing
from adm_repro.pretrained import Pretrained
from adm_repro.processes import launch, rank, world
from adm_repro.sampling import SamplerConfig
from adm_repro.training import DenoisingObjective, TrainConfig, measure_training, train
from adm_repro.unet import UNet, UNetConfig

SECTIONS = ("batch", "size", "steps", "processes", "training")
KINDS = {"cpu": dict(batch=(1, 2, 4, 8, 16), line=(2, 8), size=(8, 16, 32, 64), images=4, at=32, step_counts=(5, 10, 25, 50), steps=20, seconds=2.0, training=80),
         "cuda": dict(batch=(1, 4, 16, 64, 256), line=(4, 64), size=(16, 32, 64, 128), images=32, at=64, step_counts=(5, 10, 25, 50), steps=25, seconds=1.0, training=150),
         "tiny": dict(batch=(1, 2), line=(1, 2), size=(8, 16), images=1, at=8, step_counts=(4, 5), steps=4, seconds=0.1, training=4)}


def guided(size: int, steps: int, options) -> Drawing:
    shared = dict(image_size=size, in_channels=3, channel_mult=(1, 2, 2), depth=1, attention_resolutions=(size // 4,), head_channels=32, classes=10)
    net, guide = (Pretrained(randomised(network)) for network in (UNet(UNetConfig(**shared, width=64)), NoisyClassifier(ClassifierConfig(**shared, width=32))))
    return Drawing(net, SamplerConfig(steps=str(steps), guidance_scale=1.0), guide, precision=options.precision, fast=options.fast)


def timed(options, function):
    """Seconds of the clock that counts, and of the wall's."""
    start, wall = clock(options.device), time.perf_counter()
    function()
    return clock(options.device) - start, time.perf_counter() - wall


def drawn(options, drawing: Drawing, count: int, block: int, folder: Path | None = None) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as own:
        return timed(options, lambda: draw(drawing, count, folder or Path(own, "drawn"), block, device=options.device, progress=False))


def percent(predicted: float, measured: float) -> float:
    return round(100 * (predicted / measured - 1), 1)


class Benchmark:
    def __init__(self, options):
        self.options, self.kind, self.rows = options, KINDS[options.kind], []

    def note(self, **row) -> None:
        row = {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in row.items()}
        self.rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)

    def rounds(self, points: dict) -> tuple[dict, dict]:
        """name -> (drawing, images, block): times of a step as measured beforehand, and seconds of runs, of all rounds."""
        times, runs = {name: [] for name in points}, {name: [] for name in points}
        for _ in range(self.options.rounds):
            for name, (drawing, count, block) in points.items():
                times[name].append(measure_drawing(drawing, count, block, self.options.device, seconds=self.kind["seconds"])[0])
                runs[name].append(drawn(self.options, drawing, count, block)[0])
        return times, {name: statistics.median(seconds) for name, seconds in runs.items()}

    def predicted(self, drawing: Drawing, count: int, block: int, rounds: list, processes: int = 1) -> float:
        """Median of the rounds' predictions; each round is a list of measurements."""
        return statistics.median(drawing_seconds(drawing, count, block, times, processes) for times in rounds)

    def batch(self) -> None:
        drawing, (low, high) = guided(self.kind["at"], self.kind["steps"], self.options), self.kind["line"]
        points = {n: (drawing, n, n) for n in self.kind["batch"]}
        times, runs = self.rounds(points)
        for n, seconds in runs.items():
            own = self.predicted(drawing, n, n, [[time] for time in times[n]])
            line = None if n in (low, high) else self.predicted(drawing, n, n, list(map(list, zip(times[low], times[high]))))
            self.note(images=n, image_size=self.kind["at"], steps=self.kind["steps"], seconds=seconds, predicted=own, deviation_percent=percent(own, seconds), samples_per_second=n / seconds,
                      guided_step_images_per_second=n / statistics.median(time.step for time in times[n]),
                      **({} if line is None else {f"predicted_on_the_line_through_{low}_and_{high}": line, "line_deviation_percent": percent(line, seconds)}))

    def size(self) -> None:
        n, steps = self.kind["images"], self.kind["steps"]
        points = {size: (guided(size, steps, self.options), n, n) for size in self.kind["size"]}
        times, runs = self.rounds(points)
        macs = {size: forward_macs(drawing.model.network) + guide_macs(drawing.guide.network) for size, (drawing, _, _) in points.items()}
        at, known = self.kind["at"], {size: self.predicted(drawing, n, n, [[time] for time in times[size]]) for size, (drawing, _, _) in points.items()}
        for size, seconds in runs.items():
            by_operations = known[at] * macs[size] / macs[at]
            self.note(images=n, image_size=size, steps=steps, seconds=seconds, predicted=known[size], deviation_percent=percent(known[size], seconds), samples_per_second=n / seconds,
                      guided_step_images_per_second=n / statistics.median(time.step for time in times[size]), gmacs_per_image_and_step=macs[size] / 1e9,
                      achieved_gflop_per_second=2e-9 * macs[size] * n * steps / seconds, **{f"by_operations_from_{at}": by_operations},
                      by_operations_deviation_percent=percent(by_operations, seconds))

    def steps(self) -> None:
        n = self.kind["images"]
        times, runs = self.rounds({steps: (guided(self.kind["at"], steps, self.options), n, n) for steps in self.kind["step_counts"]})
        first = times[self.kind["step_counts"][0]]  # one measurement serves all numbers of steps
        for steps, seconds in runs.items():
            own = self.predicted(guided(self.kind["at"], steps, self.options), n, n, [[time] for time in first])
            self.note(images=n, image_size=self.kind["at"], steps=steps, seconds=seconds, predicted=own, deviation_percent=percent(own, seconds), samples_per_second=n / seconds)

    def processes(self) -> None:
        """Weak scaling: each process makes two blocks, whatever their number."""
        n, drawing, alone = self.kind["images"], guided(self.kind["at"], self.kind["steps"], self.options), None
        for processes in sorted({1, *([2] if self.options.device == "cpu" else [2**i for i in range(8) if 2 <= 2**i <= torch.cuda.device_count()])}):
            with tempfile.TemporaryDirectory() as folder:
                asked = [f"--{name}={value}" for name, value in (("worker", folder), ("device", self.options.device), ("precision", self.options.precision), ("rounds", self.options.rounds))]
                if launch(processes, __file__, *asked, *["--fast"] * self.options.fast, *["--tiny"] * (self.options.kind == "tiny")):
                    raise SystemExit("a process failed")
                found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
            count = 2 * n * processes
            times = [[StepTime(**said)] for said in found[0]["times"]]  # of the slowest process, as all of them know
            alone = alone or times
            seconds, wall = (statistics.median(max(each) for each in zip(*(process[key] for process in found))) for key in ("seconds", "wall"))
            own, other = self.predicted(drawing, count, n, times, processes), self.predicted(drawing, count, n, alone, processes)
            self.note(processes=processes, images=count, block_size=n, image_size=self.kind["at"], steps=self.kind["steps"], seconds=seconds, predicted=own, deviation_percent=percent(own, seconds),
                      samples_per_second=count / seconds, predicted_from_one_process=other, from_one_process_deviation_percent=percent(other, seconds),
                      best_wall_seconds=min(max(each) for each in zip(*(process["wall"] for process in found))), median_wall_seconds=wall)

    def training(self) -> None:
        digits, objective = load_digits_dataset("train"), DenoisingObjective(GaussianDiffusion(named_betas("linear", 1000)))
        shape, steps, ratios = dict(image_size=8, in_channels=1, width=64, channel_mult=(1, 2), depth=1, attention_resolutions=(4,), head_channels=32, classes=10), self.kind["training"], []
        config = TrainConfig(steps, 32, flip=False, precision=self.options.precision, save_every=steps, log_every=steps)
        for _ in range(self.options.rounds):
            took = measure_training(UNet(UNetConfig(**shape)), objective, digits, config, self.options.device, self.kind["seconds"])
            with tempfile.TemporaryDirectory() as folder:
                seconds = timed(self.options, lambda folder=folder: train(UNet(UNetConfig(**shape)), objective, digits, config, folder, self.options.device, progress=False))[0]
            ratios.append((steps * took.step, seconds))
        predicted, seconds = (statistics.median(values) for values in zip(*ratios))
        self.note(images=32, image_size=8, training_steps=steps, seconds=seconds, predicted=predicted, deviation_percent=percent(predicted, seconds), training_images_per_second=32 * steps / seconds)


def worker(options) -> None:
    """One of several processes: measures with the others, and draws its blocks beside them."""
    kind = KINDS[options.kind]
    n, drawing, found = kind["images"], guided(kind["at"], kind["steps"], options), {"times": [], "seconds": [], "wall": []}
    for number in range(options.rounds):
        found["times"].append(vars(measure_drawing(drawing, 2 * n * world(), n, options.device, seconds=kind["seconds"])[0]))
        seconds, wall = drawn(options, drawing, 2 * n * world(), n, Path(options.worker) / f"drawn{number}")
        found["seconds"].append(seconds)
        found["wall"].append(wall)
    Path(options.worker, f"{rank()}.json").write_text(json.dumps(found))


def plot(results: dict, path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(11, 8.5), layout="constrained")

    def panel(axis, section: str, x: str, title: str, label: str, other: str = "", name: str = "", colour: str = "C2", seconds: bool = False) -> None:
        """Measured and predicted points; `other` begins the key of another prediction."""
        rows = results[section]["rows"]
        shown = lambda row, key: row[key] if seconds else row["images"] / row[key]
        axis.plot([row[x] for row in rows], [shown(row, "seconds") for row in rows], "o", color="C0", label="measured: whole samples on disk")
        axis.plot([row[x] for row in rows], [shown(row, "predicted") for row in rows], "_", color="C1", markersize=16, markeredgewidth=2, label="predicted: a few steps, timed")
        if key := next((key for row in rows for key in row if other and key.startswith(other)), None):
            also = [row for row in rows if key in row]
            axis.plot([row[x] for row in also], [shown(row, key) for row in also], "x", color=colour, label=name.format(*[word for word in key.split("_") if word.isdigit()]))
        axis.set(title=title, xlabel=label, ylabel="seconds" if seconds else "images/s, whole samples")
        axis.grid(alpha=0.3)
        axis.set_xticks(sorted({row[x] for row in rows}))

    def doubling(axis, steps: int) -> None:
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(axis.lines[0].get_xdata()), [f"{value:g}" for value in axis.lines[0].get_xdata()])
        axis.minorticks_off()
        axis.secondary_yaxis("right", functions=(lambda rate: steps * rate, lambda rate: rate / steps)).set_ylabel("images/s of a guided step")

    about, size = results["batch"], results["size"]["rows"][0]
    panel(axes[0, 0], "batch", "images", f"Block size ({about['rows'][0]['image_size']} pixels, {about['rows'][0]['steps']} steps)", "images computed together", "predicted_on", "predicted: line through {} and {}")
    panel(axes[0, 1], "size", "image_size", f"Image size ({size['images']} images together, {size['steps']} steps)", "side of the image, pixels", "by_operations_from",
          "by operations, from {} pixels: not used", "C3")
    panel(axes[1, 0], "steps", "steps", f"Steps ({results['steps']['rows'][0]['image_size']} pixels, {results['steps']['rows'][0]['images']} images together)", "steps per image", seconds=True)
    panel(axes[1, 1], "processes", "processes", "Processes (each makes two blocks)", "processes", "predicted_from_one", "predicted: measured in one process")
    axes[0, 1].set_yscale("log", base=2)
    axes[0, 1].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    doubling(axes[0, 0], about["rows"][0]["steps"])
    doubling(axes[0, 1], size["steps"])
    axes[1, 1].set_xlim(0.5, results["processes"]["rows"][-1]["processes"] + 0.5)
    for axis in axes.flat:
        if axis.get_yscale() == "linear":
            axis.set_ylim(0, 1.1 * max(max(line.get_ydata()) for line in axis.lines))
        axis.legend(fontsize=9, loc="upper left" if axis is axes[1, 0] else "lower left" if axis is axes[0, 1] else "lower right")
    figure.suptitle(f"Guided sampling on {about['hardware']}, {about['precision']}{', fast' * about['fast']}; seconds of {about['clock']}", fontsize=11)
    figure.savefig(path, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tiny", dest="kind", action="store_const", const="tiny", help="fewest and smallest points, to see that everything runs")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--fast", action="store_true", help="networks arranged for speed; on a GPU each shape may be compiled first")
    parser.add_argument("--rounds", type=int, help="default: 3 on a CPU, 2 on a GPU")
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--out", type=Path, help="JSON file; sections that were not run keep their rows")
    parser.add_argument("--plot", type=Path, help="draw the picture of this JSON file, and measure nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.precision = options.precision or ("fp32" if options.device == "cpu" else "bf16")
    options.rounds = options.rounds or (3 if options.device == "cpu" else 2)
    options.kind = options.kind or options.device
    torch.set_num_threads(1)
    if options.worker:
        return worker(options)
    if options.plot:
        return plot(json.loads(options.plot.read_text()), options.plot.with_suffix(".png"))
    results = read(options.out)
    for section in options.only:
        benchmark, before, start = Benchmark(options), os.getloadavg()[0], time.perf_counter()
        print(section, flush=True)
        getattr(benchmark, section)()
        results[section] = {"rows": benchmark.rows, "precision": options.precision, "fast": options.fast, "rounds": options.rounds,
                            "clock": "processor time" if options.device == "cpu" else "wall time", "load_average": [round(load, 1) for load in (before, os.getloadavg()[0])],
                            "wall_seconds": round(time.perf_counter() - start, 1)} | about_machine(options.device)
        write(options.out, results)
    deviations = {f"{section}: {key}": row[key] for section in results for row in results[section]["rows"] for key in ("deviation_percent", "line_deviation_percent") if key in row}
    print("largest deviation of a prediction:", max(deviations.items(), key=lambda item: abs(item[1])))
    if options.out and set(SECTIONS) <= set(results):
        plot(results, options.out.with_suffix(".png"))
    return None


if __name__ == "__main__":
    main()
