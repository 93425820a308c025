"""Every long command is killed at random moments, and run again: what it leaves must be what an undisturbed run leaves, byte for byte.

    python reliability/kill.py --out reliability/results/kill.json               # 50 kills of each command, about 2 hours on one core; continues
    python reliability/kill.py --kills 3 --only download sample

A command runs in a folder of its own, on the CPU, on one thread. First it runs undisturbed, twice, to see that it repeats itself and how long it takes. Then, again
and again in an empty folder, it is ended by SIGKILL (the process and all that it started, or one of them, chosen at random) at a moment between the
first file that it writes and its end, drawn from a generator with a fixed seed. Right after the kill, every file under a final name must be whole: one that does not
change any more has the content of the undisturbed run, all others can be read. Then the same command runs again, must succeed, and leave the same files
and nothing else. What tells the time is left out of the comparison: a record's provenance, images per second in a log.
"""
import argparse
import contextlib
import hashlib
import http.server
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch
from safetensors import safe_open

from adm_repro.files import write_json
from adm_repro.inception import Inception
from adm_repro.runs import hardware

ROOT = Path(__file__).resolve().parent.parent
CLI = [sys.executable, "-m", "adm_repro.cli"]
NETWORK = ["--set", "image_size=16", "--set", "width=32", "--set", "channel_mult=[1]", "--set", "depth=1", "--set", "attention_resolutions=[8]", "--set", "head_channels=16", "--set", "classes=10"]
FINAL = ("weights*.safetensors", "samples.npz", "block_*.npz", "*.sha256", "VIRTUAL_*.npz", "record.json")  # written once, under these names


@dataclass(frozen=True)
class Command:
    """What is killed."""

    name: str
    arguments: Callable[[Path], list[str]]  # of adm-repro, in a folder for its outputs
    inputs: tuple[str, ...] = ()  # commands whose undisturbed outputs it needs
    environment: Callable[[Path], dict[str, str]] = field(default=lambda folder: {})


def commands(inputs: Path, address: str) -> dict[str, Command]:
    """The long commands; `inputs` holds images.npz and, once they have run, what earlier commands left."""
    def train(processes: int) -> Callable[[Path], list[str]]:
        return lambda out: ["train", "imagenet64", "--data", f"{inputs}/images.npz", "--out", f"{out}/run", "--device", "cpu", "--workers", "0", "--iterations", "24", "--save-every", "3", "--log-every", "1",
                            "--keep", "12", "--batch-size", "8", "--processes", str(processes), *NETWORK, "--set", f"dropout={0.1 if processes == 1 else 0.0}"]

    def sample(processes: int) -> Callable[[Path], list[str]]:
        return lambda out: ["sample", f"{inputs}/train/run", "--num", "64", "--block-size", "4", "--steps", "20", "--device", "cpu", "--processes", str(processes), "--out", f"{out}/drawn"]

    cache = lambda out: {"ADM_REPRO_CACHE": f"{out}/cache"}
    found = [
        Command("train", train(1)),
        Command("train, 2 processes", train(2)),
        Command("sample", sample(1), ("train",)),
        Command("sample, 2 processes", sample(2), ("train",)),
        Command("evaluate", lambda out: ["evaluate", f"{inputs}/few.npz", f"{inputs}/others.npz", "--weights", f"{inputs}/inception.pth", "--device", "cpu", "--batch-size", "4",
                                         "--resamples", "10", "--json"], (), cache),
        Command("reproduce", lambda out: ["reproduce", "table1-base", "--size", "smoke", "--jobs", "1"], (), lambda out: {"ADM_REPRO_RUNS": f"{out}/runs"}),
        Command("download", lambda out: ["download", "VIRTUAL_imagenet512.npz"], (), lambda out: cache(out) | {"ADM_REPRO_MIRROR": address}),
    ]
    return {command.name: command for command in found}


