"""Running experiments: verdicts from rows, files that belong together, and `diffprobe reproduce` on a small folder of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from diffprobe.cli import main
from diffprobe.report import collect_claims
from experiments.framework import (
    FOLDER,
    Claim,
    Experiment,
    OptionError,
    Options,
    Result,
    changed,
    chosen_arms,
    command,
    find_experiments,
    load_experiment,
    reproduce,
)

GOOD = """
from matplotlib.figure import Figure
import numpy as np
import pandas as pd
from experiments.framework import Claim, Experiment, Options, Result, verdict

def measure(options: Options) -> Result:
    import torch  # as a real one: only to measure

    values = torch.arange(options.count).double().numpy() + options.seed
    return Result(pd.DataFrame({"value": values, "n": options.count}), {"grid": np.eye(3)}, {"store": "none"})

def judge(rows: pd.DataFrame) -> list[Claim]:
    low, high = rows["value"].min(), rows["value"].max()
    return [Claim("A1", "Values are above one", verdict(low, high, 1), f"[{low:g}, {high:g}], n = {len(rows)}")]

def draw(result: Result) -> dict[str, Figure]:
    figures = {suffix: Figure(figsize=(2, 1)) for suffix in ("", "grid")}
    figures[""].subplots().plot(result.rows["value"])
    figures["grid"].subplots().imshow(result.pictures["grid"])
    return figures

EXPERIMENT = Experiment("fig1_good", "Numbers that rise", 6, 2, measure, judge, draw, {"": "A line", "grid": "A grid"})
if __name__ == "__main__":
    EXPERIMENT.main()
