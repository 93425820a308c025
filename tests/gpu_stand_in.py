"""Runs scripts that ask for a GPU, in one process, with the CPU in its place: what only a GPU does is not shown, what fails before it is.

    python tests/gpu_stand_in.py SCRIPT ARGUMENTS... [-- SCRIPT ARGUMENTS...]
"""
import contextlib
import itertools
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode

from adm_repro import graphs


def elsewhere(value: Any) -> Any:
    """The CPU for the GPU, anything else as it is."""
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and value == "cuda" else value


class OnTheCpu(TorchFunctionMode):
    """Tensors that are made on or sent to a GPU stay."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*map(elsewhere, args), **{name: elsewhere(value) for name, value in (kwargs or {}).items()})


def recorded(function, rehearsal, device):
    """A recording that is made anew each time."""
    rehearsal()
    return function


def main() -> None:
    parse, nothing = torch._C._nn._parse_to, lambda *_: None
    replaced = [(torch.cuda, name, nothing) for name in ("synchronize", "empty_cache", "reset_peak_memory_stats")]
    replaced += [(torch.cuda, name, lambda *_: 0) for name in ("memory_allocated", "max_memory_allocated")]
    replaced += [(torch.cuda, "get_device_name", lambda: "none"), (torch.cuda, "device_count", lambda: 1), (torch, "compile", lambda function, **_: function), (graphs, "_recorded", recorded),
                 (torch.Tensor, "pin_memory", lambda tensor: tensor), (torch._C._nn, "_parse_to", lambda *args, **named: parse(*map(elsewhere, args), **{k: elsewhere(v) for k, v in named.items()}))]
    calls = [list(words) for split, words in itertools.groupby(sys.argv[1:], lambda word: word == "--") if not split]
    with contextlib.ExitStack() as during:
        for place, name, value in replaced:
            during.enter_context(mock.patch.object(place, name, value))
        sys.path.insert(0, str(Path(calls[0][0]).parent))
        import common

        during.enter_context(mock.patch.object(common, "ceiling", lambda *_: 1e12))  # its products are large
        during.enter_context(OnTheCpu())
        for sys.argv in calls:
            runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
