"""LICENSES.md: the licence that each pinned dependency states in its own metadata. Runs where they are installed; what is not is taken from the page as it was.

    python reliability/licences.py
"""
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from constraints import pins

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "LICENSES.md"
COPYLEFT = re.compile(r"\b(A?L?GPL|MPL|EUPL|EPL|CDDL)\b|General Public|Mozilla", re.I)


def stated(name: str) -> str:
    """What the metadata of an installed package says, or else the first line of its licence file; "" if nothing."""
    package = distribution(name)
    found = package.metadata
    classified = "; ".join(line.split(" :: ")[-1] for line in found.get_all("Classifier") or [] if line.startswith("License ::") and line.count("::") > 1 and not line.endswith("OSI Approved"))
    texts = [path.read_text().strip().split("\n")[0].strip() for path in package.files or [] if re.match(r"LICEN[CS]E", path.name, re.I) and path.suffix in ("", ".txt", ".md")]
    return found.get("License-Expression") or classified or (found.get("License") or "").strip().split("\n")[0][:80] or (f"{texts[0]} (its licence file)" if texts else "")


def licences(before: str) -> dict[str, tuple[str, str]]:
    """Name -> version, licence; `before` is the page as it was."""
    known = {(name, version): licence for name, version, licence in re.findall(r"^\| ([\w.-]+) \| (\S+) \| ([^|]*?) \|", before, re.M)}
    found = {}
    for name, version in pins().items():
        try:
            found[name] = version, stated(name) or known.get((name, version), "") or "not stated in its metadata"
        except PackageNotFoundError:
            found[name] = version, known.get((name, version), "not looked up")
    return found


def page(found: dict[str, tuple[str, str]]) -> str:
    copyleft = [name for name, (_, licence) in found.items() if COPYLEFT.search(licence)]
    lines = ["# Licences of the dependencies", "", "Written by `reliability/licences.py`: what each pinned version says of itself. Nothing of theirs is copied into this repository, and none is handed on with it; this project is under the MIT licence (`LICENSE`).", "",
             f"With a copyleft licence, in whole or as one of several: {', '.join(copyleft) or 'none'}. They are imported unchanged, which MPL 2.0 allows without terms for other files; docutils offers an editor mode under the GPL, which is not used here; the fuzzer's packages are for development only.", "",
             "| package | version | licence |", "| --- | --- | --- |", *(f"| {name} | {version} | {licence.replace('|', '/')} |" for name, (version, licence) in sorted(found.items(), key=lambda item: item[0].lower()))]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(licences(PAGE.read_text() if PAGE.exists() else "")))
