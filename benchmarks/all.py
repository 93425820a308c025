"""Every benchmark of speed, one after another within a budget, the most important first; what fails or does not fit is said.

    python benchmarks/all.py --original PATH/TO/guided-diffusion --device cuda                 # at most 8 minutes on one GPU
    python benchmarks/all.py --original PATH/TO/guided-diffusion --runs runs/digits            # on a CPU: about 30 minutes
    python benchmarks/all.py --device cuda --dry-run                                           # the plan: jobs, arguments, expected seconds

Each job is a process with a limit of its own. It writes its results after each case, and they are kept whether it ends, fails or is cut off: NAME_cuda.json or NAME_cpu.json
in benchmarks/results, where jobs of one script share a file, begun anew by each run. The exit status is 1 if a job failed or was cut off; one that was not begun for want of time is no failure.

On a GPU most of the time goes into compiling, which keeps one core busy and the GPU idle. So the first minutes compile the networks of all jobs side by side, with nothing timed,
into torch's cache on disk, where the jobs find them; a second run finds all of it. The seconds of a GPU are estimates for one H200 with 16 cores: nobody has measured them.
"""
import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUDGET = {"cuda": 480, "cpu": 2100}  # seconds
COMPILING = 130  # expected seconds of all that is compiled beforehand, side by side
ELSEWHERE = {"data_loading.py": "reads files, without a network", "evaluator.py": "scores samples, beside other evaluators", "sampling_memory.py": "measures memory alone",
             "winograd.py": "layers on a CPU", "table.py": "writes the README's table",
             "shortcuts.py": "samplers that change the numbers; needs an hour of their quality first"}
UNSUFFIXED = ("latency", "end_to_end", "precision", "startup")  # whose results on a CPU are NAME.json


@dataclass(frozen=True)
class Job:
    """A script, how it is called, and how long that is expected to take."""

    name: str
    script: str
    arguments: tuple[str, ...]
    seconds: int
    needs: tuple[str, ...] = ()  # of the paths "original" and "runs"
    compiles: bool = False  # is begun with --rounds 0 beforehand

    def result(self, device: str) -> str:
        stem = Path(self.script).stem
        return f"{stem}.json" if device == "cpu" and stem in UNSUFFIXED else f"{stem}_{device}.json"

    def limit(self) -> float:
        return max(1.6 * self.seconds, self.seconds + 15)


def guided(network: str, seconds: int) -> Job:
    return Job(f"guided step, {network}", "guided_step.py", ("--networks", network, "--rounds", "3"), seconds, ("original",), True)


PLAN = {
    "cuda": (  # in the order of importance; imports and building the networks are most of a job's time
        guided("imagenet64", 32), guided("imagenet256", 32), guided("imagenet128", 30), guided("imagenet512", 34), guided("imagenet64-256-upsampler", 22), guided("imagenet128-512-upsampler", 22),
        Job("training step", "training_step.py", ("--sizes", "small", "--rounds", "5", "--no-parts"), 25, ("original",), True),
        Job("latency", "latency.py", ("--no-compiled", "--steps", "10", "--rounds", "3"), 42, ("original",)),
        Job("precision", "precision.py", ("--settings", "DDIM 25, scale 1", "--ways", "bf16", "--seeds", "2"), 25, ("runs",)),
        Job("end to end", "end_to_end.py", ("--num", "2048", "--precision", "bf16"), 25),
        Job("scaling", "scaling.py", ("--only", "batch", "--rounds", "1"), 18),
        Job("start-up", "startup.py", ("--rounds", "1", "--first-images", "1"), 40),
    ),
    "cpu": (
        Job("guided step", "guided_step.py", (), 240, ("original",)),
        Job("training step", "training_step.py", ("--sizes", "small", "adm64", "--rounds", "5", "--no-parts"), 300, ("original",)),
        Job("latency", "latency.py", (), 180, ("original",)),
        Job("precision", "precision.py", (), 2400, ("runs",)),
        Job("end to end", "end_to_end.py", (), 180),
        Job("scaling", "scaling.py", (), 600),
        Job("start-up", "startup.py", (), 240),
    ),
}


