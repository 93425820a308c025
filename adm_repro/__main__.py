"""`python -m adm_repro` is the command `adm-repro`."""
from adm_repro.cli import main

main(prog_name="adm-repro")
