"""Measure, judge and draw figures and tables: python -m experiments [NAME ... | all] [OPTIONS], from the checkout's root.

The same command as `diffprobe reproduce`, which reads the options below and takes care of mistakes and interruptions.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import typer
from rich.table import Table
from rich.text import Text

from diffprobe.cli import main
from diffprobe.cli.options import DEVICE, MODEL, completes, option, several
from diffprobe.console import Console, visible
from diffprobe.plotting import read_sidecars
from diffprobe.report import explorable
from experiments.framework import (
    FOLDER,
    Claim,
    Options,
    check_settings,
    command,
    find_experiments,
    list_experiments,
    setting_names,
)
from experiments.framework import reproduce as run

app = typer.Typer()
_out = Console(soft_wrap=True)


def _arms(context: typer.Context) -> list[str]:
    """Labels of the arms of all tables."""
    from experiments import table1_single_encoder, table2_fusion

    return list(dict.fromkeys(arm.label for table in (table1_single_encoder, table2_fusion) for arm in table.arms(False)))


@app.command()
def reproduce(
    names: list[str] = typer.Argument([], help="Beginnings of names (fig2, tab_probes), or all.", show_default="all"),
    model: str = MODEL,
    data: str = option("", "A dataset; each experiment's own by default.", "--data", "-d"),
    count: int = option(0, "Samples; each experiment's own number when 0.", min=0),
    seed: int = option(0, "Of noise, splits and bootstrap."),
    smoke: bool = option(False, "The short form, into runs/smoke: does everything run?", "--smoke"),
    from_csv: bool = option(False, "Draw and judge again what lies in --out; needs no model and no torch.", "--from-csv"),
    listed: bool = option(False, "Name the experiments and stop.", "--list"),
    device: str | None = DEVICE,
    out: Path | None = option(None, "Folder for the figures.", "--out", "-o", show_default="figures"),
    work: Path = option(Path("runs/reproduce"), "Folder for stores; a run that was cut off goes on from them."),
    experiments: Path = option(FOLDER, "Folder of the experiment files.", show_default="this checkout's"),
    trainings: int = option(0, "Of each arm, where something is trained; each experiment's own number when 0.", min=0),
    arms: list[str] = several(
        [], "Labels of the arms that a table is to have, or their beginnings; all by default.", autocompletion=completes(_arms)
    ),
    set_: list[str] = option(
        [],
        "A setting of what is trained, such as language_model=smollm2.",
        "--set",
        metavar="NAME=VALUE",
        autocompletion=completes(lambda _: [f"{name}=" for name in setting_names()]),
    ),
) -> None:
    """Measure, judge and draw every figure and table.

    Exit code 1 when one of them failed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "reproduce runs in one process; 'accelerate launch -m diffprobe' spreads 'extract' and 'mllm train' over several."
        )
    files = find_experiments(names or ["all"], experiments)
    check_settings(set_)
    if listed:
        for name, title in list_experiments(files):
            _out.print(f"{name:<20} {title}")
        return
    options = Options(
        model=model, data=data, count=count, seed=seed, smoke=smoke, work=work, device=device, trainings=trainings, arms=",".join(arms),
        set=tuple(set_),
    )  # fmt: skip
    if from_csv and options != Options(work=work):
        raise ValueError("--from-csv draws what was measured; it goes only with names, --out and --work.")
    folder = out or Path("runs/smoke" if smoke else "figures")
    outcomes = run(files, options, folder, from_csv=from_csv, tell=_out.print)
    _show_claims([(claim, outcome.name) for outcome in outcomes for claim in outcome.claims])
    stores = [word for path in explorable(work)[:1] for word in ("--store", str(path))]
    good, bad = [o.name for o in outcomes if not o.error and not o.skipped], [o for o in outcomes if o.error]
    skipped = [o for o in outcomes if o.skipped]
    if good:
        _out.print(f"\nAll verdicts are in {folder / 'claims.csv'}. Pictures, each as .png and .pdf:")
        sidecars = read_sidecars(folder)
        for name in good:
            for picture in sidecars[name]["config"]["figures"]:
                _out.print(f"  {folder / picture}.png")
    for outcome in skipped:
        _out.print(f"Not applicable: {outcome.name}: {outcome.skipped}")
    for outcome in bad:
        _out.print(f"Failed: {outcome.name}: {outcome.error} (the traceback is in {work / outcome.name}.error.txt)")
    _out.print("Next:")
    if skipped:  # which sites of this model are best is measured, and not taken from a UNet's names
        store, drawn = str(work / f"{Path(model).name}.zarr"), "shapes:256?split=test&objects=1"
        record = ["extract", "--model", model, "--data", drawn, "--sites", "blocks", "--reduce", "mean", "--out", store]
        for words in (record, ["probe", "scan", store, "--label", "colour"]):
            _out.print("  " + shlex.join(["diffprobe", *words]))
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
