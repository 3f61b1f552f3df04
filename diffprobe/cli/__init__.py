"""The command line: each command reads its options, calls one function and says what to type next.

`entry` holds the groups and `main`, `options` what commands share; `record`, `measure`, `draw` and `mllm` hold the commands.
Heavy libraries are imported inside the commands, so that ``--help`` answers at once and probes run without torch.
"""

from diffprobe.cli import draw, measure, mllm, record
from diffprobe.cli.entry import app, main

__all__ = ["app", "draw", "main", "measure", "mllm", "record"]
