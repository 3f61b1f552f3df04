"""Measure, judge and draw figures and tables: python -m experiments [NAME ... | all] [OPTIONS], from the checkout's root.

The same command as `diffprobe reproduce`, which reads the options below and takes care of mistakes and interruptions.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from diffprobe.cli import main
from diffprobe.console import Console, visible
from diffprobe.plotting import read_sidecars
from diffprobe.report import explorable
from experiments.framework import FOLDER, Claim, Options, check_settings, command, find_experiments, list_experiments
from experiments.framework import reproduce as run

app = typer.Typer()
_out = Console(soft_wrap=True)


@app.command()
def reproduce(
    names: Annotated[
        list[str] | None, typer.Argument(help="Beginnings of names (fig2, tab_probes), or all.", show_default="all")
    ] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="Hub id, folder, or embedded name.")] = "shapes-sd",
    data: Annotated[str, typer.Option("--data", "-d", help="A dataset; each experiment's own by default.")] = "",
    count: Annotated[int, typer.Option(min=0, help="Samples; each experiment's own number when 0.")] = 0,
    seed: Annotated[int, typer.Option(help="Of noise, splits and bootstrap.")] = 0,
    smoke: Annotated[bool, typer.Option("--smoke", help="The short form, into runs/smoke: does everything run?")] = False,
    from_csv: Annotated[
        bool, typer.Option("--from-csv", help="Draw and judge again what lies in --out; needs no model and no torch.")
    ] = False,
    listed: Annotated[bool, typer.Option("--list", help="Name the experiments and stop.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; CUDA where there is one.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the figures.", show_default="figures")] = None,
    work: Annotated[Path, typer.Option(help="Folder for stores; a run that was cut off goes on from them.")] = Path(
        "runs/reproduce"
    ),
    experiments: Annotated[Path, typer.Option(help="Folder of the experiment files.", show_default="this checkout's")] = FOLDER,
    trainings: Annotated[
        int, typer.Option(min=0, help="Of each arm, where something is trained; each experiment's own number when 0.")
    ] = 0,
    arms: Annotated[
        str,
        typer.Option(help="Labels of the arms that a table is to have, or their beginnings, parted by commas; all by default."),
    ] = "",
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of what is trained, for example language_model=smollm2."),
    ] = None,
) -> None:
    """Measure, judge and draw every figure and table.

    Exit code 1 when one of them failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "reproduce runs in one process; 'accelerate launch -m diffprobe' spreads 'extract' and 'mllm train' over several."
        )
    files = find_experiments(names or ["all"], experiments)
    check_settings(set_ or ())
    if listed:
        for name, title in list_experiments(files):
            _out.print(f"{name:<20} {title}")
        return
    options = Options(
        model=model, data=data, count=count, seed=seed, smoke=smoke, work=work, device=device, trainings=trainings, arms=arms,
        set=tuple(set_ or ()),
    )  # fmt: skip
    if from_csv and options != Options(work=work):
        raise ValueError("--from-csv draws what was measured; it goes only with names, --out and --work.")
    folder = out or Path("runs/smoke" if smoke else "figures")
    outcomes = run(files, options, folder, from_csv=from_csv, tell=_out.print)
    _show_claims([(claim, outcome.name) for outcome in outcomes for claim in outcome.claims])
    stores = [word for path in explorable(work)[:1] for word in ("--store", str(path))]
    good, bad = [o.name for o in outcomes if not o.error], [o for o in outcomes if o.error]
    if good:
        _out.print(f"\nAll verdicts are in {folder / 'claims.csv'}. Pictures, each as .png and .pdf:")
        sidecars = read_sidecars(folder)
        for name in good:
            for picture in sidecars[name]["config"]["figures"]:
                _out.print(f"  {folder / picture}.png")
    for outcome in bad:
        _out.print(f"Failed: {outcome.name}: {outcome.error} (the traceback is in {work / outcome.name}.error.txt)")
    _out.print("Next:")
    if good:
        _out.print("  " + shlex.join(["diffprobe", "report", str(folder), "-o", str(folder / "report.html"), *stores]))
    if bad:
        defaults = {"--experiments": (experiments, FOLDER), "--out": (out, None), "--work": (work, Options().work)}
        places = [word for option, (place, usual) in defaults.items() if place != usual for word in (option, str(place))]
        _out.print(f"  {command([o.name for o in bad], options)}{' --from-csv' * from_csv} {shlex.join(places)}".rstrip())
    if bad:
        sys.exit(1)


def _show_claims(claims: list[tuple[Claim, str]]) -> None:
    """Each claim, what this run says about it, and from which numbers."""
    if not claims:
        return
    table = Table("claim", "verdict", "statement and evidence", "figure", box=None, pad_edge=False)
    for claim, figure in claims:
        said = Text.assemble((visible(claim.statement), "bold"), "\n", visible(claim.evidence))
        table.add_row(claim.id, claim.verdict, said, figure, end_section=True)
    _out.print()
    Console(width=None if sys.stdout.isatty() else 200).print(table)


if __name__ == "__main__":
    sys.argv[:1] = ["diffprobe", "reproduce"]
    main()