class Slow(http.server.BaseHTTPRequestHandler):
    """Serves one file at some megabytes a second, from wherever it is asked to."""

    content = b""

    def do_GET(self) -> None:
        wanted = self.headers.get("Range", "")
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
        if start >= len(self.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(self.content)}")
            return self.end_headers()
        self.send_response(206 if start else 200)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(len(self.content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        self.end_headers()
        with contextlib.suppress(OSError):  # the other side was killed
            for i in range(start, len(self.content), 100_000):
                self.wfile.write(self.content[i:i + 100_000])
                time.sleep(0.02)
        return None

    def log_message(self, *_) -> None:
        pass


@contextlib.contextmanager
def served(content: bytes) -> Iterator[str]:
    """The address of a server of one file."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (Slow,), {"content": content}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def make_inputs(folder: Path) -> None:
    """Images with classes, and Inception with random weights of its own shapes."""
    draw = np.random.default_rng(0)
    for name, count in (("images", 64), ("few", 20), ("others", 20)):
        np.savez(folder / f"{name}.npz", arr_0=draw.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8), arr_1=draw.integers(0, 10, count))
    torch.manual_seed(0)
    torch.save(Inception().state_dict(), folder / "inception.pth")


def normalised(path: Path) -> bytes:
    """A file's content without what tells the time."""
    if path.name == "log.jsonl":
        return "\n".join(json.dumps({k: v for k, v in json.loads(line).items() if k != "images_per_second"}) for line in path.read_text().splitlines()).encode()
    if path.name == "record.json":
        return json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "provenance"}).encode()
    return path.read_bytes()


def fingerprint(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file that a run leaves, without locks, executed notebooks and the workflow's own notes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and path.suffix not in (".lock", ".ipynb", ".log") and path.name not in ("stdout", "stderr") and not {".snakemake", "logs"} & set(name.parts):
            found[str(name)] = hashlib.sha256(normalised(path)).hexdigest()
    return found


def readable(path: Path) -> None:
    """An error if a file is not what its name says."""
    if path.suffix in (".npz", ".zip"):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
    elif path.suffix == ".safetensors":
        with safe_open(path, "np") as file:
            assert all(file.get_tensor(key) is not None for key in sorted(file.keys()))
    elif path.suffix == ".json":
        json.loads(path.read_text())


def half_written(folder: Path, whole: dict[str, str]) -> list[str]:
    """Visible files that nobody should trust."""
    bad = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        hidden = any(part.startswith(".") for part in Path(name).parts)
        if not path.is_file() or hidden or path.name.endswith((".part", ".version")) or path.suffix in (".log", ".ipynb", ".jsonl") or path.name in ("stdout", "stderr"):
            continue
        try:
            readable(path)
            if any(path.match(pattern) for pattern in FINAL) and hashlib.sha256(normalised(path)).hexdigest() != whole.get(name):
                bad.append(f"{name} is under its final name, and not final")
        except Exception as error:  # a damaged file can raise anything
            bad.append(f"{name} cannot be read: {type(error).__name__}")
    return bad


def start(command: Command, out: Path) -> subprocess.Popen:
    """The command in a session of its own, so that all of it can be killed at once."""
    out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ADM_REPRO_ROOT": str(ROOT)} | command.environment(out)
    with open(out / "stdout", "wb") as stdout, open(out / "stderr", "wb") as stderr:
        return subprocess.Popen([*CLI, *command.arguments(out)], stdout=stdout, stderr=stderr, env=environment, start_new_session=True, cwd=out)


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """A process and all that it has started."""
    try:
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def kill(process: subprocess.Popen, everything: bool, draw: random.Random) -> tuple[int, int]:
    """SIGKILL to a process and its children, or to one of them, and then wait until all have ended; how many were killed, and how many others did not end by themselves."""
    members = family(process)
    victims = members if everything else draw.sample(members, min(1, len(members)))
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=120)
    _, alive = psutil.wait_procs(members, timeout=120)
    for survivor in alive:  # they would write into the run that follows
        with contextlib.suppress(psutil.NoSuchProcess):
            survivor.kill()
    process.wait()
    return len(victims), len(alive)


def finished(command: Command, out: Path) -> str:
    """Runs the command to its end; "" or what it said when it failed."""
    process = start(command, out)
    try:
        status = process.wait(timeout=900)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return "did not end within 15 minutes"
    if status == 0 and command.name == "evaluate":  # its output is what it prints
        (out / "metrics.json").write_bytes((out / "stdout").read_bytes())
    return "" if status == 0 else f"exit status {status}: {(out / 'stderr').read_text()[-500:]}"


def undisturbed(command: Command, out: Path) -> tuple[dict[str, str], float, float]:
    """What the command leaves, seconds until its first file, and until its end."""
    process, begun, first = start(command, out), time.monotonic(), None
    while process.poll() is None:
        if first is None and any(path.name not in ("stdout", "stderr") for path in out.rglob("*") if path.is_file()):
            first = time.monotonic() - begun
        time.sleep(0.02)
    took = time.monotonic() - begun
    if process.returncode:
        raise SystemExit(f"{command.name} fails undisturbed: {(out / 'stderr').read_text()[-2000:]}")
    if command.name == "evaluate":
        (out / "metrics.json").write_bytes((out / "stdout").read_bytes())
    return fingerprint(out), first or 0.0, took


