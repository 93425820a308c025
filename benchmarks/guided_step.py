"""A guided step beside the released code, and a forward pass beside diffusers: same weights, same noise, the same images; how much faster.

    python benchmarks/guided_step.py --original PATH/TO/guided-diffusion --out benchmarks/results/guided_step_cpu.json              # about 4 minutes
    python benchmarks/guided_step.py --original PATH/TO/guided-diffusion --device cuda --out benchmarks/results/guided_step_cuda.json

Weights are random. On a GPU the released code runs as its README says (U-Net in fp16, that of 512x512 in fp32, classifier in fp32), and once more with its
classifier in fp16; ours in bfloat16. Compiling takes a minute or two for each network the first time, so --networks chooses, and rows of other networks in --out
stay. On a CPU everything is float32, on one thread, seconds are processor time, and the fast networks are timed with Winograd's convolutions, too. Timed are steps
from the middle of 250. Rounds are interleaved; a ratio is the median of the rounds' ratios. Operations are those of the plain network. Errors are relative, against
the plain network in float32: the larger of the output's and the gradient's.
"""
import argparse
import gc
import os
import sys
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import cached_property

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import about_machine, ceiling, compared, interleaved, original_modules, original_network, our_networks, peak_bytes, read, write
from torch import Tensor, nn

from adm_repro.classifier import log_prob_grad
from adm_repro.cost import forward_macs, guide_macs
from adm_repro.diffusion import GaussianDiffusion, named_betas
from adm_repro.fast import FastNetwork
from adm_repro.inception import full_float32
from adm_repro.pretrained import export_diffusers
from adm_repro.sampling import SamplerConfig, ancestral_step, trained_timesteps
from adm_repro.unet import Upsampler

STEPS = {"cpu": (125,), "cuda": (125, 124)}  # of 250, which are timed
BATCHES = {"cpu": {"small": 4, "imagenet64": 1},
           "cuda": {"imagenet64": 128, "imagenet128": 64, "imagenet256": 32, "imagenet512": 8, "imagenet64-256-upsampler": 32, "imagenet128-512-upsampler": 8}}
