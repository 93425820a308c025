"""Small batches: what a step of a guided trajectory takes for 1 and for 4 images, in the original, plain, fast, and fast with recorded steps.

    python benchmarks/latency.py --original PATH/TO/guided-diffusion --out benchmarks/results/latency.json                   # about 3 minutes on a CPU
    python benchmarks/latency.py --original PATH/TO/guided-diffusion --device cuda --out benchmarks/results/latency_cuda.json

On a GPU the networks are those of the released 64x64 and 256x256 models, the original in float16 as its README runs it (its classifier in float32), ours in bfloat16;
on a CPU one of 32x32, all in float32. All four have the same random weights, of which none is zero, and draw trajectories of few steps from the same noise.
First the images after one step are compared. Then every round runs each of them once; a ratio is the median of the rounds' ratios.
A CPU replays nothing: there the last column is the same as the one before, and is left out.
"""
import argparse
import gc
import os
import statistics
from collections.abc import Callable
from unittest import mock

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import torch
import torch.nn.functional as F
from common import about_machine, clock, original_modules, original_network, our_networks, write

from adm_repro.classifier import log_prob_grad
from adm_repro.cost import forward_macs, guide_macs
from adm_repro.diffusion import GaussianDiffusion, named_betas
from adm_repro.fast import FastNetwork
from adm_repro.graphs import FastSampler, ReverseStep
from adm_repro.noise import normals
from adm_repro.sampling import SamplerConfig, sample_images

Seen = Callable[[torch.Tensor], object]  # is shown the images after each step
NETWORKS = {8: "tiny", 32: "narrow", 64: "imagenet64", 256: "imagenet256"}  # size -> name
TOLERANCE = {"fp32": 5e-6, "bf16": 5e-2}  # relative, of what one step changes in the image


class Guided:
    """A guided trajectory of the same networks in the four ways."""

    def __init__(self, checkout: str, nets: list, size: int, batch: int, steps: int, device: str, compiled: bool):
        self.steps, self.device, self.shape, self.precision = steps, device, (3, size, size), "bf16" if device == "cuda" else "fp32"
        self.indices, self.y = torch.arange(batch, device=device), torch.arange(batch, device=device) * 37 % 1000
        self.gflop = 2e-9 * batch * (forward_macs(nets[0]) + guide_macs(nets[1]))
        self.diffusion, self.config = GaussianDiffusion(named_betas("linear", 1000)), SamplerConfig(steps=str(steps), guidance_scale=1.0)
        self.ways = {"original": self.original(checkout, nets)} if checkout else {}
        fast = [FastNetwork(net, self.precision, device=device, compiled=None if compiled else False) for net in nets]
        self.ways |= {"plain": self.plain(*(net.to(device) for net in nets)), "fast": self.fast(*fast, False)} | ({"fast, recorded": self.fast(*fast, True)} if device == "cuda" else {})

    def start(self) -> torch.Tensor:
        return normals(0, self.indices, self.shape, "initial noise")

    def noise(self, step: int) -> torch.Tensor:
        return normals(0, self.indices, self.shape, "step noise", step)

    def original(self, checkout: str, nets: list):
        theirs = [original_network(checkout, net, half and self.device == "cuda", self.device) for net, half in zip(nets, (True, False))]
        process = original_modules(checkout)[0].create_gaussian_diffusion(steps=1000, learn_sigma=True, noise_schedule="linear", timestep_respacing=str(self.steps))

        def cond_fn(x, t, y=None):
            with torch.enable_grad():
                x_in = x.detach().requires_grad_(True)
                log_probs = F.log_softmax(theirs[1](x_in, t), dim=-1)
                return torch.autograd.grad(log_probs[range(len(log_probs)), y.view(-1)].sum(), x_in)[0]

        def draw(seen: Seen | None = None) -> None:
            numbers = iter(range(self.steps - 1, -1, -1))
            with mock.patch.object(torch, "randn_like", lambda _: self.noise(next(numbers))):
                for out in process.p_sample_loop_progressive(lambda x, t, y=None: theirs[0](x, t, y), (len(self.y), *self.shape), noise=self.start(), cond_fn=cond_fn,
                                                             model_kwargs={"y": self.y}, device=self.device):
                    if seen:
                        seen(out["sample"])
        return draw

    def plain(self, net, guide):
        def draw(seen: Seen | None = None) -> None:
            with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
                sample_images(net, self.diffusion, self.config, 0, self.indices, self.shape, lambda x, t: log_prob_grad(guide, x, t, self.y), {"y": self.y},
                              (lambda _, x: seen(x)) if seen else None)
        return draw

    def fast(self, net, guide, record: bool):
        sampler = FastSampler(ReverseStep(net, self.diffusion, self.config, guide), 0, self.shape, record)

        def draw(seen: Seen | None = None) -> None:
            sampler(self.indices, self.y, callback=(lambda _, x: seen(x)) if seen else None)
            if record and not sampler.recording:
                raise SystemExit(f"nothing was recorded: {sampler.failure}")
        return draw

    def errors(self) -> dict[str, float]:
        """Of one step, relative to what it changes, against the original or else the plain one."""
        images = {}
        for name, draw in self.ways.items():
            draw(lambda x, name=name: images.setdefault(name, x))
        first = next(iter(images.values()))
        found = {name: float((x - first).norm() / (first - self.start()).norm()) for name, x in images.items()}
        if max(found.values()) > TOLERANCE[self.precision]:
            raise SystemExit(f"the images differ: {found}")
        return found

    def seconds(self, name: str) -> float:
        """Of a step."""
        start = clock(self.device)
        self.ways[name]()
        return (clock(self.device) - start) / self.steps


