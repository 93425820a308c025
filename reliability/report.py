"""reports/reliability.md from reliability/results/*.json and findings.toml: what was tried, what came of it, and what was not reached.

    python reliability/report.py

The targets below are what was asked for; a number that falls short of one stands beside it.
"""
import json
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
KILLS, INPUTS, HOURS = 50, 100_000, 2.0  # of each command; of each reader; of the soak


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Markdown."""
    line = lambda cells: "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])


def kills(found: dict[str, Any] | None) -> str:
    if not found:
        return "Not run."
    rows, problems = [], []
    for name, entry in found["commands"].items():
        trials = entry["kills"]
        rows.append([name, f"{len(trials)} of {KILLS}", sum(one["processes_killed"] > 0 for one in trials), sum(one["processes_killed"] > 0 and not one["findings"] for one in trials),
                     sum(one["files_finished_before"] for one in trials), sum(one["bytes_lost"] for one in trials), sum(len(one["findings"]) for one in trials)])
        problems += [f"- {name}, after {one['moment']} s: {text}" for one in trials for text in one["findings"]]
    total = ["all", *("" if i == 0 else sum(row[i + 1] for row in rows) for i in range(6))]
    return "\n\n".join([table(["command", "trials", "killed while it ran", "survived", "files finished before", "bytes lost", "findings"], [*rows, total]), *(["\n".join(problems)] if problems else []), f"On: {found.get('hardware', 'not recorded')}."])


def fuzzing(found: dict[str, Any] | None) -> str:
    if not found:
        return "Not run."
    rows = [[name, f"{entry['inputs']:,} of {INPUTS:,}", "by coverage" if entry["guided"] else "no", f"{entry['seconds']:,.0f}", len(entry["findings"]), len(entry["new"])] for name, entry in sorted(found["targets"].items())]
    reached = sum(entry["inputs"] >= INPUTS for entry in found["targets"].values())
    text = f"{sum(entry['inputs'] for entry in found['targets'].values()):,} inputs; {reached} of {len(rows)} readers reached {INPUTS:,}."
    open_ones = [f"- {name}: {one['kind']}: {one['text']}" for name, entry in sorted(found["targets"].items()) for one in entry["new"]]
    return "\n\n".join([text, table(["reader", "inputs", "guided", "seconds", "findings, mended", "findings, open"], rows), *(["Open:\n\n" + "\n".join(open_ones)] if open_ones else [])])


def soak(found: dict[str, Any] | None) -> str:
    if not found:
        return "Not run."
    parts = [f"{found['hours']:.2f} of {HOURS:g} hours, size `{found['size']}`, in {len(found['stretches'])} stretch{'es' * (len(found['stretches']) != 1)}, on {found['hardware']}."]
    for number, stretch in enumerate(found["stretches"], 1):
        for loop, entry in stretch["loops"].items():
            verdict = entry["verdict"]
            said = "too few rounds for a verdict" if verdict["grows"] is None else "; ".join(verdict["grows"]) or "nothing grows"
            said += "".join(f"; failed: {text}" for text in verdict["failed"])
            parts.append(f"Stretch {number}, {loop}: {stretch['hours']:.2f} hours, {entry['rounds']} rounds, the first {verdict['warm_up']} left out: {said}.")
            if verdict["grows"] is not None:
                parts.append(table(["size", "bytes a round", "95% interval", "counts as noise up to"], [[name, f"{one['per_round']:,.0f}", f"{one['interval'][0]:,.0f} to {one['interval'][1]:,.0f}", f"{one['margin']:,}"] for name, one in verdict["slopes"].items()]))
                parts.append(table(["count", "largest in the first third", "at the end"], [[name, one["largest_in_first_third"], one["last"]] for name, one in verdict["counts"].items()]))
    return "\n\n".join(parts)


def memory(found: Any) -> str:
    rows = (found.get("rows", []) if isinstance(found, dict) else found) or []
    if not rows:
        return "Not run."
    return table(["what", "size", "predicted, MB", "measured, MB", "ratio"], [[row["name"], row["size"], f"{row['predicted_bytes'] / 1e6:,.1f}", f"{row['measured_bytes'] / 1e6:,.1f}", f"{row['ratio']:.3f}"] for row in rows])


def report(results: Path, findings: Path) -> str:
    """The page."""
    read = lambda name: json.loads((results / f"{name}.json").read_text()) if (results / f"{name}.json").exists() else None
    known = tomllib.loads(findings.read_text())["finding"] if findings.exists() else []
    parts = ["# Reliability", "Written by `reliability/report.py` from `reliability/results` and `reliability/findings.toml`. What was asked for stands beside what was reached.",
             "## Commands that are killed", "SIGKILL at a random moment, then the same command again; it survives if the files are those of an undisturbed run, byte for byte (`reliability/kill.py`).", kills(read("kill")),
             "## Files from elsewhere", "Mutated inputs for each reader (`reliability/fuzz.py`).", fuzzing(read("fuzz")),
             "## Two hours on end", "The smoke size in a loop, and one process that lives long (`reliability/soak.py`).", soak(read("soak")),
             "## Memory, predicted and measured", memory(read("memory")),
             "## Findings and fixes", table(["where", "what", "mended", "test"], [[one["target"], one["what"], one["mended"], f"`{one['test']}`"] for one in known]) if known else "None."]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    (HERE.parent / "reports" / "reliability.md").write_text(report(HERE / "results", HERE / "findings.toml"))


if __name__ == "__main__":
    main()
