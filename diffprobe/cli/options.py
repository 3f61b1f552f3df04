"""What commands share: how an option is declared, options that mean the same everywhere, and how results are printed.

A list is an option that may be repeated and whose values may be parted by commas: ``-t 50 -t 500`` is ``-t 50,500``.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from diffprobe.console import Console

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
say = Console(soft_wrap=True).print


def option(default: Any, help: str, *spellings: str, **more: Any) -> Any:
    """An option: its default (``...`` where it must be given), its help, its spellings where they are not its name alone."""
    return typer.Option(default, *spellings, help=help, **more)


def several(default: Any, help: str, *spellings: str, **more: Any) -> Any:
    """An option that is a list: it may be repeated, and commas part its values."""
    return typer.Option(default, *spellings, help=help, parser=parts, **more)


def argument(default: Any, help: str, metavar: str | None = None) -> Any:
    return typer.Argument(default, help=help, metavar=metavar)


def parts(text: Any) -> list[str]:
    """The values that one use of an option gives.

    >>> parts("null, caption,")
    ['null', 'caption']
    """
    return [part.strip() for part in str(text).split(",") if part.strip()]


def numbers(texts: Iterable[str], kind: type[int] | type[float], name: str) -> list[Any]:
    """The values of the option `name` as numbers.

    Raises:
        ValueError: one of them is no number.
    """
    given = [part for text in texts for part in parts(text)]
    try:
        return [kind(part) for part in given]
    except ValueError:
        example = "10,50,100" if kind is int else "1.5,4"
        raise ValueError(f"{name} takes numbers parted by commas, such as {example}; got {','.join(given)!r}.") from None


# --- what the shell completes -----------------------------------------------------------------------


def completes(names: Callable[[typer.Context], Iterable[str]]) -> Callable[[typer.Context, str], list[str]]:
    """Completes the last value of a list from the names that `names` gives; what is wrong with them is no matter here."""

    def offered(context: typer.Context, incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        with contextlib.suppress(Exception):
            return [f"{before}{comma}{name}" for name in names(context) if name.startswith(last)]
        return []

    return offered


def model_sites(context: typer.Context) -> list[str]:
    """Presets and, of a UNet in a folder or embedded, its sites from the names of its weights: torch is not imported."""
    from safetensors import safe_open

    from diffprobe.sites import PRESETS, list_sites
    from diffprobe.zoo import WEIGHTS

    model = str(context.params.get("model") or "shapes-sd")
    folder = next((place for place in (WEIGHTS / model, Path(model)) if (place / "unet").is_dir()), None)
    named: set[str] = set()
    for file in (folder / "unet").glob("*.safetensors") if folder else ():
        with safe_open(file, "np") as weights:
            named |= set(weights.keys())
    parts = [name.split(".") for name in sorted(named)]
    modules = dict.fromkeys(".".join(part[:n]) for part in parts for n in range(1, len(part)))
    return [*PRESETS, *(site.name for site in (list_sites(modules) if modules else []))]


def stored_sites(context: typer.Context) -> list[str]:
    """The sites of the store that stands on the command line, from its root's object alone."""
    store = Path(context.params.get("store") or context.args[0])  # behind an option without a value, words are not sorted yet
    request = json.loads((store / "zarr.json").read_text("utf-8"))["attributes"]["diffprobe"]["request"]
    return [*request["sites"], *request["maps"]]


# --- options of many commands -----------------------------------------------------------------------


