"""A training step (batch, noise, forward, backward, AdamW, average of the weights) beside the original's TrainLoop. Same weights; interleaved rounds, medians.

    pip install blobfile mpi4py     # the original imports both; without them the first is not used, the second one process
    python benchmarks/training_step.py --original PATH/TO/guided-diffusion --out benchmarks/results/training_step_cpu.json
    python benchmarks/training_step.py --original PATH/TO/guided-diffusion --device cuda --sizes small --out benchmarks/results/training_step_cuda.json

On a CPU everything is float32 on one thread, and times are processor time, so that neighbours matter less. On a GPU the original trains as its README says (`use_fp16`, with
its loss scale and flat master weights, in DistributedDataParallel of one process), ours in bf16, eager and through torch.compile, which takes a minute or more.

The first step is taken with the same batch, timesteps and noise: losses and norms of the gradients must agree. Then each draws its own: the original's batch is given to it,
ours is made in the step. Peak memory on a CPU is that of a process of its own with nothing else in it (the kernel's count, VmHWM); on a GPU the optimiser's state and what a step takes.
"""
import argparse
import gc
import importlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from dataclasses import replace

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
if not {"cuda", "--device=cuda"} & set(sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the original takes a GPU whenever there is one

import numpy as np
import torch
from common import about_machine, ceiling, interleaved, memory, peak_bytes, read, write

from adm_repro.checkpoints import released_config
from adm_repro.cost import forward_macs, training_flops
from adm_repro.data import dataset_from_arrays, training_batch
from adm_repro.diffusion import GaussianDiffusion, cosine_betas
from adm_repro.noise import integers, normals
from adm_repro.training import DenoisingObjective, TrainConfig, _begun, _gradients, _shares, _train_step, update_ema
from adm_repro.unet import UNet, UNetConfig

SIZES = {"tiny": UNetConfig(8, width=32, channel_mult=(1, 2), depth=1, attention_resolutions=(4,), head_channels=32, classes=10),
         "small": UNetConfig(32, width=64, channel_mult=(1, 2, 2), depth=2, attention_resolutions=(16, 8), head_channels=64, classes=10),
         "adm64": replace(released_config("imagenet64")[1], dropout=0.0)}
BATCH = {"cpu": {"tiny": 2, "small": 8, "adm64": 1}, "cuda": {"tiny": 2, "small": 256, "adm64": 64}}
AGREE = {"cpu": 1e-4, "cuda": 5e-2}  # relative differences of loss and norm of the gradient that count as the same step
RATE = 1e-6  # of learning: every step changes the weights, and none so much that the loss runs away
DIFFUSION = GaussianDiffusion(cosine_betas(1000))


def images(size: int, batch_size: int):
    """Noise as images: nothing in a step depends on what they show. Enough that no timed step begins an epoch."""
    rng, count = np.random.default_rng(0), 64 * batch_size
    return dataset_from_arrays("noise", rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8), rng.integers(0, 10, count))


def built(config: UNetConfig, device: str) -> UNet:
    with torch.device(device):
        return UNet(config)


def weights(config: UNetConfig, device: str) -> dict[str, torch.Tensor]:
    """Random, with no zeros where a fresh network has them."""
    torch.manual_seed(0)
    return {name: value + 0.02 * torch.randn_like(value) for name, value in built(config, device).state_dict().items()}


