"""A 3x3 convolution by Winograd's tiles beside oneDNN's direct one, layer by layer: which way is the fastest, and how near each comes to the exact result.

    python benchmarks/winograd.py --out benchmarks/results/winograd.json              # about a minute

Weights and images are random; both ways have their weights in oneDNN's order beforehand. One thread, processor time, rounds interleaved; a ratio is the
median of the rounds' ratios. The exact result is computed in float64.
"""
import argparse
import os
import statistics

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from common import about_machine, ceiling, interleaved, write
from torch import Tensor

from adm_repro.fast import Packed
from adm_repro.winograd import Winograd, kernels, tile_size

LAYERS = (  # images, input channels, output channels, side
    (4, 32, 32, 32), (4, 64, 32, 32), (4, 64, 64, 32), (4, 64, 64, 8), (1, 64, 64, 16), (1, 64, 64, 8), (4, 128, 128, 16), (4, 128, 128, 8), (4, 256, 128, 8), (8, 96, 96, 4),
    (1, 192, 192, 64), (1, 384, 384, 32), (1, 576, 576, 16), (1, 768, 768, 16), (1, 768, 768, 8), (2, 768, 768, 8), (1, 1536, 768, 8), (1, 256, 256, 128))


def row(layer: tuple[int, int, int, int], rounds: int) -> dict:
    n, inputs, outputs, side = layer
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, inputs, side, side, generator=generator).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(outputs, inputs, 3, 3, generator=generator) / (9 * inputs) ** 0.5, torch.randn(outputs, generator=generator)
    exact = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    ways = {"direct": Packed(weight, bias, 1), "F(4,3)": Winograd(weight, bias, 1, lambda *_: 4), "F(2,3)": Winograd(weight, bias, 1, lambda *_: 2)}
    calls = max(1, round(2e9 / (18 * x[:, 0].numel() * inputs * outputs)))  # so many that a clock sees them

    def often(way) -> Tensor:
        for _ in range(calls):
            y = way(x)
        return y

    found = interleaved({name: lambda way=way: often(way) for name, way in ways.items()}, rounds, "cpu")
    seconds = {name: statistics.median(times) / calls for name, (_, times) in found.items()}
    ratios = {name: statistics.median(a / b for a, b in zip(found["direct"][1], times)) for name, (_, times) in found.items()}
    errors = {name: float((y.double() - exact).norm() / exact.norm()) for name, (y, _) in found.items()}
    chosen = {4: "F(4,3)", 2: "F(2,3)", None: "direct"}[tile_size(n, side, side, min(inputs, outputs))]
    print(f"{n} x {inputs:4} -> {outputs:3}, {side:3} pixels: {seconds['direct'] * 1e3:7.2f} ms " +
          " ".join(f"{name} x{ratios[name]:.2f} error {errors[name]:.1e}" for name in ways) + f"  chosen {chosen}", flush=True)
    return {"images": n, "inputs": inputs, "outputs": outputs, "side": side, "chosen": chosen, "seconds": seconds, "ratio": ratios, "relative_error": errors,
            "direct_tflops": 18 * x[:, 0].numel() * inputs * outputs / seconds["direct"] / 1e12}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", help="JSON to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    kernels()
    top, rows = ceiling("cpu", torch.float32), [row(layer, args.rounds) for layer in LAYERS]
    write(args.out, about_machine("cpu") | {"ceiling_tflops": top / 1e12, "rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    main()
