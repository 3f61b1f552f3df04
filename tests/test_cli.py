"""The command line as a person uses it: each command once, and mistakes as one sentence with exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
import pytest
import zarr
from PIL import Image

from diffprobe.cli.options import table_place
from diffprobe.conditioning import parse_conditionings
from diffprobe.plotting import read_rows

SITES = "U-L1-R1-B0-Cross-Q,U-L2-R2-Res-Out"


Run = Callable[..., tuple[int, str, str]]
Suggested = Callable[[str], list[list[str]]]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A store of forty scenes with features and maps."""
    out = tmp_path_factory.mktemp("cli") / "scenes.zarr"
    command = [
        sys.executable,
        "-m",
        "diffprobe",
        "extract",
        "--model",
        str(tiny_folder),
        "--data",
        "shapes:40?objects=1",
        "--sites",
        SITES,
    ]
    done = subprocess.run(
        [*command, "--maps", "U-L1-*-Cross-Map", "-t", "50,500", "-o", str(out)], capture_output=True, text=True, check=True
    )
    assert "40 of 40 samples are in" in done.stdout
    assert "diffprobe plot heatmaps" in done.stdout
    assert "forward passes in batches of" in done.stderr
    return out


def test_sites(run: Run, tiny_folder: Path) -> None:
    code, output, _ = run("sites", tiny_folder, "--pattern", "paper")
    assert code == 0
    rows = {line.split()[0]: line.split() for line in output.splitlines()[1:]}
    assert rows["U-L1-R1-B0-Cross-Q"][1] == "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q"
    assert rows["U-L2-R2-Res-Out"][2:] == ["resnet", "16", "8", "x", "8"]
    assert "16 x 16" in run("sites", tiny_folder, "--pattern", "U-L2-R2-Res-Out", "--resolution", "128")[1]


def test_info_and_verify(run: Run, recorded: Path) -> None:
    code, output, _ = run("info", recorded)
    assert code == 0
    assert "40 samples: 40 complete" in output
    assert "conditioning 2 x timestep 2 x channel 16" in output
    assert run("verify", recorded)[:2] == (0, "0 faults in 40 samples; 0 samples pending.\n")


