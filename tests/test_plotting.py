"""Figures: the files beside them, the same bytes for the same rows, and text that can be read."""

import itertools
import json
import re
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from PIL import Image

from diffprobe import plotting
from diffprobe.data import load_dataset
from diffprobe.figures import plot_heatmaps, plot_pca_grid, plot_probe_curves, plot_probe_grid, words_of
from diffprobe.plotting import read_rows, save_figure
from experiments import fig6_leakage, figures
from experiments.framework import reference
from experiments.photographs import CAPTIONS

SITES = ["D-L2-R1-B0-Cross-Q", "M", "U-L1-R1-B0-Cross-Q", "U-L1-R1-B0-Self-K"]
STEPS = [1, 150, 500, 900]


def probes(conditionings=("null", "caption"), labels=("colour",)):
    rng = np.random.default_rng(0)
    rows = []
    for site, step, conditioning, label in itertools.product(SITES, STEPS, conditionings, labels):
        value = rng.uniform(0.3, 0.9)
        rows.append({
            "site": site, "timestep": step, "conditioning": conditioning, "label": label, "score": "accuracy", "value": value,
            "low": value - 0.05, "high": value + 0.05, "chance": 0.125, "control_value": rng.uniform(0.1, 0.15),
        })  # fmt: skip
    return pd.DataFrame(rows)


def pictures(n=2):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, size=(n, 32, 48, 3)).astype(np.uint8)
    colours = xr.DataArray(rng.random((n, 8, 12, 3), dtype=np.float32), dims=("sample", "y", "x", "rgb"))
    return images, dict.fromkeys(SITES, colours)


def heat(words=("a", "red", "semi-transparent")):
    values = np.random.default_rng(0).random((len(words), 6, 8))
    return xr.DataArray(values, dims=("word", "y", "x"), coords={"word": list(words)})


def statements():
    rows = [("F2: it beats CLIP alone on pairs of patterns that CLIP is blind to", 0.1, False), ("F3: it pays", -0.2, True)]
    return pd.DataFrame([{"what": w, "value": v, "low": v - 0.05, "high": v + 0.1, "primary": p} for w, v, p in rows])


FIGURES = {
    "grid": lambda: plot_probe_grid(probes(["null"], ["colour", "shape"]), title="probes"),
    "curves": lambda: plot_probe_curves(probes(), title="probes"),
    "pca": lambda: plot_pca_grid(*pictures(), title="pca"),
    "heatmaps": lambda: plot_heatmaps(pictures()[0][0], heat(), title="a red"),
    "statements": lambda: figures.plot_statements(statements()),
    "heatmaps_shared": lambda: plot_heatmaps(pictures()[0][0], heat(), shared_scale=True, width=plotting.COLUMN),
}


def test_captions_of_every_kind_are_drawn_as_they_are(tmp_path):
    texts = ["costs $5 or $6", r"$\frac{a$", "a\x00red\x07 \x1b[31m star", "نجمة 🌟 星", "a\u2028b\udcff", "[/red] {} %s \\"]
    figure = plot_heatmaps(pictures()[0][0], heat(texts[:3]), title="\n".join(texts))
    paths = save_figure(figure, tmp_path, "all", probes(), {"captions": texts}, " ".join(texts))
    assert json.loads(paths["json"].read_text(encoding="utf-8"))["config"]["captions"] == texts
    drawn = {text.get_text() for text in figure.findobj(matplotlib.text.Text)}
    assert not any("\x1b" in text or "\x07" in text for text in drawn)
    assert r"$\frac{a$" in drawn and not any(
        text.get_parse_math() for text in figure.findobj(matplotlib.text.Text) if "$" in text.get_text()
    )


@pytest.mark.parametrize("name", FIGURES)
def test_saved_twice_the_bytes_are_equal_and_something_is_drawn(name, tmp_path):
    frame = probes()
    first = save_figure(FIGURES[name](), tmp_path / "a", name, frame, {"seed": 0}, "A figure.")
    second = save_figure(FIGURES[name](), tmp_path / "b", name, frame, {"seed": 0}, "A figure.")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(f"{name}.{s}" for s in ("png", "pdf", "csv", "json"))
    for suffix in first:
        assert first[suffix].read_bytes() == second[suffix].read_bytes(), suffix
    assert b"CreationDate" not in first["pdf"].read_bytes() and first["pdf"].read_bytes()[:4] == b"%PDF"
    picture = Image.open(first["png"])
    width = plotting.COLUMN if name == "heatmaps_shared" else plotting.PAGE
    assert picture.width == pytest.approx(width * 200, abs=1)
    pixels = np.asarray(picture.convert("L"))
    assert 0.02 < (pixels < 250).mean() < 0.99


