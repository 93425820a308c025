"""The archive of records, named by version: every record and report with a manifest, the same bytes each time (make archive).

    python reports/archive.py dist     # dist/adm_repro-VERSION-records.tar.gz
"""
import gzip
import hashlib
import io
import json
import sys
import tarfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def contents(root: Path) -> dict[str, bytes]:
    "Path -> bytes of what is archived, and its manifest."
    files = sorted(path for pattern in ("reports/*/records/*.json", "reports/*/failures/*.json", "reports/*/README.md", "reports/*.md", "benchmarks/results/*.json", "reliability/results/*.json",
                                        "experiments/**/*.toml", "CITATION.cff", "DEVIATIONS.md", "CHANGELOG.md", "LICENSE") for path in root.glob(pattern))
    found = {str(path.relative_to(root)): path.read_bytes() for path in files if path.parent.name != "smoke" and path.parent.parent.name != "smoke"}
    manifest = {"version": version(root), "files": {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}}
    return found | {"MANIFEST.json": (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()}


def version(root: Path) -> str:
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]


def archive(root: Path, folder: Path) -> Path:
    "Write the archive; its bytes depend on its contents alone."
    path = folder / f"adm_repro-{version(root)}-records.tar.gz"
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as raw, gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed, tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in sorted(contents(root).items()):
            about = tarfile.TarInfo(f"adm_repro-{version(root)}-records/{name}")
            about.size, about.mode = len(content), 0o644
            tar.addfile(about, io.BytesIO(content))
    return path


if __name__ == "__main__":
    print(archive(ROOT, Path(sys.argv[1])))