def takes(shared: Callable[..., None]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command the options that `shared` declares, before its own; it passes them on as ``**asked``."""

    def join(command: Callable[..., None]) -> Callable[..., None]:
        both = [one for call in (shared, command) for one in inspect.signature(call, eval_str=True).parameters.values()]
        options = [one.replace(kind=one.POSITIONAL_OR_KEYWORD) for one in both if hasattr(one.default, "param_decls")]
        command.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
        command.__annotations__ = {one.name: one.annotation for one in options}
        return command

    return join


def in_panels(**panels: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Sorts a command's options into titled panels of its help: ``what="model data", how="device"``."""

    def mark(command: Callable[..., None]) -> Callable[..., None]:
        command.panels = {name: PANELS[panel] for panel, names in panels.items() for name in names.split()}  # type: ignore[attr-defined]
        return command

    return mark


PANELS = {"what": "What", "where": "Where it is kept", "how": "How it is computed", "start": "Before it starts or goes on"}
STORE = argument(..., "A store that 'diffprobe extract' wrote.", "STORE")
MODEL = option("shapes-sd", "Hub id, folder, or embedded name.", "--model", "-m")
REVISION = option(None, "Hub revision of the model.")
ALLOW_PICKLE = option(False, "Load weights that are not safetensors. Pickle files can run code.", "--allow-pickle")
VARIANT = option(None, "Which of several files of weights, such as fp16.", metavar="NAME")
LORA = option([], "A LoRA adapter. May be repeated.", "--lora", metavar="FILE[:SCALE]")
CONFIG = option(None, "Configs and tokenizers for a single .safetensors file.", metavar="FOLDER")
LANGUAGE_MODEL = option("shapes-lm", "shapes-lm, smollm2, a folder or a hub id.", "--language-model", "-l")
DEVICE = option(None, "cpu, cuda, cuda:1; CUDA where there is one.")
BATCH_ROWS = option(16, "Rows of one forward pass of the diffusion model.", min=1)
DRY_RUN = option(False, "Print the forecast and stop.", "--dry-run")
FORCE = option(False, "Go on although the disk is too small for the forecast.", "--force")


def show(frame: pd.DataFrame | list[dict[str, Any]], columns: Mapping[str, str], width: int = 200) -> None:
    """Prints a table.

    Args:
        frame: Its rows.
        columns: What stands below each header, as a format of the row: ``{"score": "{value:.3f}"}``; empty where the row lacks it.
        width: Of the lines where the output is no terminal.
    """
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False)
    rows: Any = frame if isinstance(frame, list) else frame.to_dict("records")
    for row in rows:
        table.add_row(*(cell.format_map(defaultdict(str, row)) for cell in columns.values()))
    Console(width=None if sys.stdout.isatty() else width).print(table)


INTERVAL = {"95% interval": "{low:.3f}-{high:.3f}"}


def best(frame: pd.DataFrame, by: list[str]) -> list[dict[str, Any]]:
    """The row with the highest value of each group."""
    groups = (rows for _, rows in frame.groupby(by, sort=False))
    return [dict(rows.iloc[int(rows["value"].to_numpy().argmax())]) for rows in groups]


def say_next(*commands: list[str]) -> None:
    """Prints commands, each as its words after ``diffprobe``, that run as they stand."""
    say("Next:")
    for words in commands:
        say(f"  {shlex.join(['diffprobe', *words])}")


def is_first_process() -> bool:
    """Whether this is the only process of a run or the one that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def table_place(out: str, store: str, name: str) -> str:
    """Where a table goes; asked before the work, so that nothing is lost to a folder that is not there."""
    from diffprobe.rundir import is_remote

    place = out or f"{store.rstrip('/')}.{name}.csv"
    if place.endswith((".json", "/")) or (not is_remote(place) and Path(place).is_dir()):
        raise ValueError(
            f"--out {place!r} cannot be a table: give a file such as {name}.csv; its origin goes beside it as .json."
        )
    if not is_remote(place):
        Path(place).parent.mkdir(parents=True, exist_ok=True)
    return place


def configured(config: Callable[..., T], options: Mapping[str, Any], **others: Any) -> T:
    """A config from a command's options: every field that is named as an option, and `others`."""
    return config(**{name: options[name] for name in inspect.signature(config).parameters.keys() & options.keys()} | others)
