"""What the speed benchmarks share: stand-in networks, the released code's networks, interleaved timing, the machine's ceiling, peak memory, versions."""
import contextlib
import ctypes
import importlib
import importlib.metadata
import json
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adm_repro.checkpoints import find_released, released_config
from adm_repro.classifier import ClassifierConfig, NoisyClassifier
from adm_repro.files import replacing
from adm_repro.runs import hardware
from adm_repro.unet import UNet, UNetConfig, Upsampler

SMALL = {  # what both have in common, the U-Net, the classifier
    "tiny": (dict(image_size=8, depth=1, attention_resolutions=(4,), head_channels=32), dict(width=32, channel_mult=(1, 2)), dict(width=32, channel_mult=(1, 2))),
    "narrow": (dict(image_size=32, depth=2, attention_resolutions=(16, 8), head_channels=32), dict(width=64, channel_mult=(1, 2, 2)), dict(width=32, channel_mult=(1, 2, 2))),
    "small": (dict(image_size=32, depth=2, attention_resolutions=(16, 8), head_channels=32), dict(width=64, channel_mult=(1, 2, 2)), dict(width=32, channel_mult=(1, 2, 4))),
}


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights at a scale that keeps activations near one; fresh networks end in zeros, where every error compares equal."""
    generator = torch.Generator().manual_seed(seed)
    for _, p in sorted(network.named_parameters()):
        p.data = torch.randn(p.shape, generator=generator) * (p[0].numel() ** -0.5 if p.ndim > 1 else 0.1) + (p.ndim == 1)
    return network.eval().requires_grad_(False)


def unset(kind: type[nn.Module], config: UNetConfig | ClassifierConfig) -> nn.Module:
    """A network whose weights are not drawn, as others will take their place: for half a billion of them that takes seconds."""
    with torch.device("meta"):
        network = kind(config)
    return network.to_empty(device="cpu")


def sure_guide(config: ClassifierConfig) -> NoisyClassifier:
    """A classifier with logits so large that float16, where nothing scales gradients, keeps those of a pixel."""
    guide = randomised(unset(NoisyClassifier, config), 1)
    guide.out["2"].c_proj.weight.mul_(config.image_size)
    return guide


def our_networks(name: str) -> tuple[UNet, NoisyClassifier | None, str]:
    """A U-Net with random weights, the classifier that guides it if there is one, and its noise schedule."""
    if name in SMALL:
        both, unet, guide = SMALL[name]
        return randomised(unset(UNet, UNetConfig(**both, **unet, classes=1000))), randomised(unset(NoisyClassifier, ClassifierConfig(**both, **guide)), 1), "linear"
    found = find_released(name)
    return randomised(unset(*released_config(found))), sure_guide(released_config(found.classifier)[1]) if found.classifier else None, found.noise_schedule


def original_modules(checkout: str) -> tuple[Any, Any]:
    """`script_util` and `unet` of a checkout of openai/guided-diffusion; its only dependency beyond torch and numpy is for files elsewhere."""
    sys.modules.setdefault("blobfile", types.ModuleType("blobfile"))
    sys.path[:0] = [checkout] * (checkout not in sys.path)
    return tuple(importlib.import_module(f"guided_diffusion.{name}") for name in ("script_util", "unet"))


def original_network(checkout: str, ours: UNet | NoisyClassifier, half: bool, device: str) -> nn.Module:
    """The released code's network with our weights; as in its scripts, its parameters ask for gradients."""
    _, module = original_modules(checkout)
    config = ours.config
    if isinstance(ours, Upsampler):
        config = replace(config, in_channels=2 * config.in_channels)
    arguments = dict(
        image_size=config.image_size, in_channels=config.in_channels, model_channels=config.width, num_res_blocks=config.depth, dropout=config.dropout,
        attention_resolutions=tuple(config.image_size // r for r in config.attention_resolutions), channel_mult=config.channel_mult, num_heads=config.heads,
        num_head_channels=config.head_channels or -1, use_scale_shift_norm=config.adagn, resblock_updown=config.resblock_updown,
        use_new_attention_order=config.new_attention_order, use_fp16=half)
    if isinstance(ours, UNet):
        make, more = module.UNetModel, dict(out_channels=ours.config.out_channels, num_classes=config.classes)
    else:
        make, more = module.EncoderUNetModel, dict(out_channels=config.classes, pool=config.pool)
    with torch.device(device):  # a GPU draws first weights, which nobody will see, in no time
        theirs = make(**more, **arguments)
    theirs.load_state_dict(ours.state_dict())
    theirs = theirs.to(device).eval()
    if half:
        theirs.convert_to_fp16()
    return theirs


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def clock(device: str) -> float:
    """Seconds, once a GPU has done what it was asked to. On a CPU of the processor, so that neighbours count less."""
    synchronize(device)
    return time.process_time() if device == "cpu" else time.perf_counter()


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, tuple[Any, list[float]]]:
    """name -> (result, seconds of each round): every round runs each once, after one round that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    results = {}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = clock(device)
            results[name] = run()
            took = clock(device) - start
            if number:
                seconds[name].append(took)
    return {name: (results[name], seconds[name]) for name in runs}


def ceiling(device: str, dtype: torch.dtype) -> float:
    """Operations per second of the fastest of five large products of random matrices; on a CPU also of convolutions, whose kernels can be the faster ones."""
    side = 8192 if device == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    rates = [2 * side**3 / min(interleaved({"product": lambda: a @ b}, 5, device)["product"][1])]
    if device == "cpu":
        image, conv = (t.to(memory_format=torch.channels_last) for t in (torch.randn(1, 256, 32, 32), torch.randn(256, 256, 3, 3)))
        rates.append(2 * 9 * 256**2 * 32**2 / min(interleaved({"conv": lambda: nn.functional.conv2d(image, conv, padding=1)}, 5, device)["conv"][1]))
    return max(rates)


def peak_bytes(run: Callable[[], Any], device: str) -> int | None:
    """Memory at the peak of a call, above what was taken before it; None where the system does not say."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory that was freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = memory("VmRSS")
        run()
        return memory("VmHWM") - before
    except (OSError, AttributeError):
        return None