@pytest.mark.parametrize("plot", [plot_probe_grid, plot_probe_curves])
def test_redrawn_from_the_csv_the_figure_is_the_same(plot, tmp_path):
    frame = probes().assign(converged=True, id="007")
    frame.loc[3, "control_value"] = np.nan
    paths = save_figure(plot(frame), tmp_path, "first", frame, {}, "Scores.")
    rows = read_rows(paths["csv"])
    pd.testing.assert_frame_equal(rows, frame, check_dtype=False, rtol=0, atol=0)
    assert set(rows.conditioning) == {"null", "caption"}  # pandas alone would read "null" as missing
    again = save_figure(plot(rows), tmp_path, "again", rows, {}, "Scores.")
    assert again["png"].read_bytes() == paths["png"].read_bytes()
    moved = frame.assign(value=frame.value + 0.03)
    other = save_figure(plot(moved), tmp_path, "other", moved, {}, "Scores.")
    assert other["png"].read_bytes() != paths["png"].read_bytes()


def test_sidecar_holds_config_versions_and_alt(tmp_path):
    config = {"seed": np.int64(3), "steps": np.array([1, 2]), "folder": tmp_path / "x", "sites": ("M",)}
    paths = save_figure(plot_probe_curves(probes()), tmp_path, "f", probes(), config, "Accuracy falls with noise; größer.")
    sidecar = json.loads(paths["json"].read_text(encoding="utf-8"))
    assert sidecar["alt"] == "Accuracy falls with noise; größer."
    assert sidecar["config"] == {"seed": 3, "steps": [1, 2], "folder": str(tmp_path / "x"), "sites": ["M"]}
    assert sidecar["rows"] == len(probes())
    assert sidecar["versions"]["matplotlib"] == matplotlib.__version__


def test_save_refuses_no_alt_and_paths_for_names(tmp_path):
    with pytest.raises(ValueError, match="needs an alt text"):
        save_figure(plot_probe_curves(probes()), tmp_path, "f", probes(), {}, "  ")
    with pytest.raises(ValueError, match="plain file stem"):
        save_figure(plot_probe_curves(probes()), tmp_path, "../f", probes(), {}, "x")
    assert not list(tmp_path.iterdir())


def test_style_is_left_as_it_was_found():
    before = dict(matplotlib.rcParams)
    plot_probe_grid(probes())
    with plotting.style():
        assert matplotlib.rcParams["font.size"] != before["font.size"]
    assert dict(matplotlib.rcParams) == before


def boxes(figure, texts):
    renderer = figure.canvas.get_renderer()
    return [t.get_window_extent(renderer) for t in texts if t.get_text()]


def inside(position, limits):
    return min(limits) <= position <= max(limits)


@pytest.mark.parametrize("name", FIGURES)
def test_texts_do_not_overlap_and_stay_inside(name):
    figure = FIGURES[name]()
    figure.canvas.draw()
    texts = [axis.title for axis in figure.axes]
    for axis in figure.axes:  # ticks beyond the limits exist but are not drawn
        texts += [
            label for x, label in zip(axis.get_xticks(), axis.get_xticklabels(), strict=True) if inside(x, axis.get_xlim())
        ]
        texts += [
            label for y, label in zip(axis.get_yticks(), axis.get_yticklabels(), strict=True) if inside(y, axis.get_ylim())
        ]
    found = boxes(figure, texts)
    assert len(found) >= 4
    for a, b in itertools.combinations(found, 2):
        shared = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(shared) < 1.5, (a, b)
    for box in found:
        assert box.x0 > -1 and box.y0 > -1 and box.x1 < figure.bbox.x1 + 1 and box.y1 < figure.bbox.y1 + 1