def test_damage_is_found_and_repaired(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    arguments = ("--model", tiny_folder, "--data", "shapes:4", "--sites", SITES, "-t", "50", "-o", store)
    assert run("extract", *arguments)[0] == 0
    shard = next(p for p in (store / "U-L2-R2-Res-Out/features/c").rglob("*") if p.is_file())
    raw = bytearray(shard.read_bytes())
    raw[50] ^= 1
    shard.write_bytes(bytes(raw))
    code, output, _ = run("verify", store)
    assert code == 1
    assert "diffprobe repair" in output
    assert run("repair", store)[1] == "1 faulty units computed again; 4 of 4 samples are complete.\n"
    assert run("verify", store)[0] == 0
    assert run("repair", store)[1] == "Nothing to repair.\n"


@pytest.mark.parametrize(
    ("options", "following"),
    [
        (("--data", "shapes:12?objects=1"), ["info", "probe linear", "plot pca", "plot heatmaps"]),
        (("--data", "shapes:12?objects=1", "--reduce", "mean"), ["info", "probe linear", "plot heatmaps"]),
        (("--data", "shapes:2", "--reduce", "grid:2x2"), ["info", "plot pca", "plot heatmaps"]),
        (("--data", "shapes:2", "--reduce", "project:2"), ["info", "plot heatmaps"]),
        (("--data", "shapes:2", "-c", "fixed:a red star, or blue"), ["info", "plot pca", "plot heatmaps"]),
        (("--data", "shapes:2", "-c", "fixed:a"), ["info", "plot pca"]),
        (("--data", "shapes:2", "--sites", ""), ["info", "plot heatmaps"]),
        (("--data", "shapes:2", "--maps", "U-L1-R1-B0-Self-Map"), ["info", "plot pca"]),
        (("--data", "shapes-mmvp:1", "--maps", "", "-c", "caption"), ["info", "plot pca"]),
    ],
)
def test_what_extract_suggests_can_be_typed(
    run: Run, suggested: Suggested, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...],
    following: list[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffprobe.plotting.save_figure", lambda figure, out, name, *_: dict.fromkeys(["png"], out / name))
    usual = {"--sites": SITES, "--maps": "U-L1-R1-B0-Cross-Map", "-t": "50", "--batch-rows": "8", "--model": tiny_folder}
    given = [word for name, value in usual.items() if name not in options for word in (name, value)]
    code, output, _ = run("extract", *given, *options, "-o", "a b.zarr")
    assert code == 0 and "Next:" in output
    assert [" ".join(words[: 1 + (words[0] != "info")]) for words in suggested(output)] == following
    for command in suggested(output):
        code, _, errors = run(*command, *(("--jobs", "1") if command[0] == "probe" else ()))
        assert code == 0, (command, errors)


def test_conditionings_are_parted_by_commas_and_texts_are_not() -> None:
    assert parse_conditionings("fixed:a red star,null") == ["fixed:a red star", "null"]
    assert parse_conditionings("null, caption:1 ,fixed:a star, or two,fixed: b") == [
        "null",
        "caption:1",
        "fixed:a star, or two",
        "fixed: b",
    ]
    assert parse_conditionings("null,captoin") == ["null", "captoin"], "a slip is named, not taken for a text"
    assert parse_conditionings("fixed:null and void, nullify") == ["fixed:null and void, nullify"]


def test_unreadable_images_are_tried_again_by_the_command_that_info_names(
    run: Run, suggested: Suggested, tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    for name in "ab":
        Image.new("RGB", (70, 70), "red").save(tmp_path / f"photos/{name}.bmp")
    whole = (tmp_path / "photos/b.bmp").read_bytes()
    (tmp_path / "photos/b.bmp").write_bytes(b"?" * len(whole))
    arguments = ("--model", tiny_folder, "--data", tmp_path / "photos", "--sites", SITES, "-t", "50", "-c", "null")
    assert "left out b.bmp" in run("extract", *arguments, "-o", tmp_path / "s.zarr")[1]
    (command,) = suggested(run("info", tmp_path / "s.zarr")[1])
    code, output, _ = run(*command)
    assert code == 0 and "1 of 2 samples are complete.\n  left out b.bmp: " in output, "still broken"


def test_progress_is_plain_lines_in_a_log(run: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffprobe.console.LINE_SECONDS", 0.0)
    arguments = ("--model", tiny_folder, "--data", "shapes:70", "--sites", "Noised-Latent", "-t", "50", "-c", "null")
    _, _, errors = run("extract", *arguments, "-o", tmp_path / "s.zarr")
    lines = [line for line in errors.splitlines() if line.startswith("extract: ")]
    assert len(lines) > 1 and lines[-1].startswith("extract: 70 of 70 samples, ")
    assert "\x1b" not in errors and "\u2501" not in errors


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        (("extract", "--data", "shapes:2", "--dry-run"), False),
        (("extract", "--data", "shapes:2"), True),
        (("info",), False),
    ],
)
def test_what_is_said_of_a_stopped_command_is_true(
    run: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], kept: bool
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("diffprobe.extraction.extract", stopped)
    monkeypatch.setattr("diffprobe.store.store_info", stopped)
    place = (tmp_path / "s.zarr",) if arguments[0] == "info" else ("--model", tiny_folder, "-o", tmp_path / "s.zarr")
    code, _, errors = run(*arguments, *place)
    assert (code, "is kept" in errors) == (130, kept) and errors.startswith("diffprobe: Stopped.")


@pytest.fixture(scope="module")
def unusual(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A store without places, null or caption, with guided features, and one word that no file name should have."""
    from diffprobe.extraction import extract
    from diffprobe.models import load_model

    out = tmp_path_factory.mktemp("un usual") / "[red] $x$ it's.zarr"
    extract(
        load_model(str(tiny_folder)), "shapes:40?objects=1", out, sites=SITES.split(","), timesteps=[50], reduce="mean",
        conditionings=["null", "caption", "fixed:a red star"], guidance=[1.5, 4.0], progress=False,
    )  # fmt: skip
    return out


@pytest.mark.parametrize(
    "command",
    [
        "linear --label size --jobs 1",
        "knn --label size --jobs 1 --k 3 --sites U-L1-R1-B0-Cross-Q",
        "similarity --between conditioning --sites U-L1-R1-B0-Cross-Q",
        "similarity --between guidance --sites U-L1-R1-B0-Cross-Q",
        "similarity --between site",
    ],
)
def test_what_a_probe_suggests_runs(run: Run, follow: Callable[[str], list[str]], unusual: Path, command: str) -> None:
    name, *options = command.split()
    code, output, errors = run("probe", name, unusual, *options)
    assert (code, errors) == (0, "")
    assert "Drew figures/[red] $x$ it's.zarr." in follow(output)[0]


def test_what_else_is_suggested_runs(
    run: Run, follow: Callable[[str], list[str]], recorded: Path, unusual: Path, tmp_path: Path
) -> None:
    _, output, _ = run("probe", "similarity", recorded, "--between", "store", "--other", unusual, "-o", tmp_path / "two.csv")
    follow(output)
    for of in ("attention", "difference"):
        code, output, errors = run("probe", "localization", recorded, "--of", of, "-o", tmp_path / f"{of}.csv")
        assert (code, errors) == (0, ""), of
        assert "Drew figures/" in follow(output)[0]
    shard = next(p for p in (unusual / SITES.split(",")[0]).rglob("c/*") if p.is_dir())
    kept = {path: path.read_bytes() for path in shard.rglob("*") if path.is_file()}
    for path in kept:
        path.unlink()
    assert "faulty units computed again" in follow(run("verify", unusual)[1])[0]
    code, output, errors = run("leakage", "report", unusual)
    assert code == 2 and "is no folder that 'diffprobe leakage run' filled" in errors and str(unusual) + "'" not in errors


def test_a_picture_of_something_else_is_not_overwritten(run: Run, recorded: Path, tmp_path: Path) -> None:
    tables = [tmp_path / name for name in ("one.csv", "two.csv")]
    for table in tables:
        assert run("probe", "linear", recorded, "--label", "size", "--out", table, "--jobs", "1")[0] == 0
        assert run("plot", "probe", table, "--out", tmp_path / "figures")[0] == 0
    names = {path.name for path in (tmp_path / "figures").glob("*.png")}
    assert names == {"one.png", "one_curves.png", "two.png", "two_curves.png"}
    before = (tmp_path / "figures" / "one.json").read_bytes()
    for command in (("probe", tables[1]), ("pca", recorded, "--count", "1")):
        code, _, errors = run("plot", *command, "--out", tmp_path / "figures", "--name", "one")
        assert code == 2 and f"one.png shows {tables[0]}; choose another --name or --out" in errors
    assert (tmp_path / "figures" / "one.json").read_bytes() == before
    assert run("plot", "probe", tables[0], "--out", tmp_path / "figures", "--name", "one")[0] == 0, "the same anew"
    (tmp_path / "figures" / "one.json").write_text('{"config": {"seed": 0}}')
    code, _, errors = run("plot", "probe", tables[0], "--out", tmp_path / "figures")
    assert code == 2 and "one.png shows something else" in errors


def test_a_table_can_lie_at_a_url(
    run: Run, follow: Callable[[str], list[str]], recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = "memory://tables/t.csv"
    code, output, errors = run(
        "probe", "linear", recorded, "--label", "size", "--jobs", "1", "--sites", SITES.split(",")[0], "--out", place
    )
    assert (code, errors) == (0, "") and place in output
    assert "Drew figures/t.png" in follow(output)[0]
    with fsspec.open("memory://tables/t.json") as origin:
        assert json.load(origin)["store"] == recorded.name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures"], "no folder memory:"
    assert table_place("", "s3://bucket/a.zarr/", "linear") == "s3://bucket/a.zarr.linear.csv"


def test_places_are_checked_before_the_work(run: Run, recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffprobe.store.features", lambda *_, **__: pytest.fail("too late"))
    Path("file").touch()
    for out, words in ((tmp_path, "cannot be a table"), ("t.json", "cannot be a table"), ("file/t.csv", "file: File exists")):
        for probe in ("linear", "similarity", "localization", "correspondence"):
            code, _, errors = run("probe", probe, recorded, "--out", out)
            assert code == 2 and words in errors, (probe, out, errors)
    for command in (
        ("plot", "pca", recorded, "--out", "s3://bucket/figures"),
        ("mllm", "train", "--out", "s3://bucket/figures"),
        ("probe", "alignment", "-o", "file:///tmp/x.nc"),
        ("leakage", "report", "s3://bucket/figures"),
    ):
        code, _, errors = run(*command)
        assert code == 2 and " is a URL; stores" in errors and errors.count("\n") == 1, errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_probe_and_plots(run: Run, recorded: Path, tmp_path: Path) -> None:
    table = tmp_path / "probe.csv"
    code, output, _ = run("probe", "linear", recorded, "--label", "size,n_objects", "--out", table, "--jobs", "1")
    assert (code, output) == (2, ""), "every scene has one object"
    code, output, _ = run("probe", "linear", recorded, "--label", "size", "--out", table, "--jobs", "1")
    assert code == 0
    assert "diffprobe plot probe" in output
    frame = pd.read_csv(table, keep_default_na=False)
    assert len(frame) == 2 * 2 * 2
    assert set(frame["conditioning"]) == {"null", "caption"}
    for command in (
        ("plot", "probe", table),
        ("plot", "pca", recorded, "--count", "2", "--timestep", "500"),
        ("plot", "heatmaps", recorded, "--count", "1", "--timestep", "50"),
    ):
        code, output, errors = run(*command, "--out", tmp_path / "figures")
        assert (code, errors) == (0, "")
        assert "Drew" in output
    for name in ("probe", "probe_curves", "scenes.zarr.pca", "scenes.zarr.heatmaps"):
        with Image.open(tmp_path / f"figures/{name}.png") as image:
            assert len(image.convert("RGB").getcolors(2**24) or ()) > 50, "an empty picture"
        assert json.loads((tmp_path / f"figures/{name}.json").read_text())["alt"]
        assert len(pd.read_csv(tmp_path / f"figures/{name}.csv")) > 0


def test_other_probes(run: Run, recorded: Path, tmp_path: Path) -> None:
    one = ("--sites", SITES.split(",")[1], "--conditioning", "null")
    for name, options in (
        ("knn", ("--k", "3,7", "--metric", "euclidean", "--jobs", "1")),
        ("linear", ("--streaming", "--penalties", "10,100")),
        ("linear", ("--cross-fit", "--pool", "flatten", "--jobs", "1")),
    ):
        table = tmp_path / f"{name}-{options[0].strip('-')}.csv"
        assert run("probe", name, recorded, "--label", "size,mask:fill", *one, *options, "--out", table)[0] == 0
        frame = read_rows(table).set_index(["label", "timestep"])
        assert list(frame.index) == [(label, step) for label in ("size", "mask:fill") for step in (50, 500)]
        assert frame.loc["mask:fill", "miou"].between(0, 1).all() and frame.loc["size", "miou"].isna().all()
        assert (frame.loc["mask:fill", "n_test"] == 64 * (40 if options[0] == "--cross-fit" else 8)).all()
        origin = json.loads(table.with_suffix(".json").read_text())
        assert origin["store"] == recorded.name and origin["options"]["label"] == "size,mask:fill"
    for options, message in (
        (("linear", "--streaming", "--cross-fit"), "--streaming goes with neither"),
        (("knn", "--k", "900"), "from 1 to the 24 training rows"),
        (("linear", "--label", "mask:hue"), "Objects have no 'hue'"),
    ):
        code, _, errors = run("probe", options[0], recorded, "--label", "size", *one, *options[1:])
        assert code == 2 and message in errors, errors


def test_random_weights(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    arguments = ("--model", tiny_folder, "--data", "shapes:2", "--sites", "Noised-Latent", "-t", "50", "-o", store)
    assert run("extract", *arguments, "--random-weights", "5")[0] == 0
    assert "drawn at random from seed 5" in " ".join(run("info", store)[1].split())
    assert run("extract", *arguments)[0] == 2


def test_dry_run_writes_nothing(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    code, output, _ = run("extract", "--model", tiny_folder, "--data", "shapes:9", "--out", tmp_path / "s.zarr", "--dry-run")
    assert code == 0
    assert "9 samples, 90 forward passes" in output
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_one_sentence(run: Run, recorded: Path, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other.zarr"
    zarr.open_group(other, mode="w")
    extract = ("extract", "--model", tiny_folder, "--out", tmp_path / "x.zarr", "--data", "shapes:2")
    mistakes: list[tuple[tuple[str | Path, ...], str]] = [
        ((*extract, "--sites", "U-L9-Out"), "Site 'U-L9-Out' matches none"),
        ((*extract, "--timesteps", "ten"), "--timesteps takes numbers"),
        ((*extract, "--timesteps", "2000"), "outside 0..999"),
        ((*extract, "--conditioning", "captoin"), "'captoin' is not one of"),
        ((*extract, "--reduce", "grid:0x2"), "not one of none, mean, grid:HxW"),
        ((*extract, "--resolution", "33"), "multiples of"),
        ((*extract, "--dtype", "int3"), "dtype 'int3' is not one of"),
        (("extract", "--model", tiny_folder, "--out", tmp_path / "x.zarr", "--data", tmp_path / "empty"), "hold no images"),
        (
            ("extract", "--model", tiny_folder, "--out", tmp_path / "x.zarr", "--data", tmp_path / "absent"),
            "names no dataset and no folder",
        ),
        (("extract", "--model", "nobody/nothing", "--out", tmp_path / "x.zarr"), "No model at 'nobody/nothing'"),
        (("extract", "--model", tiny_folder, "--out", recorded, "--data", "shapes:40?objects=1"), "holds another request"),
        (("extract", "--model", tiny_folder, "--out", tmp_path / "empty", "--data", "shapes:2"), "exists and is not a store"),
        (("info", tmp_path / "absent.zarr"), "is not a diffprobe store"),
        (("info", other), "is not a diffprobe store"),
        (("info", Path(__file__)), "is a file, and a store is a folder"),
        (("verify", tmp_path / "empty"), "is not a diffprobe store"),
        (("probe", "linear", recorded, "--label", "color"), "'colour'"),
        (("plot", "heatmaps", recorded, "--words", "zebra", "--count", "1"), "zebra"),
        (("plot", "pca", recorded, "--timestep", "7"), "timestep 7 is not in this store"),
        (("plot", "pca", recorded, "--samples", "me"), "Sample 'me' is not in this store"),
        (("plot", "probe", tmp_path / "none.csv"), "No table at"),
        (("zoo", "fetch", "moon"), "'moon' cannot be fetched"),
    ]
    for arguments, message in mistakes:
        code, _, errors = run(*arguments)
        said = [line for line in errors.splitlines() if line.startswith("diffprobe: ")]
        assert code == 2, arguments
        assert len(said) == 1, (arguments, errors)
        assert message in said[0], arguments
        assert "Traceback" not in errors
    assert not (tmp_path / "x.zarr").exists()


@pytest.mark.parametrize("words", [("info", "x\x1b[31m.zarr"), ("info", "x", "--\x1b]0;mine\x07"), ("\x1b[31minfo",)])
def test_what_was_typed_is_shown_without_its_escapes(run: Run, words: tuple[str, ...]) -> None:
    code, output, errors = run(*words)
    assert code == 2 and not {"\x1b", "\x07"} & {*output, *errors} and r"\x1b" in errors


def test_a_list_is_repeated_or_parted_by_commas(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def extract(*_: Any, **options: Any) -> None:
        asked.append({name: options[name] for name in ("timesteps", "sites", "guidance", "reduce", "conditionings")})
        raise ValueError("enough")

    monkeypatch.setattr("diffprobe.extraction.extract", extract)
    monkeypatch.setattr("diffprobe.encoders.load_extractor", lambda *_, **__: None)
    for words in (
        "-t 50 -t 500,10 --sites A --sites B,C --guidance 1.5,4 --reduce mean --reduce A=none -c null -c caption,words",
        "--timesteps 50,500,10 --sites A,B,C --guidance 1.5 --guidance 4 --reduce mean --reduce A=none -c null,caption,words",
        "",
        "--sites= -c",
    ):
        more = ["fixed:a star, or two"] if words.endswith("-c") else []
        assert run("extract", "-o", tmp_path / "a", "--data", "shapes:2", *words.split(), *more)[0] == 2
    first, second, usual, unusual = asked
    assert first == second == {
        "timesteps": [50, 500, 10], "sites": ["A", "B", "C"], "guidance": [1.5, 4.0], "reduce": ["mean", "A=none"],
        "conditionings": ["null", "caption", "words"],
    }  # fmt: skip
    assert usual == {
        "timesteps": [10, 50, 100, 250, 500], "sites": ["paper"], "guidance": [], "reduce": ["none"],
        "conditionings": None,  # null and, where the data has captions, caption
    }  # fmt: skip
    assert unusual["sites"] == [] and unusual["conditionings"] == ["fixed:a star, or two"]


def test_old_spellings_work_with_a_warning(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def extract(*_: Any, **options: Any) -> None:
        asked.append(options)
        raise ValueError("enough")

    monkeypatch.setattr("diffprobe.extraction.extract", extract)
    monkeypatch.setattr("diffprobe.encoders.load_extractor", lambda *_, **__: None)
    given = ("extract", "-o", tmp_path / "a", "--data", "shapes:2", "--dry-run", "--compress", "--no-dry-run", "--no-force")
    code, _, errors = run(*given)
    assert (code, asked[0]["dry_run"], asked[0]["compress"], asked[0]["force"]) == (2, False, True, False)
    for word in ("--no-dry-run", "--no-force"):
        assert f"diffprobe: warning: {word} is an old spelling that the next release drops; leave it out" in errors
    assert errors.count("\n") == 3


def test_a_word_that_no_command_knows_is_one_sentence(run: Run) -> None:
    for words, message in (
        (("extract", "--bogus"), "No such option: --bogus"),
        (("bogus",), "No such command 'bogus'. '"),
        (("extract",), "Missing option '--out'"),
        (("info",), "Missing argument 'STORE'"),
        (("extract", "-o", "x", "--heads", "some"), "'some' is not one of 'mean', 'all'"),
        (("extract", "-o", "x", "--seed", "two"), "Invalid value for '--seed'"),
        (("info", "a", "\x1b[31mb"), r"\x1b[31mb"),
    ):
        code, output, errors = run(*words)
        assert (code, output) == (2, "") and errors.startswith("diffprobe: ") and errors.count("\n") == 1, errors
        assert message in errors and "--help' shows what there is." in errors, errors
    code, output, errors = run("probe")
    assert code == 2 and "similarity" in output + errors


def test_debug_shows_the_traceback(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a diffprobe store"):
        run("--debug", "info", tmp_path / "absent.zarr")
    assert run("info", tmp_path / "absent.zarr")[0] == 2


def test_help_needs_no_torch() -> None:
    code = "import sys; sys.argv = ['diffprobe', '--help']\nfrom diffprobe.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "extract" in done.stdout


def test_probes_and_store_need_no_torch(recorded: Path) -> None:
    code = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "diffusers", "transformers"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from diffprobe import attention_maps, features, fit_probe, open_store
tree = open_store({str(recorded)!r})
fit_probe(features(tree, "U-L2-R2-Res-Out", timestep=50, conditioning="null", pool="mean"), "size", n_jobs=1)
attention_maps(tree, token=0)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True)
