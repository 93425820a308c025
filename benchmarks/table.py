"""Write the README's table of speed anew from benchmarks/results. The report's table and picture, which the README shows, too, are written by `adm-repro report`, as part
of the sizes that have a section on speed.

    python benchmarks/table.py
"""
import argparse
import re
from pathlib import Path

from adm_repro.speed import load_results, short_table

HERE = Path(__file__).resolve().parent
BETWEEN = re.compile(r"(?<=<!-- speed -->\n).*?(?=\n<!-- end of speed -->)", re.DOTALL)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    readme = HERE.parent / "README.md"
    table = short_table(load_results(HERE / "results"))
    readme.write_text(BETWEEN.sub(lambda _: table, readme.read_text()))
    print(table)


if __name__ == "__main__":
    main()