def test_titles_stand_clear_of_the_headings_below():
    figure = plot_pca_grid(*pictures(), title="pca")
    figure.canvas.draw()
    title, *headings = boxes(figure, [figure.texts[0], *(axis.title for axis in figure.axes)])
    assert title.y0 - max(box.y1 for box in headings) > 0.04 * figure.dpi


def test_a_comparison_alone_on_its_line_stands_on_it():
    rows = [("a", "x", 1.0), ("a", "y", 2.0), ("b", "y", 3.0)]
    frame = pd.DataFrame([{"label": "l", "site": s, "what": w, "value": v, "low": v, "high": v} for s, w, v in rows])
    axis = figures.plot_probe_differences(frame).axes[0]
    places = {line.get_xdata()[0]: line.get_ydata()[0] for line in axis.lines if line.get_linestyle() == "None"}
    assert places == pytest.approx({1.0: -0.12, 2.0: 0.12, 3.0: 1.0})


def test_grid_writes_each_number_where_it_belongs():
    frame = probes(conditionings=("null",))
    figure = plot_probe_grid(frame)
    score, control = figure.axes[:2]
    written = {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in score.texts}
    for _, row in frame.iterrows():
        assert written[SITES.index(row.site), STEPS.index(row.timestep)] == f"{row.value:.2f}".removeprefix("0")
    assert [t.get_text() for t in score.get_yticklabels()] == SITES
    assert [t.get_text() for t in score.get_xticklabels()] == [str(s) for s in STEPS]
    assert len(control.texts) == len(frame)
    assert control.images[0].get_clim() == score.images[0].get_clim()  # one scale for both
    bar = figure.axes[2]
    assert "chance .12" in [t.get_text() for t in bar.get_yticklabels()]
    assert any(np.allclose(line.get_ydata(), 0.125) for line in bar.lines)
    assert len(plot_probe_grid(frame.drop(columns="control_value")).axes) == 2
    assert len(plot_probe_grid(frame.rename(columns={"control_value": "control_accuracy"})).axes) == 3  # an older table


def test_primary_statements_stand_on_top_in_their_own_colour():
    axis = figures.plot_statements(statements()).axes[0]
    dots = {line.get_xdata()[0]: (line.get_ydata()[0], line.get_color()) for line in axis.lines if line.get_marker() in "so"}
    assert dots == {-0.2: (0, figures.COLOURS[1]), 0.1: (1, "0.45")}
    assert axis.get_yticklabels()[0].get_text() == "F3: it pays"


def test_what_rounds_to_zero_is_a_dash_and_never_bold():
    _, axes = plotting.grid(1, 1, 3, 2)
    plotting.cells(axes[0, 0], np.array([[0.004, -0.004, 0.0, 0.006, 1.0]]), list("abcde"), ["x"], bold=np.ones((1, 5), bool))
    texts = [(text.get_text(), text.get_fontweight()) for text in axes[0, 0].texts]
    assert texts == [("-", "normal")] * 3 + [(".01", "bold"), ("1.00", "bold")]


def test_every_published_arm_of_the_leakage_figure_is_drawn_on_our_scale():
    rows = read_rows(Path(figures.__file__).parents[1] / "figures" / "fig6_leakage.csv")
    paper = fig6_leakage.curves(rows)
    paper = paper[paper["panel"].str.startswith("paper")]
    published = reference("fig6_leakage")
    published = published[published["metric"] == "cider"][["s0", "s1", "s1.5", "s4"]]
    assert len(paper) == published.count().sum()
    clip = paper[paper["site"].str.contains("CLIP")]
    assert (
        set(clip["panel"]) == {"paper: nothing"}
        and clip["guidance"].tolist() == [0, 1, 1.5, 4]
        and set(clip["value"]) == {40.6}
    )


def test_heat_maps_of_photographs_are_of_words_that_the_drawn_world_has():
    script = (Path(figures.__file__).parent / "demo.sh").read_text(encoding="utf-8")
    asked = set(re.search(r"photographs.zarr --words (\S+)", script)[1].split(","))
    scenes, spoken = load_dataset("shapes:400?split=train&objects=2"), set()
    for number in range(400):
        spoken |= {word for caption in scenes[number].captions for word in words_of(caption.text)}
    told = {word for caption in CAPTIONS.values() for word in words_of(caption)}
    assert asked == told & spoken