class Original:
    """The original's TrainLoop, as its image_train.py makes it."""

    def __init__(self, checkout: str, config: UNetConfig, state: dict, batch_size: int, device: str):
        self.stand_ins, self.fp16 = self._stand_ins(), device == "cuda"
        sys.path.insert(0, checkout)
        logger, script_util, train_util = (importlib.import_module(f"guided_diffusion.{name}") for name in ("logger", "script_util", "train_util"))

        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
        logger.configure(dir=tempfile.mkdtemp(), format_strs=[])
        script_util.NUM_CLASSES = config.classes
        flags = script_util.model_and_diffusion_defaults() | dict(
            image_size=config.image_size, num_channels=config.width, num_res_blocks=config.depth, num_head_channels=config.head_channels, channel_mult=",".join(map(str, config.channel_mult)),
            attention_resolutions=",".join(map(str, config.attention_resolutions)), class_cond=True, learn_sigma=True, noise_schedule="cosine", resblock_updown=config.resblock_updown,
            use_scale_shift_norm=config.adagn, use_new_attention_order=config.new_attention_order, use_fp16=self.fp16)
        model, self.diffusion = script_util.create_model_and_diffusion(**flags)
        model.load_state_dict(state)
        self.loop = train_util.TrainLoop(
            model=model.to(device), diffusion=self.diffusion, data=None, batch_size=batch_size, microbatch=-1, lr=RATE, ema_rate="0.9999", log_interval=10, save_interval=10000,
            resume_checkpoint="", use_fp16=self.fp16)
        x, y = training_batch(images(config.image_size, batch_size), 0, torch.arange(batch_size))
        self.ready = x, {"y": y}  # the one batch of all rounds: reading is not what is measured

    @staticmethod
    def _stand_ins() -> list[str]:
        made = []
        world = types.SimpleNamespace(Get_rank=lambda: 0, Get_size=lambda: 1, rank=0, size=1)
        for name, module in (("blobfile", types.SimpleNamespace()), ("mpi4py", types.SimpleNamespace(MPI=types.SimpleNamespace(COMM_WORLD=world)))):
            try:
                __import__(name if name == "blobfile" else "mpi4py.MPI")
            except ImportError:
                sys.modules[name] = module
                made.append(name)
        return made

    def same_step(self, t: torch.Tensor, noise: torch.Tensor) -> tuple[float, float]:
        """Loss and norm of the gradient of a step with given timesteps and noise."""
        sampler, losses = self.loop.schedule_sampler, self.diffusion.training_losses
        seen, trainer = [], self.loop.mp_trainer

        def given(*arguments, **named):
            seen.append(losses(*arguments, **named, noise=noise))
            return seen[-1]
        self.loop.schedule_sampler = types.SimpleNamespace(sample=lambda count, device: (t, torch.ones_like(t, dtype=torch.float32)))
        self.loop.diffusion.training_losses = given
        while True:
            self.loop.forward_backward(*self.ready)
            norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in self.loop.model.parameters()))
            if not self.fp16 or math.isfinite(norm) or trainer.lg_loss_scale < 1:
                break
            trainer.lg_loss_scale -= 1  # as it does after an overflow
        self.loop.schedule_sampler, self.loop.diffusion.training_losses = sampler, losses
        return float(seen[-1]["loss"].detach().mean()), norm / (2**trainer.lg_loss_scale if self.fp16 else 1)

    def warm_up(self) -> None:
        """Until the loss scale has come down to where steps are taken."""
        for _ in range(20):
            self.gradients()
            if self.loop.mp_trainer.optimize(self.loop.opt):
                return
        raise SystemExit("the original's loss scale did not come down in 20 steps")

    def step(self) -> None:
        self.loop.run_step(*self.ready)

    def gradients(self) -> None:
        self.loop.forward_backward(*self.ready)

    def optimiser(self) -> None:
        self.loop.mp_trainer.optimize(self.loop.opt)

    def average(self) -> None:
        self.loop._update_ema()


class Ours:
    """A step of `adm_repro.training.train`."""

    def __init__(self, config: UNetConfig, state: dict, batch_size: int, device: str, fast: bool, compiled: bool = False, precision: str = "fp32"):
        self.config, self.device = TrainConfig(10**6, batch_size, learning_rate=RATE, precision=precision), torch.device(device)
        network = built(config, device)
        network.load_state_dict(state)
        self.state, self.objective = _begun(network, self.config, self.device, compiled, fast), DenoisingObjective(DIFFUSION)
        self.batches = _shares(self.state, images(config.image_size, batch_size), self.config)
        self.ready = next(self.batches)

    def same_step(self) -> tuple[float, float]:
        totals = _train_step(self.state, self.objective, self.ready, self.config, self.device)
        return float(totals["loss"]), float(totals["grad_norm"])

    def warm_up(self) -> None:
        self.gradients()
        self.optimiser()
        self.state.optimizer.zero_grad(set_to_none=True)
        self.step()

    def step(self) -> None:
        _train_step(self.state, self.objective, next(self.batches), self.config, self.device)

    def gradients(self) -> None:
        self.state.optimizer.zero_grad(set_to_none=True)
        _gradients(self.state, self.objective, self.ready, self.config, self.device)

    def optimiser(self) -> None:
        torch.nn.utils.get_total_norm([p.grad for p in self.state.network.parameters()])
        self.state.optimizer.step()

    def average(self) -> None:
        update_ema(self.state.ema, self.state.network, self.config.ema_rate)


def makers(options, size: str, state: dict) -> dict:
    """Who takes part: name -> function that makes it, the original first."""
    config, device, batch = SIZES[size], options.device, options.batch or BATCH[options.device][size]
    rest = (config, state, batch, device)
    who = {"original": lambda: Original(options.original, *rest)}
    if device == "cuda":
        who |= {"ours, fast, bf16": lambda: Ours(*rest, fast=True, precision="bf16"), "ours, fast, bf16, compiled": lambda: Ours(*rest, fast=True, compiled=True, precision="bf16")}
    else:
        who |= {"ours": lambda: Ours(*rest, fast=False), "ours, fast": lambda: Ours(*rest, fast=True)}
    return {name: make for name, make in who.items() if name == "original" or not options.who or name in options.who}


