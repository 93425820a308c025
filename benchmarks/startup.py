"""How long it takes until something happens: the command's help, imports, and the first image of a compiled model with an empty and with a filled compile cache.

    python benchmarks/startup.py --out benchmarks/results/startup.json                  # about 4 minutes of processor time on a CPU
    python benchmarks/startup.py --device cuda --out benchmarks/results/startup_cuda.json

Each is a process of its own, started in turn, several times over. Seconds are those of the clock and of the processor (with all that a process started); on a machine
that does other work only the latter say something. What torch's own import takes is measured beside, and so is a Python that does nothing.
The model is a small guided one of random weights: what is looked at is the time before it computes.
"""
import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
if not {"cuda", "--device=cuda"} & set(sys.argv):
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch
from common import about_machine, write

COMMANDS = {
    "python": ["-c", "pass"],
    "adm-repro --help": ["-m", "adm_repro.cli", "--help"],
    "adm-repro sample --help": ["-m", "adm_repro.cli", "sample", "--help"],
    "import adm_repro": ["-c", "import adm_repro"],
    "import torch": ["-c", "import torch"],
    "import adm_repro.pretrained": ["-c", "import adm_repro.pretrained"],
    "import adm_repro.evaluation": ["-c", "import adm_repro.evaluation"],
    "import adm_repro.drawing": ["-c", "import adm_repro.drawing"],
}
TARGETS = {"adm-repro --help": 0.3, "import adm_repro": 1.0, "import adm_repro.pretrained": 1.0, "import adm_repro.evaluation": 1.0}  # seconds; of a part, beside torch's own

FIRST_IMAGE = """
import sys, time
import torch
from adm_repro.classifier import ClassifierConfig, NoisyClassifier
from adm_repro.diffusion import GaussianDiffusion, named_betas
from adm_repro.fast import FastNetwork
from adm_repro.graphs import FastSampler, ReverseStep
from adm_repro.sampling import SamplerConfig
from adm_repro.unet import UNet, UNetConfig
device, compiled = sys.argv[1], sys.argv[2] == "compiled"
torch.set_num_threads(1)
torch.manual_seed(0)
small = dict(image_size=16, in_channels=3, width=32, channel_mult=(1, 2), depth=1, attention_resolutions=(8,), head_channels=16, classes=10)
net, guide = (FastNetwork(network, device=device, compiled=compiled) for network in (UNet(UNetConfig(**small)), NoisyClassifier(ClassifierConfig(**small))))
step = ReverseStep(net, GaussianDiffusion(named_betas("linear", 1000)), SamplerConfig(steps="ddim25", sampler="ddim", guidance_scale=1.0), guide)
image = FastSampler(step, 0, (3, 16, 16))(torch.tensor([0], device=device), torch.tensor([3], device=device)).cpu()
assert image.isfinite().all() and image.std() > 0
"""


def run(arguments: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Seconds of a process on the clock, and of the processor."""
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, *arguments], env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said = child.stderr.read()
    _, status, used = os.wait4(child.pid, 0)
    wall = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    child.stderr.close()
    if child.returncode:
        raise SystemExit(f"{arguments} failed:\n{said}")
    return wall, used.ru_utime + used.ru_stime


def row(what: str, seconds: list[tuple[float, float]]) -> dict:
    found = {"what": what, "runs": len(seconds)}
    for name, values in zip(("seconds", "processor_seconds"), zip(*seconds)):
        found |= {name: round(statistics.median(values), 3), f"{name}_from_to": [round(min(values), 3), round(max(values), 3)]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of the compiled model")
    parser.add_argument("--rounds", type=int, default=7, help="of help and imports")
    parser.add_argument("--first-images", type=int, default=2, help="rounds of the first image, whose empty cache takes long")
    parser.add_argument("--out", help="JSON file to write")
    options = parser.parse_args()
    seconds = {name: [] for name in COMMANDS}
    for number in range(options.rounds + 1):  # the first round fills the disk's cache and is not counted
        for name, arguments in COMMANDS.items():
            took = run(arguments, {})
            seconds[name] += [took] * (number > 0)
    rows = [row(name, values) for name, values in seconds.items()]
    at, torch_alone = {entry["what"]: entry for entry in rows}, next(entry["processor_seconds"] for entry in rows if entry["what"] == "import torch")
    for name, target in TARGETS.items():
        beside = at[name]["processor_seconds"] - (torch_alone if name.startswith("import adm_repro.") else 0)
        at[name] |= {"target": target, "compared": round(beside, 3), "reached": beside <= target}
    torch.set_num_threads(1)
    about = about_machine(options.device)
    write(options.out, {"rows": rows} | about)
    images = {"first image, not compiled": [], "first image, compiled, empty cache": [], "first image, compiled, filled cache": []}
    for _ in range(options.first_images):
        with tempfile.TemporaryDirectory() as folder:
            cache = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
            for name, values in images.items():
                values.append(run(["-c", FIRST_IMAGE, options.device, "" if "not" in name else "compiled"], cache))
    rows += [row(name, values) for name, values in images.items() if values]
    for entry in rows:
        print("  ".join(f"{key} {value}" for key, value in entry.items()))
    write(options.out, {"rows": rows} | about)


if __name__ == "__main__":
    main()