def test_grid_leaves_missing_cells_empty():
    figure = plot_probe_grid(probes(conditionings=("null",)).iloc[1:].drop(columns="control_value"))
    assert len(figure.axes[0].texts) == len(SITES) * len(STEPS) - 1


def test_curves_carry_values_bands_and_chance():
    frame = probes()
    figure = plot_probe_curves(frame)
    panel = figure.axes[0]
    assert panel.get_title() == "colour (null)"
    lines = {line.get_label(): line for line in panel.lines}
    part = frame[(frame.conditioning == "null") & (frame.site == "M")]
    np.testing.assert_array_equal(lines["M"].get_ydata(), part.value)
    np.testing.assert_array_equal(lines["M"].get_xdata(), STEPS)
    np.testing.assert_array_equal(lines["chance"].get_ydata(), 0.125)
    band = panel.collections[SITES.index("M")].get_paths()[0].vertices[:, 1]
    assert band.min() == part.low.min() and band.max() == part.high.max()
    assert [t.get_text() for t in figure.legends[0].get_texts()] == [*SITES, "chance"]
    assert len({(line.get_color(), line.get_linestyle()) for line in panel.lines}) == len(SITES) + 1


def test_panels_know_their_place_and_the_rest_is_empty():
    with plotting.style():
        figure, shown = plotting.panels(5, 3, plotting.PAGE, 2.0, 0.5, title="five")
    assert figure.get_size_inches() == pytest.approx([plotting.PAGE, 2 * 2.0 + 0.5 + 0.2])
    assert [panel.leftmost for panel in shown] == [True, False, False, True, False]
    assert [panel.lowest for panel in shown] == [False, False, True, True, True]  # nothing stands below the third
    assert [axis.axison for axis in figure.axes] == [True] * 5 + [False]
    _, shown = plotting.panels(2, 3, plotting.PAGE, 2.0)
    assert len(shown) == 2 and all(panel.lowest for panel in shown)


def test_a_legend_has_as_many_columns_as_fit():
    assert plotting.legend_size(["a", "b"], plotting.PAGE) == (2, pytest.approx(0.25))
    assert plotting.legend_size(["a long name of a site"] * 7, plotting.PAGE) == (4, pytest.approx(0.4))


def test_several_rows_in_a_cell_are_refused():
    frame = pd.concat([probes().assign(seed=0), probes().assign(seed=1)])
    with pytest.raises(ValueError, match=r"colour, null: some cells of site x timestep have several rows; seed differ"):
        plot_probe_grid(frame)
    with pytest.raises(ValueError, match="no column site, chance"):
        plot_probe_curves(probes().drop(columns=["site", "chance"]))
    with pytest.raises(ValueError, match="no rows"):
        plot_probe_curves(probes().iloc[:0])


def test_pca_grid_shows_image_then_columns():
    images, pca = pictures()
    pca["M"] = pca["M"].transpose("rgb", "x", "sample", "y")  # the axes are read by name
    figure = plot_pca_grid(images, pca)
    axes = np.array(figure.axes).reshape(2, 5)
    np.testing.assert_array_equal(axes[1, 0].images[0].get_array(), images[1])
    np.testing.assert_array_equal(axes[1, 2].images[0].get_array(), pca[SITES[0]][1])
    assert [a.get_title().replace("\n", "") for a in axes[0]] == ["image", *SITES]
    with pytest.raises(ValueError, match=r"Column 'M' has 1 samples; there are 2 images\."):
        plot_pca_grid(images, {"M": pca["M"].isel(sample=[0])})


def test_heatmaps_are_enlarged_bilinearly_with_their_own_scales():
    images, _ = pictures()
    ramp = xr.DataArray(np.linspace(0, 1, 4)[None, None].repeat(4, 1), dims=("token", "y", "x"))
    maps = xr.concat([ramp, 0.01 * ramp], "token").assign_coords(token=["red", "star"]).transpose("x", "token", "y")
    figure = plot_heatmaps(images[0], maps)
    image, red, star = figure.axes[:3]
    assert [a.get_title() for a in (image, red, star)] == ["image", "red", "star"]
    large = red.images[1].get_array()
    assert large.shape == (32, 48)
    step = 1 / 3 / 12  # one input cell is 12 pixels wide; between centres the enlarged ramp is linear
    np.testing.assert_allclose(np.diff(large[0])[7:40], step, atol=1e-3)
    assert star.images[1].get_clim() == pytest.approx((0, 0.01)) and red.images[1].get_clim() == (0, 1)
    shared = plot_heatmaps(images[0], maps, shared_scale=True)
    assert {a.images[1].get_clim() for a in shared.axes[1:3]} == {(0, 1)}
    assert len(shared.axes) == 4 and len(figure.axes) == 5