@dataclass
class Outcome:
    """What became of a job."""

    job: Job
    state: str  # "measured", "FAILED", "CUT OFF", "not measured"
    seconds: float = 0.0
    why: str = ""


def command(job: Job, device: str, paths: dict[str, str], out: Path | None) -> list[str]:
    given = [word for name in job.needs for word in (f"--{name}", paths[name])]
    return [sys.executable, str(HERE / job.script), *given, "--device", device, *job.arguments, *(["--out", str(out)] if out else ["--rounds", "0"])]


class Child:
    """A process with what it starts; its output goes to a file."""

    def __init__(self, words: list[str], log: Path, more: dict[str, str] | None = None):
        self.log, self.start = log, time.monotonic()
        with open(log, "w") as file:
            self.process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=os.environ | (more or {}), start_new_session=True)

    def ended(self, limit: float) -> bool:
        """Wait at most this long, then end all of it; whether it ended by itself."""
        try:
            self.process.wait(max(0.0, limit))
        except subprocess.TimeoutExpired:
            return False
        finally:
            self.end()
        return True

    def end(self) -> None:
        """What is left of its process group goes, too."""
        for number, patience in ((signal.SIGTERM, 3), (signal.SIGKILL, 3)):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(patience)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue

    def said(self) -> list[str]:
        return self.log.read_text(errors="replace").strip().splitlines()


def merged(path: Path, part: dict) -> dict:
    """Results of the jobs of one script: rows behind rows, other entries side by side, the first's where both have one."""
    there = json.loads(path.read_text()) if path.exists() else {}
    return part | there | ({"rows": there.get("rows", []) + part["rows"]} if "rows" in part else {})


def keep(part: Path, collected: Path, result: Path) -> bool:
    """Put what a job wrote beside what others of its script wrote in this run; whether there was anything."""
    try:
        whole = merged(collected, json.loads(part.read_text()))
    except FileNotFoundError:
        return False
    collected.write_text(json.dumps(whole, indent=1) + "\n")
    result.parent.mkdir(parents=True, exist_ok=True)
    for source, target in ((collected, result), (part.with_suffix(".png"), result.with_suffix(".png"))):
        if source.exists():
            temporary = target.with_name(f".{target.name}.tmp")
            shutil.copyfile(source, temporary)
            os.replace(temporary, target)
    return True


def compile_all(jobs: list[Job], device: str, paths: dict[str, str], folder: Path, limit: float) -> None:
    """Start the jobs that compile side by side, with nothing timed; one that fails here is heard of when it is timed."""
    cores, start = len(os.sched_getaffinity(0)), time.monotonic()
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TORCHINDUCTOR_COMPILE_THREADS": str(max(1, cores // len(jobs)))}  # memory goes back at once: all of them share one GPU
    children = []
    try:
        for number, job in enumerate(jobs):
            children.append(Child(command(job, device, paths, None), folder / f"compiling{number}.log", alone))
        for job, child in zip(jobs, children):
            ended = child.ended(limit - (time.monotonic() - start))
            trouble = "" if ended and not child.process.returncode else f": {(child.said() or [''])[-1] if ended else 'cut off, what it compiled stays'}"
            print(f"compiled {job.name}, {time.monotonic() - start:.0f} s{trouble}", flush=True)
    finally:
        for child in children:
            child.end()