def trial(command: Command, out: Path, whole: dict[str, str], moment: float, everything: bool, draw: random.Random) -> dict:
    """One kill, and the run after it."""
    shutil.rmtree(out, ignore_errors=True)
    process = start(command, out)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=moment)
    killed, survived = (0, 0) if process.poll() is not None else kill(process, everything, draw)  # the number of one that has ended may be a stranger's
    found = {"moment": round(moment, 2), "everything": everything, "processes_killed": killed, "findings": half_written(out, whole)}
    if survived:
        found["findings"].append(f"{survived} processes were still there two minutes after another was killed")
    kept = {name: digest for name, digest in fingerprint_of_final(out).items() if whole.get(name) == digest}
    if failure := finished(command, out):
        found["findings"].append(f"the run after it failed: {failure}")
    after = fingerprint(out)
    found["findings"] += [f"{name} differs from an undisturbed run's" for name in sorted(whole.keys() & after.keys()) if whole[name] != after[name]]
    found["findings"] += [f"{name} is missing" for name in sorted(whole.keys() - after.keys())] + [f"{name} is left behind" for name in sorted(after.keys() - whole.keys())]
    found["bytes_lost"] = sum((out / name).stat().st_size if (out / name).exists() else 1 for name, digest in kept.items() if after.get(name) != digest)
    found["files_finished_before"] = len(kept)
    return found


def fingerprint_of_final(folder: Path) -> dict[str, str]:
    """Of the files that are there under a final name."""
    return {str(path.relative_to(folder)): hashlib.sha256(normalised(path)).hexdigest()
            for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".") and any(path.match(pattern) for pattern in FINAL)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each command")
    parser.add_argument("--only", nargs="*", help="names of commands")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file; kills that it holds are not repeated")
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out and options.out.exists() else {"seed": options.seed, "commands": {}}
    draw = np.random.default_rng(1)
    batch = tempfile.NamedTemporaryFile(suffix=".npz")
    np.savez(batch, arr_0=draw.integers(0, 256, (8, 512, 512, 3), dtype=np.uint8), mu=np.zeros(2))
    batch.seek(0)
    with tempfile.TemporaryDirectory() as folder, served(batch.read()) as address:
        inputs = Path(folder, "inputs")
        inputs.mkdir()
        make_inputs(inputs)
        known = commands(inputs, address)
        if unknown := set(options.only or ()) - known.keys():
            raise SystemExit(f"no such command: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
        wanted = options.only or list(known)
        for name in [name for name in known if any(name == wish or name in known[wish].inputs for wish in wanted)]:
            command = known[name]
            whole, first, took = undisturbed(command, inputs / name)
            if name not in wanted:
                continue
            again = undisturbed(command, Path(folder, "again"))[0]
            if whole != again:
                raise SystemExit(f"{name} does not repeat itself undisturbed: {sorted(k for k in whole.keys() | again.keys() if whole.get(k) != again.get(k))}")
            shutil.rmtree(Path(folder, "again"))
            entry = results["commands"].setdefault(name, {"arguments": " ".join(command.arguments(Path("OUT"))).replace(str(inputs), "INPUTS"), "kills": []})
            entry |= {"seconds": round(took, 1), "seconds_to_first_file": round(first, 1), "files": len(whole)}
            for number in range(len(entry["kills"]), options.kills):
                for attempt in range(20):  # a moment may come when the run has ended
                    draws = random.Random(f"{options.seed} {name} {number} {attempt}")
                    if (one := trial(command, Path(folder, "victim"), whole, draws.uniform(first, took), number % 2 == 0, draws))["processes_killed"]:
                        break
                entry["kills"].append(one)
                print(f"{name} {number + 1}/{options.kills}: killed {one['processes_killed']} after {one['moment']} of {took:.1f} s, {one['files_finished_before']} files were finished: "
                      f"{'; '.join(one['findings']) or 'the same'}", flush=True)
                if options.out:
                    write_json(options.out, results | {"hardware": hardware()})
    findings = sum(len(one["findings"]) for entry in results["commands"].values() for one in entry["kills"])
    print(f"{sum(len(entry['kills']) for entry in results['commands'].values())} kills, {findings} findings")
    raise SystemExit(bool(findings))


if __name__ == "__main__":
    main()