def test_heatmaps_take_constant_maps_and_refuse_wrong_ones(tmp_path):
    images, _ = pictures()
    flat = xr.zeros_like(heat())
    save_figure(plot_heatmaps(images[0], flat), tmp_path, "flat", probes(), {}, "Nothing.")
    with pytest.raises(ValueError, match="one dimension beside y and x"):
        plot_heatmaps(images[0], heat().isel(word=0))


def test_scores_show_every_row_and_their_chance() -> None:
    rows = [("pairs", 0.7, 0.6, 0.8, 0.5, np.nan), ("pointing", 0.4, 0.3, 0.5, 0.1, 50), ("pointing", 0.2, 0.1, 0.3, 0.1, 500)]
    frame = pd.DataFrame(rows, columns=["what", "value", "low", "high", "chance", "timestep"])
    figure = figures.plot_scores(frame)
    axis = figure.axes[0]
    assert [t.get_text() for t in axis.get_yticklabels()] == ["pairs", "pointing"]
    drawn = [line.get_xdata()[0] for line in axis.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert drawn == [0.7, 0.4, 0.2]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["timestep 50", "timestep 500", "chance"]


def test_score_tables_hold_every_score_and_fit(tmp_path):
    rows = [
        {
            "label": label,
            "score": f"score {k}",
            "value": 0.1 * k,
            "low": 0.0,
            "high": 0.5,
            "chance": 0.25,
            "published": published,
        }
        for label, published in (("CLIP", 24.7), ("a long name of a fusion s=4", np.nan))
        for k in range(11)
    ]
    figure = figures.plot_score_table(pd.DataFrame(rows), title="a table")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts.count("24.7") == 11 and texts.count("[0.0, 50.0]") == 22 and texts.count("25.0") == 11 and "100.0" in texts
    cells = figures.score_cells(pd.DataFrame(rows))
    assert cells["columns"] == ["", *(f"score {k}" for k in range(11))] and cells["best"] == []
    assert cells["rows"][0][:3] == ["CLIP", ["-", "[0.0, 50.0]", "24.7"], ["10.0", "[0.0, 50.0]", "24.7"]]
    assert cells["rows"][1][2] == ["10.0", "[0.0, 50.0]"] and cells["rows"][2] == ["chance", *[["25.0"]] * 11]
    figure.canvas.draw()
    boxes = [t.get_window_extent() for t in figure.axes[0].texts if t.get_text().startswith("[")][:11]
    assert all(a.x1 <= b.x0 for a, b in itertools.pairwise(boxes))
    with pytest.raises(ValueError, match="one row a label and score"):
        figures.plot_score_table(pd.DataFrame([*rows, rows[0]]))


def test_a_figure_that_does_not_fit_on_the_disk_leaves_the_earlier_one(tmp_path, monkeypatch):
    frame = probes()
    figure = plot_probe_grid(frame)
    save_figure(figure, tmp_path, "a", frame, {"seed": 0}, "Scores.")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_, **__):
        raise OSError("full")

    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    with pytest.raises(OSError, match="full"):
        save_figure(figure, tmp_path, "a", frame, {"seed": 1}, "Other scores.")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_sidecar_of_a_figure_takes_its_place_last(tmp_path, monkeypatch):
    """A run that is cut off there has the old origin beside new rows, and never a new origin beside old ones."""
    placed, replace = [], Path.replace

    def noted(self, target):
        placed.append(Path(target).suffix)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", noted)
    frame = probes()
    save_figure(plot_probe_grid(frame), tmp_path, "a", frame, {"seed": 0}, "Scores.")
    assert placed[-1] == ".json" and sorted(placed) == [".csv", ".json", ".pdf", ".png"]