"""
BAD = GOOD.replace("fig1_good", "fig2_bad").replace(
    "    import torch", '    raise RuntimeError("no [luck]\\nat all")\n    import torch'
)
BROKEN = "import a_module_that_is_not_there\n"
TABLE = GOOD.replace("fig1_good", "tab_more").replace('Claim("A1", "Values', 'Claim("A0", "All values')
BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ImportError("torch is blocked")

sys.meta_path.insert(0, Blocked())
try:
    import torch
except ImportError as error:
    print(error)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four experiment files: two that work, one that fails while it measures, one that does not even load."""
    found = tmp_path / "experiments"
    found.mkdir()
    for name, text in {"fig1_good": GOOD, "fig2_bad": BAD, "fig3_broken": BROKEN, "tab_more": TABLE, "helper": ""}.items():
        (found / f"{name}.py").write_text(text)
    return found


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """`diffprobe reproduce` in this process, in an empty folder: exit code, output, errors."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["diffprobe", "reproduce", *arguments, "--experiments", str(folder)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        output, errors = capsys.readouterr()
        return code, output, errors

    return call


# --- one experiment -------------------------------------------------------------------------------


def test_a_run_keeps_what_redraws_it(folder: Path, tmp_path: Path) -> None:
    experiment, out = load_experiment(folder / "fig1_good.py"), tmp_path / "figures"
    claims = experiment.run(Options(seed=2, work=tmp_path / "work"), out)
    assert claims == [Claim("A1", "Values are above one", "held", "[2, 7], n = 6")]
    names = {"fig1_good.png", "fig1_good.pdf", "fig1_good.csv", "fig1_good.json", "fig1_good.npz", "claims.csv"}
    names |= {"fig1_good_grid.png", "fig1_good_grid.pdf", "fig1_good_grid.json"}
    assert {path.name for path in out.iterdir()} == names
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert experiment.redraw(out) == claims
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_origin_says_how_to_do_it_again(folder: Path, tmp_path: Path) -> None:
    load_experiment(folder / "fig1_good.py").run(Options(smoke=True, work=tmp_path), tmp_path)
    config = json.loads((tmp_path / "fig1_good.json").read_text())["config"]
    assert config["command"] == "diffprobe reproduce fig1_good --smoke"
    assert (config["count"], config["model"], config["store"], config["seconds"]) == (2, "shapes-sd", "none", 0)
    assert config["figures"] == ["fig1_good", "fig1_good_grid"]
    assert config["measured_with"]["numpy"] == np.__version__
    assert str(tmp_path) not in json.dumps(config)
    assert json.loads((tmp_path / "fig1_good_grid.json").read_text()) == {"alt": "A grid", "rows": "fig1_good.csv"}


def test_verdicts_come_from_the_rows_alone(folder: Path, tmp_path: Path) -> None:
    experiment = load_experiment(folder / "fig1_good.py")
    assert experiment.run(Options(), tmp_path)[0].verdict == "undecided"
    rows = pd.read_csv(tmp_path / "fig1_good.csv")
    rows.assign(value=rows["value"] - 10).to_csv(tmp_path / "fig1_good.csv", index=False)
    assert experiment.redraw(tmp_path)[0].verdict == "not held"
    assert collect_claims(tmp_path)["verdict"].tolist() == ["not held"]
    assert pd.read_csv(tmp_path / "claims.csv")["evidence"].tolist() == ["[-10, -5], n = 6"]


def test_every_choice_of_options_has_a_work_folder_of_its_own(folder: Path, tmp_path: Path) -> None:
    seen: list[Path] = []
    good = load_experiment(folder / "fig1_good.py")
    measured, drawn = Result(pd.DataFrame({"value": [1.0]})), {"": Figure(figsize=(1, 1))}
    spy = replace(good, measure=lambda options: [seen.append(options.work), measured][1], draw=lambda result: drawn)
    for options in (
        Options(),
        Options(smoke=True),
        Options(seed=1),
        Options(model="a/b c"),
        Options(data="shapes:9?x=1"),
        Options(set=("steps=9",)),
        Options(),
    ):
        spy.run(replace(options, work=tmp_path / "work"), tmp_path)
    assert len(set(seen)) == 6
    assert seen[0] == seen[-1] == tmp_path / "work" / "shapes-sd_n6_seed0"


def test_settings_of_trainings_are_read_as_their_kind(folder: Path, tmp_path: Path) -> None:
    from experiments.comparison import Settings

    given = ("language_model=maker/lm", "batch=8", "rates=1e-4,2e-5", "benchmarks=shapes-vqa:9", "steps=3,4")
    found = changed(Settings(), given)
    assert (found.language_model, found.batch, found.rates, found.steps) == ("maker/lm", 8, (1e-4, 2e-5), (3, 4))
    assert found.benchmarks == ("shapes-vqa:9",) and found.encoder == Settings.encoder
    for wrong, reason in (
        ("stpes=3,4", "its settings are language_model"), ("batch", "no NAME=VALUE"), ("batch=a", "not of that kind"),
        ("steps=3", "not of that kind"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=reason):
            changed(Settings(), [wrong])
    options = Options(set=given[:2], trainings=2, arms="CLIP")
    assert command(["tab"], options) == (
        "diffprobe reproduce tab --trainings 2 --arms CLIP --set language_model=maker/lm --set batch=8"
    )
    assert (Options().seeds, Options(smoke=True).seeds, options.seeds) == (3, 1, 2)
    assert chosen_arms(["CLIP", "concat s=0", "concat s=4"], str, Options(arms="concat")) == ["concat s=0", "concat s=4"]
    with pytest.raises(ValueError, match="No arm begins with 'clip'; there are CLIP, concat"):
        chosen_arms(["CLIP", "concat"], str, Options(arms="CLIP,clip"))


def test_a_setting_that_nothing_has_is_refused_at_once(run: Callable[..., tuple[int, str, str]]) -> None:
    code, output, errors = run("fig1", "--set", "stpes=3")
    assert code == 2 and "fig1_good" not in output and "Traceback" not in errors
    assert "--set stpes=3 is no NAME=VALUE of an experiment; settings are steps, batch" in " ".join(errors.split())


def test_wrong_options_end_with_one_sentence(run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OptionError("No arm begins with 'x'; there are a, b.")

    monkeypatch.setattr("experiments.framework.Experiment.run", refuse)
    code, _, errors = run("fig1", "--arms", "x")
    assert code == 2 and errors.strip() == "diffprobe: No arm begins with 'x'; there are a, b."
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, errors = run("fig1")
    assert code == 2 and "reproduce runs in one process" in errors


def test_pictures_of_an_earlier_run_do_not_stay(folder: Path, tmp_path: Path) -> None:
    experiment = load_experiment(folder / "fig1_good.py")
    experiment.run(Options(), tmp_path)
    bare = replace(
        experiment,
        measure=lambda options: Result(pd.DataFrame({"value": [1.0]})),
        draw=lambda result: {"": Figure(figsize=(1, 1))},
    )
    bare.run(Options(), tmp_path)
    assert not (tmp_path / "fig1_good.npz").exists()


@pytest.mark.parametrize(("drawn", "alt"), [({"grid": Figure()}, {"grid": "A grid"}), ({"": Figure()}, {"grid": "A grid"})])
def test_a_figure_without_alt_text_or_first_picture_is_refused(
    folder: Path, tmp_path: Path, drawn: dict[str, Figure], alt: dict[str, str]
) -> None:
    experiment: Experiment = replace(load_experiment(folder / "fig1_good.py"), draw=lambda result: drawn, alt=alt)
    with pytest.raises(ValueError, match="each needs an alt text"):
        experiment.run(Options(), tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


def test_an_experiment_file_by_itself(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experiment, out = load_experiment(folder / "fig1_good.py"), ["--out", str(tmp_path / "o"), "--work", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        experiment.main([*out, "--from-csv"])
    assert stop.value.code == 2
    assert "fig1_good.csv does not exist: run the experiment once without --from-csv" in capsys.readouterr().err
    experiment.main([*out, "--count", "3", "--seed", "9"])
    measured = capsys.readouterr().out
    assert "A1 held: Values are above one\n      [9, 11], n = 3" in measured
    experiment.main([*out, "--from-csv"])
    assert capsys.readouterr().out == measured


def test_primaries_share_one_error_rate(tmp_path: Path) -> None:
    """Holm over the primary statements of a folder, of whatever figure; the exploratory ones are left as they are."""
    planted = {"fig_a": [("A1", 0.04, True, "held"), ("A1", 0.04, False, "held")], "fig_b": [("A2", 0.001, True, "not held"),
               ("A3", 0.03, True, "held"), ("A4", None, True, "undecided"), ("A5", 0.9, True, "not testable")]}  # fmt: skip
    for name, claims in planted.items():
        rows = [asdict(Claim(c, f"{c} {primary}", v, "", p, primary)) for c, p, primary, v in claims]
        (tmp_path / f"{name}.png").touch()
        (tmp_path / f"{name}.json").write_text(json.dumps({"alt": name, "config": {"claims": rows}}))
    table = collect_claims(tmp_path)
    assert table["id"].tolist() == ["A1", "A1", "A2", "A3", "A4", "A5"]
    assert table["kind"].tolist() == ["primary", "exploratory", *["primary"] * 4]
    assert table["verdict"].tolist() == ["undecided", "held", "not held", "undecided", "undecided", "not testable"]
    adjusted = {0: 0.06, 2: 0.003, 3: 0.06}  # three tests: 3 x .001, 2 x .03, and .04 no smaller than the one before
    assert table["p_holm"].dropna().to_dict() == pytest.approx(adjusted)


def test_each_claim_of_the_paper_has_one_primary_statement() -> None:
    table = pd.read_csv(FOLDER.parent / "figures" / "claims.csv")
    counts = table[table["kind"] == "primary"]["id"].value_counts().to_dict()
    assert counts == dict.fromkeys([*(f"A{k}" for k in range(1, 7)), "A7 Discffusion", "A7 loss", "F1", "F2", "F3", "L1", "L2",
                                    "L3", "L4", *(f"P{k}" for k in range(1, 6)), "PCK"], 1)  # fmt: skip


# --- several --------------------------------------------------------------------------------------


def test_names_are_beginnings(folder: Path) -> None:
    names = lambda *patterns: [path.stem for path in find_experiments(patterns, folder)]  # noqa: E731
    assert names("tab", "fig1", "fig1_good") == ["tab_more", "fig1_good"]
    assert names("all") == ["fig1_good", "fig2_bad", "fig3_broken", "tab_more"]
    with pytest.raises(ValueError, match="'fig9'; there are fig1_good, fig2_bad, fig3_broken, tab_more, or all"):
        names("fig9")
    with pytest.raises(ValueError, match="holds no experiment"):
        find_experiments(["all"], folder.parent)
    with pytest.raises(ValueError, match="has no EXPERIMENT"):
        load_experiment(folder / "helper.py")


def test_one_that_fails_does_not_stop_the_others(folder: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    outcomes = reproduce(
        find_experiments(["all"], folder), Options(work=tmp_path / "work"), tmp_path / "figures", tell=lines.append
    )
    assert [outcome.error for outcome in outcomes] == [
        "",
        "RuntimeError: no [luck]",
        "ModuleNotFoundError: No module named 'a_module_that_is_not_there'",
        "",
    ]
    assert [len(outcome.claims) for outcome in outcomes] == [1, 0, 0, 1]
    assert lines[0] == "1 of 4  fig1_good"
    assert "failed after 0 s: RuntimeError: no [luck]" in "\n".join(lines)
    assert "at all" in (tmp_path / "work/fig2_bad.error.txt").read_text()
    kept = pd.read_csv(tmp_path / "figures/claims.csv")
    assert kept.columns.tolist() == ["id", "kind", "statement", "verdict", "evidence", "p", "p_holm", "figure"]
    assert kept[["id", "figure"]].values.tolist() == [["A0", "tab_more"], ["A1", "fig1_good"]]


def test_what_makes_no_sense_of_a_model_is_no_failure(run: Callable[..., tuple[int, str, str]], folder: Path) -> None:
    (folder / "fig2_bad.py").write_text(
        (folder / "fig1_good.py").read_text().replace('name="fig1_good"', 'name="fig2_bad"')
        + "\n\ndef refuse(options):\n    from diffprobe.sites import NotApplicableError\n"
        "    raise NotApplicableError('Site U is a place of a UNet; nearest: --sites T-B3-Out.')\n\n\n"
        "from dataclasses import replace\nEXPERIMENT = replace(EXPERIMENT, measure=refuse)\n"
    )
    code, output, errors = run("fig1", "fig2", "--model", "some/flux")
    assert (code, errors) == (0, "")
    assert "Not applicable: fig2_bad: Site U is a place of a UNet; nearest: --sites T-B3-Out." in output
    assert "diffprobe extract --model some/flux --data 'shapes:256?split=test&objects=1' --sites blocks" in output
    assert "diffprobe probe scan runs/reproduce/flux.zarr --label colour" in output and "Failed" not in output


@pytest.mark.slow
def test_what_makes_sense_of_a_family_runs(tmp_path: Path) -> None:
    """A tiny Stable Diffusion 3 of random weights: words' maps are judged, and features of a UNet's sites are not."""
    from tests.pipelines import family_pipeline

    family_pipeline("sd3").save_pretrained(tmp_path / "sd3")
    options = Options(model=str(tmp_path / "sd3"), smoke=True, work=tmp_path / "work")
    words, features = reproduce(
        find_experiments(["tab_localization", "fig2"]), options, tmp_path / "figures", tell=lambda line: None
    )
    assert words.error == "" and [claim.id for claim in words.claims] == ["A4", "A4"]
    assert features.error == "" and features.skipped.startswith("'paper' names places of a UNet")
    assert "--sites T-B" in features.skipped and not features.claims
    rows = pd.read_csv(tmp_path / "figures/tab_localization.csv")
    assert {"T-B0-Joint-Map", "all sites"} <= set(rows["site"])


def test_reproduce_on_the_command_line(
    run: Callable[..., tuple[int, str, str]], follow: Callable[[str], list[str]], folder: Path, tmp_path: Path
) -> None:
    code, output, errors = run("fig1", "tab", "--seed", "2")
    assert (code, errors) == (0, "")
    assert "2 of 2  tab_more" in output
    assert "Numbers that rise" in output
    assert "[2, 7], n = 6" in output
    assert "  figures/fig1_good_grid.png\n" in output
    assert "diffprobe report figures -o figures/report.html" in output
    assert "4 figures, 2 claims" in follow(output)[0]
    code, output, _ = run("all", "--smoke")
    assert code == 1
    assert "Failed: fig2_bad: RuntimeError: no [luck] (the traceback is in runs/reproduce/fig2_bad.error.txt)" in output
    assert f"diffprobe reproduce fig2_bad fig3_broken --smoke --experiments {folder}\n" in output
    assert json.loads(Path("runs/smoke/fig1_good.json").read_text())["config"]["count"] == 2
    assert json.loads(Path("figures/fig1_good.json").read_text())["config"]["count"] == 6


def test_mistakes_are_one_sentence(run: Callable[..., tuple[int, str, str]]) -> None:
    code, output, errors = run("fig9")
    assert (code, output) == (2, "")
    assert (
        errors == "diffprobe: No experiment begins with 'fig9'; there are fig1_good, fig2_bad, fig3_broken, tab_more, or all.\n"
    )
    code, _, errors = run("fig1", "--from-csv", "--seed", "1")
    assert code == 2
    assert "--from-csv draws what was measured" in errors


def test_without_a_checkout_one_sentence_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    (tmp_path / "site/experiments").mkdir(parents=True)  # somebody else's
    monkeypatch.setattr("diffprobe.__file__", str(tmp_path / "site/diffprobe/__init__.py"))
    code, output, errors = run("fig1")
    assert (code, output) == (2, "") and errors.count("\n") == 1
    assert errors.startswith("diffprobe: 'diffprobe reproduce' needs a checkout") and "clone it" in errors


@pytest.mark.slow
def test_the_package_of_experiments_is_the_same_command() -> None:
    done = [
        subprocess.run([sys.executable, "-m", *words, "--list"], cwd=FOLDER.parent, capture_output=True, text=True, check=True)
        for words in (["experiments", "fig", "tab_probes"], ["diffprobe", "reproduce", "fig", "tab_probes"])
    ]
    assert done[0].stdout == done[1].stdout and "tab_probes " in done[0].stdout and "fig2_features " in done[0].stdout


def test_the_list_names_even_what_does_not_load(run: Callable[..., tuple[int, str, str]]) -> None:
    code, output, _ = run("--list")
    assert code == 0
    assert [line.split()[0] for line in output.splitlines()] == ["fig1_good", "fig2_bad", "fig3_broken", "tab_more"]
    assert "fig1_good            Numbers that rise" in output
    assert "ModuleNotFoundError" in output


def test_from_csv_needs_no_torch(run: Callable[..., tuple[int, str, str]], folder: Path, tmp_path: Path) -> None:
    assert run("fig1")[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()}
    command = [
        sys.executable,
        "-c",
        f"{BLOCKED}from diffprobe.cli import main\nmain()",
        "reproduce",
        "fig1",
        "--from-csv",
        "--experiments",
        str(folder),
    ]
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout.startswith("torch is blocked")
    assert "[0, 5], n = 6" in again.stdout
    assert {path.name: path.read_bytes() for path in (tmp_path / "figures").iterdir()} == before


def test_the_committed_verdicts_follow_from_the_committed_rows() -> None:
    """Of this checkout's own experiments, all of which must load and judge without torch."""
    script = """
from dataclasses import asdict
from experiments.framework import FOLDER, find_experiments, gated, load_experiment, measured_gates
from diffprobe.plotting import read_rows, read_sidecars
figures = FOLDER.parent / "figures"
sidecars = read_sidecars(figures)
for path in find_experiments():
    experiment = load_experiment(path)
    assert experiment.name == path.stem, path
    if experiment.name in sidecars:
        config = sidecars[experiment.name]["config"]
        claims = gated(experiment.judge(read_rows(figures / f"{experiment.name}.csv")), experiment.needs, measured_gates(figures, config))
        assert [asdict(claim) for claim in claims] == config["claims"], path
    print(path.stem)
"""
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + script], cwd=FOLDER.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["torch is blocked", *(path.stem for path in find_experiments())]