def measure(guided: Guided, size: int, batch: int, rounds: int) -> list[dict]:
    errors = guided.errors()
    seconds = {name: [] for name in guided.ways}
    for number in range(rounds + 1):
        for name in guided.ways:
            took = guided.seconds(name)
            seconds[name] += [took] * (number > 0)
    rows, first = [], next(iter(guided.ways))
    for name, values in seconds.items():
        ratios = [other / own for other, own in zip(seconds[first], values)]
        rows.append({"what": name, "size": size, "batch": batch, "precision": "fp16, classifier fp32" if name == "original" and guided.precision == "bf16" else guided.precision,
                     "ms_per_step": round(1000 * statistics.median(values), 3), "from_to": [round(1000 * min(values), 3), round(1000 * max(values), 3)],
                     "gflop_per_second": round(guided.gflop / statistics.median(values), 1), f"times_as_fast_as_{first}": round(statistics.median(ratios), 3),
                     "ratio_from_to": [round(min(ratios), 3), round(max(ratios), 3)], "relative_error_of_a_step": float(f"{errors[name]:.2g}")})
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", help="a checkout of openai/guided-diffusion")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--sizes", type=int, nargs="*", choices=NETWORKS, help="[default: 64 and 256 on a GPU, 32 on a CPU]")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--steps", type=int, help="of a trajectory  [default: 20 on a GPU, 4 on a CPU]")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True, help="compile the fast networks on a GPU, a minute or two for each size and batch; steps are recorded without, too")
    parser.add_argument("--out", help="JSON file to write")
    options = parser.parse_args()
    gpu = options.device == "cuda"
    if gpu:
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # rather than time what the compiler gave up
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = True
    rows = []
    for size in options.sizes or ([64, 256] if gpu else [32]):
        nets = our_networks(NETWORKS[size])[:2]
        for batch in options.batches:
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            guided = Guided(options.original, nets, size, batch, options.steps or (20 if gpu else 4), options.device, options.compiled)
            rows += measure(guided, size, batch, options.rounds)
            if gpu:
                rows[-1]["peak_gib_of_all_ways"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
                torch._dynamo.reset()  # after eight shapes the compiler gives up
            del guided
            gc.collect()
            write(options.out, {"rows": rows, "rounds": options.rounds} | about_machine(options.device) | ({"compiled": options.compiled} if gpu else {}))


if __name__ == "__main__":
    main()
