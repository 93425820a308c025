"""Do images come as fast as steps are computed? Guided 64x64 images, 25 DDIM steps, drawn, written, assembled and scored, against the time of a step measured in the same run.

    python benchmarks/end_to_end.py --out benchmarks/results/end_to_end.json                                    # about 3 minutes on a CPU, one thread
    python benchmarks/end_to_end.py --device cuda --out benchmarks/results/end_to_end_cuda.json                  # 10,000 images of a small network
    python benchmarks/end_to_end.py --device cuda --network imagenet64 --num 50000 --precision bf16             # the paper's number; some 20 minutes

The weights are random, so the images are noise; the work is that of trained ones. `draw` makes a file of images by fast networks, in blocks, and `evaluate` measures it
against a reference by a small feature network. A step's time is that of whole blocks of 25 steps, computed on their own before and after, and divided; it holds neither
copies nor files. One block is drawn twice beforehand: that fills the caches of the compiler and of what was tuned, and says what a start takes when they are filled, which
matters less the more images follow. On a CPU the comparison is between processor times, of all threads; the clock's are beside.
"""
import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import numpy as np
import torch
from common import about_machine, our_networks, randomised, write

from adm_repro.batches import SampleBlock, open_batch
from adm_repro.classifier import ClassifierConfig, NoisyClassifier
from adm_repro.drawing import Drawing, _repeatable, block_sampler, draw, placed
from adm_repro.evaluation import evaluate
from adm_repro.features import ClassifierSpace, FeatureConfig, FeatureNet
from adm_repro.pretrained import Pretrained, Process
from adm_repro.sampling import SamplerConfig
from adm_repro.unet import UNet, UNetConfig

STEPS, TARGET = 25, 1.10  # times what the steps alone take
SIZES = {"tiny": 16, "small": 64, "imagenet64": 64}


def drawing(name: str, precision: str) -> Drawing:
    if name == "imagenet64":
        nets = our_networks(name)[:2]
    else:
        layout = dict(image_size=SIZES[name], in_channels=3, width=32, channel_mult=(1, 1, 2), depth=1, attention_resolutions=(16,), head_channels=32, classes=1000)
        nets = randomised(UNet(UNetConfig(**layout))), randomised(NoisyClassifier(ClassifierConfig(**layout)), 1)
    model, guide = (Pretrained(net, Process("cosine")) for net in nets)
    return Drawing(model, SamplerConfig(steps=f"ddim{STEPS}", sampler="ddim", guidance_scale=1.0), guide, precision=precision, fast=True)


class Times:
    """Seconds on the clock and of the processor since the last question."""

    def __init__(self, device: torch.device):
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.since()

    def since(self) -> np.ndarray:
        self.wait()
        now = np.array([time.perf_counter(), time.process_time()])
        took, self.last = now - getattr(self, "last", now), now
        return took


@contextlib.contextmanager
def drawing_way(tuned: dict | None, precision: str) -> Iterator[None]:
    """What `draw` asks of the compiler and of cuDNN, so that steps on their own are computed as it computes them."""
    with _repeatable(1, precision == "fp32"), contextlib.nullcontext() if (tuned or {}).get("compiled", True) else torch.compiler.set_stance("force_eager"):
        yield


def step_seconds(sample_block: SampleBlock, block_size: int, device: torch.device, rounds: int) -> list[np.ndarray]:
    """Of one image and step, from whole blocks; the first compiles and records, and is not counted."""
    times, found = Times(device), []
    for number in range(rounds + 1):
        times.since()
        sample_block(torch.arange(block_size))
        found += [times.since() / block_size / STEPS] * (number > 0)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--network", choices=SIZES, default="small")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--num", type=int, help="images  [default: 10,000 on a GPU, 128 on a CPU]")
    parser.add_argument("--block-size", type=int, help="[default: 256 on a GPU, 8 on a CPU]")
    parser.add_argument("--rounds", type=int, default=2, help="blocks that are timed before, and after")
    parser.add_argument("--scratch", help="folder for the images; it is left empty")
    parser.add_argument("--out", help="JSON file to write")
    options = parser.parse_args()
    device, gpu = torch.device(options.device), options.device == "cuda"
    num, block_size = options.num or (10_000 if gpu else 128), options.block_size or (256 if gpu else 8)
    size = SIZES[options.network]
    torch.set_num_threads(1)
    of = drawing(options.network, options.precision)
    space = ClassifierSpace(FeatureNet(FeatureConfig(size, 3, classes=10, width=8)).to(device), "a small network of random weights")
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        os.environ["ADM_REPRO_CACHE"] = f"{folder}/cache"
        reference = np.random.default_rng(0).integers(0, 256, (max(256, num // 5), 8, 8, 3), dtype=np.uint8).repeat(size // 8, 1).repeat(size // 8, 2)
        draw(of, block_size, Path(folder, "first"), block_size, device=device, progress=False)
        tuned = json.loads(Path(folder, "first", "settings.json").read_text()).get("tuned")
        with drawing_way(tuned, options.precision):
            sample_block = block_sampler(of, device, None, placed(of, device), (tuned or {}).get("recorded"), True)
            steps, times = step_seconds(sample_block, block_size, device, options.rounds), Times(device)
        times.since()
        draw(of, block_size, Path(folder, "second"), block_size, device=device, progress=False)
        start_took = times.since()
        drawn = draw(of, num, Path(folder, "drawn"), block_size, device=device, progress=False)
        drawing_took = times.since()
        evaluation = evaluate(reference, drawn.path, space)
        scoring_took = times.since()
        with drawing_way(tuned, options.precision):
            steps += step_seconds(sample_block, block_size, device, options.rounds)
        assert len(open_batch(drawn.path)) == num == evaluation.samples
        assert json.loads(Path(folder, "drawn", "settings.json").read_text()).get("tuned") == tuned
    which = 0 if gpu else 1
    step = np.median(steps, axis=0)
    alone = step * num * STEPS
    ratio, start = float(((drawing_took + scoring_took) / alone)[which]), np.maximum(start_took - step * block_size * STEPS, 0)
    row = {"what": f"{num} guided {size}x{size} images, {STEPS} DDIM steps, {options.network} network", "precision": options.precision, "block_size": block_size, "tuned": tuned,
           "clock": "wall" if gpu else "processor", "ms_per_image_and_step": round(1000 * float(step[which]), 4),
           "ms_from_to": [round(1000 * float(f(s[which] for s in steps)), 4) for f in (min, max)],
           "seconds_of_steps_alone": round(float(alone[which]), 2), "seconds_drawn_and_written": round(float(drawing_took[which]), 2),
           "seconds_scored": round(float(scoring_took[which]), 2), "ratio": round(ratio, 4), "seconds_of_a_start": round(float(start[which]), 2), "ratio_without_start": round(float(((drawing_took + scoring_took - start) / alone)[which]), 4),
           "ratio_from_to": [round(float((drawing_took + scoring_took)[which] / num / STEPS / f(s[which] for s in steps)), 4) for f in (max, min)], "target": TARGET, "reached": ratio <= TARGET,
           "wall_seconds_of_all": round(float((drawing_took + scoring_took)[0]), 1)}
    print("\n".join(f"{key}: {value}" for key, value in row.items()))
    write(options.out, {"rows": [row]} | about_machine(options.device))


if __name__ == "__main__":
    main()
