"""Writes requirements-ci.txt: every pin of constraints.txt except torch with the SHA-256 of each of its files, for all platforms (make constraints; needs uv and a package index).

torch is left out: builds for CPU, CUDA and ROCm have one version and different files, and which one is right depends on the machine.
What only fuzzing, a cluster or the site needs has the marker `extra == ...`, which pip skips; take the marker off to install it.
"""
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WITHOUT_HASH = {"torch"}
ON_REQUEST = {"atheris": "fuzz", "hypothesis": "fuzz", "sortedcontainers": "fuzz", "pandas": "slurm", "snakemake-executor-plugin-slurm": "slurm", "snakemake-executor-plugin-slurm-jobstep": "slurm",
              **dict.fromkeys(("accessible-pygments", "alabaster", "babel", "furo", "imagesize", "jupyter-cache", "latex2mathml", "mdit-py-plugins", "myst-nb", "myst-parser", "roman-numerals", "snowballstemmer", "sphinx", "sphinx-basic-ng", "sphinxcontrib-applehelp", "sphinxcontrib-devhelp", "sphinxcontrib-htmlhelp", "sphinxcontrib-jsmath", "sphinxcontrib-qthelp", "sphinxcontrib-serializinghtml"), "docs")}


def pins() -> dict[str, str]:
    """Name -> version in constraints.txt; names as there."""
    return dict(line.strip().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line and not line.startswith("#"))


def with_markers(text: str) -> str:
    """The file's lines, where what is installed only on request is marked."""
    def mark(match: re.Match[str]) -> str:
        return f'{match[0]} ; extra == "{ON_REQUEST[match[1]]}"' if match[1] in ON_REQUEST else match[0]

    return re.sub(r"^([\w.-]+)==\S+", mark, text, flags=re.M)


def main() -> None:
    if not shutil.which("uv"):
        raise SystemExit("uv is not installed: pip install uv")
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "pins.in"), Path(folder, "pins.txt")
        source.write_text("".join(f"{name}=={version}\n" for name, version in pins().items() if name not in WITHOUT_HASH))
        subprocess.run(["uv", "pip", "compile", "--quiet", "--no-deps", "--universal", "--python-version", "3.11.5", "--generate-hashes", "--no-annotate", "--no-header", str(source), "-o", str(target)], check=True)
        found = with_markers(target.read_text())
    (ROOT / "requirements-ci.txt").write_text("# Written by reliability/constraints.py from constraints.txt: make constraints\n" + found)


if __name__ == "__main__":
    main()
