"""`python -m adm_repro` is the command `adm-repro`."""
from adm_repro.cli import main

if __name__ == "__main__":
    main(prog_name="adm-repro")
