"""The pages of the site: copies of what the repository holds, under the same paths, ready for Sphinx.

    python docs/gather.py build/site-source && python -m sphinx -W --keep-going -q -c docs build/site-source _docs     # make docs

Nothing is written twice: lessons, walkthroughs, README, reports and notes are taken as they are. Notebooks lose nbdev's directives and hidden cells, and keep their
stored outputs. A link to another page stays a link; one to a file that is no page goes to the repository, so that it works wherever the site is.
"""
import configparser
import json
import os
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTES = ("CHANGELOG.md", "CONTRIBUTING.md", "DATA_STATEMENT.md", "DEVIATIONS.md", "LICENSES.md", "MODEL_CARD.md", "SECURITY.md",
         "benchmarks/README.md", "experiments/profiles/README.md", "tests/cluster/README.md", "tests/golden/README.md")


def setting(name: str) -> str:
    "A value of settings.ini."
    parser = configparser.ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini")
    return parser["DEFAULT"][name]


def in_repository(path: str) -> str:
    "The address of a file that is no page."
    return f"{setting('git_url')}/{'tree' if (ROOT / path).is_dir() else 'blob'}/{setting('branch')}/{path}"


def pages() -> dict[str, list[str]]:
    "Paths in the repository, by part of the site, in reading order."
    names = lambda pattern: sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern) if ".ipynb_checkpoints" not in path.parts)
    return {"Walkthroughs": names("nbs/walkthrough/*.ipynb"), "Lessons": ["nbs/index.ipynb", *names("nbs/[0-9]*.ipynb")],
            "Reports": [*names("reports/*/README.md"), *names("reports/*.md")], "Notes": [name for name in NOTES if (ROOT / name).is_file()]}


def relinked(text: str, page: str, known: set[str]) -> str:
    "Links and pictures of a page whose targets are no pages point into the repository; pictures are copied beside it and stay."
    def change(match: re.Match[str]) -> str:
        mark, label, target, anchor = match.groups()
        path = os.path.normpath(os.path.join(os.path.dirname(page), target))
        if path == "README.md" and target and not mark:
            return f"[{label}]({os.path.relpath('index.md', os.path.dirname(page) or '.')}{anchor or ''})"
        if mark or not target or re.match(r"[a-z]+:", target) or path in known:
            return match[0]
        return f"[{label}]({in_repository(path)}{anchor or ''})"

    parts = re.split(r"(^```.*?^```)", text, flags=re.M | re.S)  # listings hold no links
    parts[::2] = [re.sub(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)#\s]*)(#[^)\s]*)?\)", change, part) for part in parts[::2]]
    return "".join(parts)


def notebook(text: str, page: str, known: set[str]) -> str:
    "A notebook without nbdev's directives, and without the cells that they hide."
    content, cells = json.loads(text), []
    for cell in content["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            cell["source"] = relinked(source, page, known)
        elif re.match(r"#\| *(hide|default_exp)\b", source):
            continue
        else:
            cell["source"] = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")
        cells.append(cell)
    return json.dumps(content | {"cells": cells})


def api_page(module: str, lesson: str) -> str:
    "What a module offers, from its docstrings."
    return f"# {module}\n\nDefined and explained in [{Path(lesson).stem}](/{lesson}).\n\n```{{eval-rst}}\n.. automodule:: adm_repro.{module}\n   :members:\n   :member-order: bysource\n```\n"


def contents(parts: dict[str, list[str]]) -> str:
    "The README's lists of pages."
    tree = lambda caption, names, depth=1: f"\n```{{toctree}}\n:caption: {caption}\n:maxdepth: {depth}\n:hidden:\n\n" + "\n".join(f"/{os.path.splitext(name)[0]}" for name in names) + "\n```\n"
    return "".join(tree(caption, names) for caption, names in parts.items() if names)


def gather(out: Path) -> None:
    "Write the sources of the site; what was there before is removed."
    shutil.rmtree(out, ignore_errors=True)
    parts = pages()
    api = {re.sub(r"\d+_", "", Path(name).stem): name for name in parts["Lessons"] if re.match(r"\d", Path(name).name)}
    known = {name for names in parts.values() for name in names} | {"README.md"}
    for page in sorted(known):
        text, target = (ROOT / page).read_text(), out / ("index.md" if page == "README.md" else page)
        target.parent.mkdir(parents=True, exist_ok=True)
        if page.endswith(".ipynb"):
            target.write_text(notebook(text, page, known))
            continue
        text = relinked(text, page, known).replace("```mermaid", "```text")  # drawn by a script of others where the repository is shown
        target.write_text(text + (contents(parts | {"Library": [f"api/{name}.md" for name in api]}) if page == "README.md" else ""))
    for picture in [*ROOT.glob("reports/*/figures/*.png"), *ROOT.glob("benchmarks/results/*.png")]:
        target = out / picture.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, target)
    (out / "api").mkdir()
    for module, lesson in api.items():
        (out / "api" / f"{module}.md").write_text(api_page(module, lesson))


if __name__ == "__main__":
    gather(Path(sys.argv[1]))