def run_all(jobs: tuple[Job, ...], device: str, paths: dict[str, str], budget: float, results: Path, compiling: float = 0.0) -> list[Outcome]:
    """All jobs that fit into the budget; `compiling` is what compiling beforehand is expected to take, 0 for none."""
    start, outcomes = time.monotonic(), []
    left = lambda: budget - (time.monotonic() - start)
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as name:
        folder = Path(name)
        ready = [job for job in jobs if all(paths.get(need) for need in job.needs)]
        if compiling and (first := [job for job in ready if job.compiles]):
            compile_all(first, device, paths, folder, min(1.2 * compiling, left() / 2))
        for number, job in enumerate(jobs):
            if job not in ready:
                outcomes.append(Outcome(job, "not measured", why="needs " + " and ".join(f"--{need}" for need in job.needs if not paths.get(need))))
                continue
            if job.seconds > left() - 5:
                outcomes.append(Outcome(job, "not measured", why=f"takes about {job.seconds} s, and {max(0, left()):.0f} s are left"))
                continue
            print(f"\n{job.name}: {job.seconds} s expected, {left():.0f} s left", flush=True)
            part = folder / f"part{number}.json"
            limit = min(job.limit(), left() - 5)  # ending it takes seconds, too
            child = Child(command(job, device, paths, part), folder / f"job{number}.log")
            try:
                ended = child.ended(limit)
            finally:  # also when all of it is stopped
                kept = keep(part, folder / job.result(device), results / job.result(device))
            took, said = time.monotonic() - child.start, child.said()
            print("\n".join(said[-40:]), flush=True)
            if ended and not child.process.returncode:
                outcomes.append(Outcome(job, "measured", took))
            else:
                why = (said or [f"exit status {child.process.returncode}"])[-1][:120] if ended else f"after {limit:.0f} s"
                outcomes.append(Outcome(job, "FAILED" if ended else "CUT OFF", took, why + (", what it had measured is kept" if kept else "")))
    return outcomes


def show(jobs: tuple[Job, ...], device: str, compiling: float) -> None:
    """The plan."""
    if compiling:
        print(f"{compiling:5.0f} s  {'compiling':38} all that is marked *, side by side")
    for job in jobs:
        print(f"{job.seconds:5} s {'*' if job.compiles and compiling else ' '}{job.name:38} {job.script} {shlex.join(job.arguments)}{' [needs ' + ', '.join(job.needs) + ']' if job.needs else ''}")
    without = compiling + sum(job.seconds for job in jobs if "runs" not in job.needs)
    print(f"{without:5.0f} s  in all without --runs, {compiling + sum(job.seconds for job in jobs):.0f} s with it; estimated" + (", nobody has measured it" if device == "cuda" else ""))
    for script, why in ELSEWHERE.items():
        print(f"   not here: {script}: {why}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", help="a checkout of openai/guided-diffusion")
    parser.add_argument("--runs", help="folder of trained networks of the digits size, for precision.py")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--budget", type=float, help="seconds of the clock in all  [default: 480 on a GPU, 2100 on a CPU]")
    parser.add_argument("--only", nargs="*", help="jobs whose names begin with one of these")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, and run nothing")
    options = parser.parse_args()
    jobs = tuple(job for job in PLAN[options.device] if not options.only or job.name.startswith(tuple(options.only)))
    compiling = COMPILING if options.device == "cuda" and any(job.compiles for job in jobs) else 0
    if not jobs:
        parser.error(f"no job is called {' or '.join(options.only)}: there are {', '.join(job.name for job in PLAN[options.device])}")
    if options.dry_run:
        show(jobs, options.device, compiling)
        return 0
    if not options.original or not Path(options.original, "guided_diffusion").is_dir():
        parser.error(f"--original must be a checkout of openai/guided-diffusion, got {options.original}")
    if options.device == "cuda" and not shutil.which("nvidia-smi"):
        parser.error("there is no GPU here: --device cpu")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # children end and results are kept
    start, budget = time.monotonic(), options.budget or BUDGET[options.device]
    outcomes = run_all(jobs, options.device, {"original": options.original, "runs": options.runs}, budget, options.results, compiling)
    print(f"\n{time.monotonic() - start:.0f} of {budget:.0f} s; results in {options.results}")
    for outcome in outcomes:
        print(f"{outcome.job.name:42} {outcome.state:13} {outcome.seconds:5.0f} s of {outcome.job.seconds:4}  {outcome.why}")
    return int(any(outcome.state in ("FAILED", "CUT OFF") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