AGREE = {"cpu": 1e-5, "cuda": 5e-2}  # relative errors that count as the same image: float32 in another order, half precision
PRECISION = {"cpu": "fp32", "cuda": "bf16"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Way:
    """How steps are walked, and what its networks say."""

    walk: Callable[[], Tensor]
    output: Callable[[], Tensor]
    gradient: Callable[[], Tensor] | None = None


class Case:
    """One network at one batch size: inputs, and what runs a short trajectory in each way."""

    def __init__(self, name: str, batch: int, device: str, checkout: str | None):
        self.name, self.batch, self.device, self.checkout, self.precision = name, batch, device, checkout, PRECISION[device]
        self.unet, self.guide, schedule = our_networks(name)
        self.unet, self.guide = self.unet.to(device), self.guide and self.guide.to(device)
        self.schedule, size, generator = schedule, self.unet.config.image_size, torch.Generator().manual_seed(2)
        self.x = torch.randn(batch, 3, size, size, generator=generator).to(device)
        self.t, self.y = torch.full((batch,), 500, device=device), torch.randint(1000, (batch,), generator=generator).to(device)
        self.low_res = torch.rand(batch, 3, size // 4, size // 4, generator=generator).to(device) * 2 - 1 if isinstance(self.unet, Upsampler) else None
        self.given = {"y": self.y} | ({} if self.low_res is None else {"low_res": self.low_res})

    def forward_flops(self) -> float:
        return 2.0 * self.batch * forward_macs(self.unet)

    def step_flops(self) -> float:
        return self.forward_flops() + (2.0 * self.batch * guide_macs(self.guide) if self.guide else 0)

    def resized(self) -> Tensor | None:
        return None if self.low_res is None else nn.functional.interpolate(self.low_res, self.x.shape[-2:], mode="bilinear")

    def original(self, half: bool, half_classifier: bool) -> Way:
        diffusion = original_modules(self.checkout)[0].create_gaussian_diffusion(learn_sigma=True, noise_schedule=self.schedule, timestep_respacing="250")
        model, resized = original_network(self.checkout, self.unet, half, self.device), self.resized()
        classifier = original_network(self.checkout, self.guide, half_classifier, self.device) if self.guide else None

        def denoise(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            return model(x if resized is None else torch.cat([x, resized], dim=1), t, y)

        def gradient(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            with torch.enable_grad():
                x_in = x.detach().requires_grad_(True)
                log_probs = torch.nn.functional.log_softmax(classifier(x_in, t), dim=-1)
                return torch.autograd.grad(log_probs[range(len(log_probs)), y.view(-1)].sum(), x_in)[0]

        def walk() -> Tensor:
            torch.manual_seed(3)
            x = self.x
            for step in STEPS[self.device]:
                t = torch.tensor([step] * self.batch, device=self.device)
                x = diffusion.p_sample(denoise, x, t, cond_fn=gradient if classifier else None, model_kwargs={"y": self.y})["sample"]
            return x

        return Way(walk, lambda: denoise(self.x, self.t, self.y), (lambda: gradient(self.x, self.t, self.y)) if classifier else None)

    def ours(self, unet: nn.Module, guide: nn.Module | None, autocast: torch.dtype | None = None) -> Way:
        process, config = GaussianDiffusion(named_betas(self.schedule, 1000)).respaced("250"), SamplerConfig(guidance_scale=0.0 if guide is None else 1.0)
        half = lambda: torch.autocast(self.device, autocast, enabled=autocast is not None)
        gradient = None if guide is None else lambda x, t: log_prob_grad(guide, x, t, self.y)

        def walk() -> Tensor:
            torch.manual_seed(3)
            x = self.x
            with half():
                for step in STEPS[self.device]:
                    output = unet(x, trained_timesteps(process, step, x), **self.given)
                    x = ancestral_step(process, output, x, step, torch.randn_like(x), config, gradient)
            return x

        def once(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
            def run() -> Tensor:
                with half():
                    return function()
            return run

        return Way(walk, once(lambda: unet(self.x, self.t, **self.given)), gradient and once(lambda: gradient(self.x, self.t)))

    def ways(self) -> dict[str, Way]:
        """Every way to walk the steps; the first is what others are compared with."""
        ways, gpu = {}, self.device == "cuda"
        half = gpu and self.name != "imagenet512"
        if self.checkout:
            ways["original"] = self.original(half, False)
            if gpu and self.guide is not None:
                ways["original, classifier fp16"] = self.original(half, True)
        ways["plain"] = self.ours(self.unet, self.guide, DTYPES[self.precision] if gpu else None)
        return ways | {name: self.ours(*networks) for name, networks in self.fast.items()}

    @cached_property
    def fast(self) -> dict[str, tuple[nn.Module, nn.Module | None]]:
        """Ours, in each arrangement that the device has: a U-Net, and its guide if there is one."""
        arranged = {"fast": {}} | ({"fast, Winograd": {"winograd": True}} if self.device == "cpu" else {})
        return {name: (FastNetwork(self.unet, self.precision, **how), self.guide and FastNetwork(self.guide, self.precision, **how)) for name, how in arranged.items()}

    def forwards(self) -> dict[str, Way]:
        """The U-Net alone, as diffusers' class and ours."""
        ways, dtype = {}, DTYPES[self.precision]
        try:
            theirs = export_diffusers(self.unet).to(self.device, dtype, memory_format=torch.channels_last).requires_grad_(False)
        except (ImportError, RuntimeError, ValueError) as error:
            print(f"{self.name}: diffusers is left out: {error}", file=sys.stderr)
        else:
            compiled = torch.compile(theirs) if self.device == "cuda" else theirs
            x = self.x if self.low_res is None else torch.cat([self.x, self.resized()], dim=1)

            def run() -> Tensor:
                return compiled(x.to(dtype, memory_format=torch.channels_last), self.t, class_labels=self.y).sample.float()

            ways["diffusers"] = Way(run, run)
        for name, (network, _) in self.fast.items():
            run_ours = lambda network=network: network(self.x, self.t, **self.given)
            ways[name] = Way(run_ours, run_ours)
        return ways


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b).norm() / b.norm())


def measured(case: Case, what: str, ways: dict[str, Way], exact: Way, rounds: int, calls: int, flops: float, top: float) -> list[dict]:
    """Rows of all ways, none for no rounds; SystemExit if one of them computes something else."""
    with full_float32():  # on a GPU convolutions would keep ten bits
        output, gradient = exact.output(), exact.gradient and exact.gradient()
    errors = {}
    for name, way in ways.items():  # this also compiles
        errors[name] = max(distance(way.output(), output), distance(way.gradient(), gradient) if way.gradient else 0.0)
        if not errors[name] < AGREE[case.device]:
            raise SystemExit(f"{case.name}, {what}: {name} differs by {errors[name]:.1e}, which is no rounding")
    timed = {name: seconds for name, (_, seconds) in interleaved({name: way.walk for name, way in ways.items()}, rounds, case.device).items()}
    if not rounds:
        return []
    peaks = {name: peak_bytes(way.walk, case.device) for name, way in ways.items()}
    return compared(timed, errors, calls, flops, top, {"network": case.name, "batch": case.batch, "what": what}, peak_bytes=peaks)


def kept(path: str | None, about: dict, measured_now: Container[str]) -> list[dict]:
    """Rows of other networks, which an earlier call wrote on the same machine with the same versions."""
    before = read(path)
    return [row for row in before.get("rows", ()) if row["network"] not in measured_now] if all(before.get(key) == value for key, value in about.items()) else []


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", help="a checkout of openai/guided-diffusion; without it ours is compared with diffusers alone")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--networks", help='names with commas between, whose rows are added to those of --out: "small", "imagenet64", "imagenet64-256-upsampler", ...; by default all that suit the device')
    parser.add_argument("--batch", type=int, help="images per step; by default what suits the network and the device")
    parser.add_argument("--rounds", type=int, help="by default 7, and 3 for imagenet64 on a CPU, where a step takes seconds")
    parser.add_argument("--out", help="JSON to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    batches, rows = BATCHES[args.device], []
    top, about = ceiling(args.device, DTYPES[PRECISION[args.device]]), about_machine(args.device) | {"steps_timed": len(STEPS[args.device])}
    default = lambda name: 3 if (args.device, name) == ("cpu", "imagenet64") else 7
    rounds = {name: default(name) if args.rounds is None else args.rounds for name in (args.networks.split(",") if args.networks else batches)}
    others = kept(args.out, about, rounds)
    for name, count in rounds.items():
        case = Case(name, args.batch or batches.get(name, 1), args.device, args.original)
        exact = case.ours(case.unet, case.guide)
        rows += measured(case, "guided step" if case.guide else "step", case.ways(), exact, count, len(STEPS[args.device]), case.step_flops(), top)
        write(args.out, about | {"rows": others + rows})
        rows += measured(case, "forward", case.forwards(), Way(exact.output, exact.output), count, 1, case.forward_flops(), top)
        write(args.out, about | {"rows": others + rows})
        del case, exact
        gc.collect()
        torch._dynamo.reset()


if __name__ == "__main__":
    main()