def memory(field: str) -> int:
    """Bytes, as the kernel counts them for this process; getrusage counts the parent's, too."""
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))


def compared(timed: dict[str, list[float]], errors: dict[str, float], calls: int, flops: float, top: float, about: dict[str, Any], **more: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each way, printed: seconds of a call, median and spread; the median of the rounds' ratios to the first way; operations per second; distance from the exact result."""
    rows, baseline = [], next(iter(timed))
    for who, seconds in timed.items():
        ratios, each = [b / s for b, s in zip(timed[baseline], seconds)], statistics.median(seconds) / calls
        row = about | {"who": who, "seconds": each, "spread": [min(seconds) / calls, max(seconds) / calls], "baseline": baseline, "ratio": statistics.median(ratios),
                       "ratio_spread": [min(ratios), max(ratios)], "tflops": flops / each / 1e12, "share_of_ceiling": flops / each / top, "ceiling_tflops": top / 1e12, "relative_error": errors[who],
               "rounds": [value / calls for value in seconds]}
        rows.append(row | {name: values[who] for name, values in more.items()})
        print(f"{' '.join(str(value) for value in about.values()):34} {who:26} {each * 1e3:9.2f} ms  x{row['ratio']:.2f} of {baseline}  {row['tflops']:8.3f} TFLOP/s "
              f"({row['share_of_ceiling']:.0%} of the ceiling)  error {errors[who]:.1e}", flush=True)
    return rows


def about_machine(device: str) -> dict[str, Any]:
    """Hardware and versions, and how many threads of a CPU."""
    packages = {}
    for name in ("torch", "numpy", "diffusers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    more = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return {"device": device, "hardware": hardware(), "threads": torch.get_num_threads(), "python": platform.python_version(), "packages": packages} | more


def write(path: str | Path | None, result: dict[str, Any]) -> None:
    """A JSON file, if one is asked for; after each case, so that what was measured is kept when the rest fails. It is replaced at once, never half written."""
    if path:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")


def read(path: str | Path | None) -> dict[str, Any]:
    """What an earlier run wrote; nothing if there is no such file."""
    return json.loads(Path(path).read_text()) if path and Path(path).exists() else {}
