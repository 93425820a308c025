"""The smoke size runs again and again for two hours: memory, handles and disk must not grow beyond its outputs.

    python reliability/soak.py --hours 2 --out reliability/results/soak.json     # continues with the hours that are missing

Two loops run side by side, on the CPU, one thread each, everything in a temporary folder (HOME, TMPDIR, caches, a copy of experiments and notebooks):
- command: `adm-repro reproduce --size smoke` as a child. Before each round the jobs' folders and the report are removed, nothing else, so what else a run
  leaves piles up and is seen. Measured: the largest memory of the process and all it started, processes left behind, files and bytes in the temporary folder, the home folder,
  the cache folder, and the repository without outputs.
- process: train, sample, evaluate, a notebook and a report's conversion, by the same calls as the command line's, in one process that lives as long as the soak. Measured after each round:
  its memory, open file descriptors, threads, children, temporary files.
The first rounds (a tenth, at least WARM_UP) are left out: imports and caches fill. Then a size grows if the lower end of the 95% interval of its slope (Theil-Sen) is above its margin; a count grows if it ends above all that it was
in the first third. With fewer than ENOUGH rounds after the warm-up there is no verdict. A round that fails is a finding as well.
"""
import argparse
import contextlib
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from scipy.stats import theilslopes

ROOT = Path(__file__).resolve().parent.parent
WARM_UP, ENOUGH = {"command": 1, "process": 3}, 5  # rounds; a command begins anew each time, so that only caches warm up
MARGINS = {  # bytes per round below which a slope is noise: pages are 4096 bytes, a round's largest memory is sampled
    "command": {"peak_memory": 1 << 20, "output_bytes": 4096, "tmp_bytes": 512, "home_bytes": 512, "cache_bytes": 512, "other_bytes": 512},
    "process": {"memory": 16 << 10, "tmp_bytes": 512, "home_bytes": 512, "cache_bytes": 512},
}
COUNTS = {"command": ("processes_left", "shared_memory_files", "tmp_files", "home_files", "cache_files", "other_files"), "process": ("descriptors", "threads", "children", "tmp_files", "home_files", "cache_files")}


# What grows

def slope(values: Sequence[float]) -> tuple[float, float, float]:
    """Growth per round: Theil-Sen's estimate, and the ends of its 95% interval."""
    found = theilslopes(np.asarray(values, float), alpha=0.95)
    return float(found.slope), float(found.low_slope), float(found.high_slope)