def host_waits(ours: Ours) -> str:
    """What a step on a GPU waits for, by torch's own watch over synchronising calls; nothing is the answer wanted."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours.step()
        return "nothing"
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def of_a_process(options, size: str, name: str) -> float:
    """GiB at the peak of a process that makes one of them and takes three steps."""
    command = [sys.executable, __file__, "--original", options.original, "--sizes", size, "--alone", name, *(["--batch", str(options.batch)] if options.batch else [])]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])["gib"]


def alone(options) -> None:
    size = options.sizes[0]
    one = makers(options, size, weights(SIZES[size], options.device))[options.alone]()
    for _ in range(3):
        one.step()
    print(json.dumps({"gib": round(memory("VmHWM") / 2**30, 3)}))


def measured(options, size: str, note) -> None:
    """Rows of one network."""
    config, device = SIZES[size], options.device
    batch, state, taking = options.batch or BATCH[device][size], weights(config, device), {}
    flops = training_flops(forward_macs(built(config, "meta")), batch)
    parameters, top, allocated = sum(value.numel() for value in state.values()), ceiling(device, torch.bfloat16 if device == "cuda" else torch.float32), 0
    about = {"size": size, "batch": batch, "million_parameters": round(parameters / 1e6, 1)}
    persistent = {}
    for name, make in makers(options, size, state).items():
        if device == "cuda":
            allocated = torch.cuda.memory_allocated()
        taking[name], start = make(), time.perf_counter()
        one = taking[name]
        if name == "original":
            places = torch.arange(batch)
            t, noise = integers(0, places, 1000, "training timestep").to(device), normals(0, places, (3, config.image_size, config.image_size), "training noise").to(device)
            loss, norm = one.same_step(t, noise)
        else:
            own_loss, own_norm = one.same_step()  # this also compiles
            differences = abs(own_loss / loss - 1), abs(own_norm / norm - 1)
            note({"what": "the first step agrees", "who": name, **about, "loss": own_loss, "relative_difference_of_the_loss": differences[0],
                  "relative_difference_of_the_gradients_norm": differences[1]})
            if not max(differences) < AGREE[device]:
                raise SystemExit(f"{size}: loss and gradient of {name} differ by {differences[0]:.1e} and {differences[1]:.1e}, which is no rounding")
        one.warm_up()
        if "compiled" in name:
            note({"what": "first steps, compiling", "who": name, **about, "seconds": round(time.perf_counter() - start, 1)})
        gc.collect()  # what is nobody's any more is no part of the peak
        if device == "cuda":
            persistent[name] = torch.cuda.memory_allocated() - allocated
    if not options.rounds:
        return
    parts = ("step", "gradients", "optimiser", "average") if options.parts else ("step",)
    for part in parts:
        seconds = {name: found for name, (_, found) in interleaved({name: getattr(one, part) for name, one in taking.items()}, options.rounds, device).items()}
        for name, values in seconds.items():
            median = statistics.median(values)
            row = {"what": part, "who": name, **about, "seconds": round(median, 5), "from_to": [round(min(values), 5), round(max(values), 5)]}
            if part == "step":
                row |= {"images_per_second": round(batch / median, 2), "tflops": round(flops / median / 1e12, 4), "share_of_the_ceiling": round(flops / median / top, 3)}
                if device == "cuda":
                    row["peak_gib"] = round((persistent[name] + peak_bytes(taking[name].step, device)) / 2**30, 3)
                elif options.memory:
                    row["peak_gib"] = of_a_process(options, size, name)
                if device == "cuda" and name != "original":
                    row["the_host_waits_for"] = host_waits(taking[name])
            if name != "original":
                ratios = [theirs / own for theirs, own in zip(seconds["original"], values)]
                row |= {"ours_is_faster_by": round(statistics.median(ratios), 3), "rounds_from_to": [round(min(ratios), 3), round(max(ratios), 3)]}
            note(row)
    note({"what": "matrix products", "size": size, "tflops": round(top / 1e12, 4), "stand_ins": taking["original"].stand_ins})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", required=True, help="a checkout of openai/guided-diffusion")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--sizes", nargs="*", choices=list(SIZES), default=["small"])
    parser.add_argument("--who", nargs="*", help="which of ours; all by default")
    parser.add_argument("--batch", type=int, default=0, help="images per step; by default what suits the size and the device")
    parser.add_argument("--rounds", type=int, default=7, help="0 compiles and compares, and times nothing")
    parser.add_argument("--parts", action=argparse.BooleanOptionalAction, default=True, help="time gradients, optimiser and average by themselves, too")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure the peak in processes of their own (CPU)")
    parser.add_argument("--out", help="JSON file; rows of sizes that were not run stay in it")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.alone:
        return alone(options)
    rows, results = [], read(options.out)

    def note(row: dict) -> None:
        rows.append(row)
        print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()), flush=True)
        results[row["size"]] = {"rows": [row for row in rows if row["size"] == rows[-1]["size"]], "rounds": options.rounds} | about
        write(options.out, results)

    about = about_machine(options.device)
    for size in options.sizes:
        measured(options, size, note)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return None


if __name__ == "__main__":
    main()