def growth(loop: str, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The verdict on a loop's rounds; "grows" names what does, and is None if there are too few rounds."""
    warm = max(WARM_UP[loop], len(rounds) // 10)
    after = rounds[warm:]
    failed = sorted({entry["failed"] for entry in rounds if entry.get("failed")})
    if len(after) < ENOUGH:
        return {"warm_up": warm, "grows": None, "failed": failed}
    slopes, counts, grows = {}, {}, []
    for name, margin in MARGINS[loop].items():
        middle, low, high = slope([entry[name] for entry in after])
        slopes[name] = {"per_round": round(middle, 1), "interval": [round(low, 1), round(high, 1)], "margin": margin, "first": after[0][name], "last": after[-1][name]}
        if low > margin:
            grows.append(f"{name}: {middle:,.0f} bytes a round")
    for name in COUNTS[loop]:
        values = [entry[name] for entry in after]
        counts[name] = {"first": values[0], "largest_in_first_third": max(values[:max(1, len(values) // 3)]), "last": values[-1], "largest": max(values)}
        if values[-1] > counts[name]["largest_in_first_third"]:
            grows.append(f"{name}: {counts[name]['largest_in_first_third']} to {values[-1]}")
    return {"warm_up": warm, "slopes": slopes, "counts": counts, "grows": grows, "failed": failed}


# What is measured

def usage(folder: Path, without: Sequence[Path] = ()) -> tuple[int, int]:
    """Files and their bytes below a folder."""
    files = size = 0
    for base, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if Path(base, name) not in without]
        for name in names:
            with contextlib.suppress(OSError):
                size += os.lstat(os.path.join(base, name)).st_size
                files += 1
    return files, size


def environment(home: Path) -> dict[str, str]:
    """Where a run may leave things: nothing of the user's own is used or changed."""
    for name in ("home", "tmp", "cache"):
        (home / name).mkdir(parents=True, exist_ok=True)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "JUPYTER", "IPYTHON", "ADM_REPRO", "TORCH", "HF_", "MPL"))}
    return kept | {"HOME": str(home / "home"), "TMPDIR": str(home / "tmp"), "ADM_REPRO_CACHE": str(home / "cache"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONDONTWRITEBYTECODE": "1"}


def left_on_disk(home: Path) -> dict[str, int]:
    """Temporary files, home and cache."""
    found = {}
    for name in ("tmp", "home", "cache"):
        found[f"{name}_files"], found[f"{name}_bytes"] = usage(home / name)
    return found


class Family(threading.Thread):
    """Follows a process and all that it starts: their largest memory together (as if nothing were shared), and who they were."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.process, self.peak, self.members, self.over = psutil.Process(pid), 0, {}, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.over.wait(0.5):
            with contextlib.suppress(psutil.Error):
                total = 0
                for member in (self.process, *self.process.children(recursive=True)):
                    with contextlib.suppress(psutil.Error):
                        self.members[member.pid] = member
                        total += member.memory_info().rss
                self.peak = max(self.peak, total)

    def left(self) -> list[psutil.Process]:
        """Who still runs."""
        return [member for member in self.members.values() if member.is_running() and member.status() != psutil.STATUS_ZOMBIE]


# The command, round after round

def command_round(home: Path, size: str, patience: float) -> dict[str, Any]:
    """One run of a size from nothing but what earlier ones left beside their outputs."""
    root = home / "repository"
    outputs = [root / "runs" / size, root / "reports" / size]
    for folder in (*(path.parent for path in outputs[0].glob("*/record.json")), outputs[1]):
        shutil.rmtree(folder, ignore_errors=True)
    began = time.monotonic()
    with open(home / "log", "w") as log:
        process = subprocess.Popen([sys.executable, "-m", "adm_repro.cli", "reproduce", "--size", size, "--jobs", "1"], cwd=root, env=environment(home) | {"ADM_REPRO_ROOT": str(root)},
                                   stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        family = Family(process.pid)
        try:
            failed = "" if process.wait(timeout=patience) == 0 else f"exit status {process.returncode}: {(home / 'log').read_text()[-300:]}"
        except subprocess.TimeoutExpired:
            failed = "not done when the soak ended"
        except BaseException:  # the soak is ended: so is what it started
            for member in family.left():
                with contextlib.suppress(psutil.Error):
                    member.kill()
            raise
        finally:
            family.over.set()
            family.join()
        seconds = time.monotonic() - began
        left = family.left()
        if left:
            psutil.wait_procs(left, timeout=5)  # they may be on their way
            left = family.left()
        for member in (*left, *([process] if process.poll() is None else [])):
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                member.kill()
        process.wait()
    jobs = [path.parent for path in outputs[0].glob("*/record.json")]
    made = [usage(path) for path in (*jobs, outputs[1])]
    other = usage(root, (*jobs, outputs[1]))
    shared = [name for name in os.listdir("/dev/shm") if any(str(pid) in name.split("_") for pid in family.members)] if os.path.isdir("/dev/shm") else []
    return {"seconds": round(seconds, 1), "jobs": len(jobs), "peak_memory": family.peak, "processes": len(family.members), "processes_left": len(left), "shared_memory_files": len(shared),
            "output_files": sum(files for files, _ in made), "output_bytes": sum(size for _, size in made), "other_files": other[0], "other_bytes": other[1], **left_on_disk(home), "failed": failed}


def command_loop(home: Path, size: str, until: float, rounds: list[dict[str, Any]], keep: Any) -> None:
    """Rounds until the time is over; the one that it cuts off is not counted."""
    for name in ("experiments", "nbs/paper"):
        shutil.copytree(ROOT / name, home / "repository" / name, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    while (rest := until - time.monotonic()) > 0:
        entry = command_round(home, size, rest)
        if entry["failed"] != "not done when the soak ended":
            rounds.append(entry)
            keep()


# One process that lives long

def inside(home: Path, until_wall: float) -> None:
    """The loop in one process: a line of JSON on its standard output for each round."""
    import click
    import nbformat
    import torch
    from kill import NETWORK, make_inputs

    from adm_repro.cli import main as command
    from adm_repro.reports import convert_report
    from adm_repro.runs import execute_notebook, notebook_path

    torch.set_num_threads(1)
    out, inputs, me = home / "out", home / "inputs", psutil.Process()
    inputs.mkdir()
    make_inputs(inputs)
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("display_data", {"text/markdown": "# Title\n\n| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * 200})])])
    nbformat.write(page, inputs / "page.ipynb")
    adm = lambda *arguments: command.main([str(part) for part in arguments], standalone_mode=False)
    lines, sys.stdout = sys.stdout, open(os.devnull, "w")  # what the commands say
    while time.time() < until_wall:
        began, failed = time.monotonic(), ""
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        try:
            adm("train", "imagenet64", "--data", inputs / "images.npz", "--out", out / "run", "--device", "cpu", "--workers", "0", "--iterations", 6, "--save-every", 2, "--log-every", 1, "--batch-size", 8, *NETWORK)
            adm("sample", out / "run", "--num", 8, "--block-size", 4, "--steps", 4, "--device", "cpu", "--out", out / "drawn")
            adm("evaluate", inputs / "few.npz", inputs / "others.npz", "--weights", inputs / "inception.pth", "--device", "cpu", "--batch-size", 4, "--resamples", 10, "--json")
            execute_notebook(notebook_path("train_features"), out / "executed.ipynb", {"iterations": 2, "run_dir": str(out)}, 1)
            convert_report(inputs / "page.ipynb", out / "report", "Title")
        except (Exception, click.exceptions.Exit) as error:  # whatever it is, it is a finding
            failed = f"{type(error).__name__}: {error}"[:300]
        gc.collect()
        if len(os.listdir("/proc/self/task")) != threading.active_count():
            time.sleep(0.2)  # native threads on their way out
        entry = {"seconds": round(time.monotonic() - began, 1), "memory": me.memory_info().rss, "descriptors": me.num_fds(), "threads": me.num_threads(), "children": len(me.children(recursive=True)),
                 "output_bytes": usage(out)[1], **left_on_disk(home), "failed": failed}
        print(json.dumps(entry), file=lines, flush=True)


def follow(process: subprocess.Popen, rounds: list[dict[str, Any]], keep: Any) -> None:
    """Takes the lines of the process that lives long."""
    for line in process.stdout:
        rounds.append(json.loads(line))
        keep()


# Both

def columns(rounds: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Round after round, as one list for each measure."""
    return {name: [entry[name] for entry in rounds] for name in (rounds[0] if rounds else {}) if name != "failed"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0, help="in all, with those that --out holds")
    parser.add_argument("--size", default="smoke", help="what the command loop runs")
    parser.add_argument("--only", nargs="+", choices=list(MARGINS), default=list(MARGINS), help="one of the two loops")
    parser.add_argument("--out", type=Path, help="JSON file; a soak that was interrupted goes on with the hours that are missing, as a new stretch")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        return inside(Path(options.inside[0]), float(options.inside[1]))
    from adm_repro.files import write_json
    from adm_repro.runs import hardware, provenance

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and clean up
    before = json.loads(options.out.read_text())["stretches"] if options.out and options.out.exists() else []
    missing = options.hours - sum(stretch["hours"] for stretch in before)
    if missing <= 0:
        raise SystemExit(f"{options.out} holds {options.hours - missing:.2f} hours already")
    origin = {key: value for key, value in provenance().items() if key in ("versions", "commit", "uncommitted_changes", "library")}
    began, lock, rounds = time.monotonic(), threading.Lock(), {loop: [] for loop in options.only}

    def result() -> dict[str, Any]:
        now = {"hours": round((time.monotonic() - began) / 3600, 3), "loops": {loop: {"rounds": len(entries), "verdict": growth(loop, entries), "series": columns(entries)} for loop, entries in rounds.items()}}
        stretches = [*before, now]
        return {"hours_wanted": options.hours, "hours": round(sum(stretch["hours"] for stretch in stretches), 3), "size": options.size, "stretches": stretches, "hardware": hardware(), **origin}

    def keep() -> None:
        with lock:
            if options.out:
                write_json(options.out, result())

    with tempfile.TemporaryDirectory(prefix="adm_soak_", ignore_cleanup_errors=True) as folder:
        until, child = began + missing * 3600, None
        for name in options.only:
            (Path(folder) / name).mkdir()
        try:
            if "process" in options.only:
                home = Path(folder) / "process"
                with open(home / "log", "w") as log:
                    child = subprocess.Popen([sys.executable, __file__, "--inside", str(home), str(time.time() + missing * 3600)], cwd=home, env=environment(home) | {"ADM_REPRO_ROOT": str(ROOT)},
                                             stdout=subprocess.PIPE, stderr=log, text=True)
                reader = threading.Thread(target=follow, args=(child, rounds["process"], keep), daemon=True)
                reader.start()
            if "command" in options.only:
                command_loop(Path(folder) / "command", options.size, until, rounds["command"], keep)
            if child:
                try:
                    ended = child.wait(timeout=max(0.0, until - time.monotonic()) + 300)
                except subprocess.TimeoutExpired:
                    ended = -1
                reader.join(timeout=60)
                if ended:
                    raise SystemExit(f"the process that lives long ended with {ended}: {(home / 'log').read_text()[-1000:]}")
        finally:
            if child and child.poll() is None:
                child.kill()
                child.wait()
        keep()
    findings = 0
    for loop, entries in rounds.items():
        verdict = growth(loop, entries)
        told = "too few rounds for a verdict" if verdict["grows"] is None else "; ".join(verdict["grows"]) or "nothing grows"
        findings += bool(verdict["grows"] or verdict["failed"])
        print(f"{loop}: {len(entries)} rounds; {told}{''.join(f'; failed: {text}' for text in verdict['failed'])}")
    raise SystemExit(bool(findings))


if __name__ == "__main__":
    main()
