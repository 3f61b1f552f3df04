"""Interventions as measurements: patching against plain hooks, erasure against its definition, tables, experiments' short forms."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from sklearn.linear_model import LogisticRegression

from diffprobe.data.twins import TwinsDataset
from diffprobe.forward import Engine, Row
from diffprobe.noise import sample_noise
from diffprobe.patching import activation_patching, causal_map, grid_sites, load_twins, probe_twins
from diffprobe.plotting import read_rows
from diffprobe.probes.causal import CHANGES, causal_table, fit_leace, rank_agreement
from diffprobe.recorder import Recorder
from experiments.causal import NAMES
from experiments.framework import FOLDER, Options, load_experiment

# --- erasure ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def concept() -> tuple[Any, Any]:
    """Rows with a concept of four classes, in correlated channels of which some are constant or repeated."""
    rng = np.random.default_rng(0)
    z = rng.integers(4, size=600)
    x = rng.normal(size=(600, 9)) @ rng.normal(size=(9, 12)) + 2 * rng.normal(size=(4, 12))[z]
    return np.concatenate([x, np.ones((600, 1)), x[:, :1]], axis=1), z


def test_no_linear_classifier_beats_a_constant_after_erasure(concept: tuple[Any, Any]) -> None:
    x, z = concept
    erased = fit_leace(x, z)(x)
    majority = np.bincount(z).max() / len(z)
    own = LogisticRegression(max_iter=5000).fit(x, z).score(x, z)
    left = LogisticRegression(max_iter=5000, tol=1e-8).fit(erased, z)
    assert own > 0.8 and left.score(erased, z) == pytest.approx(majority, abs=1e-9)
    means = np.stack([erased[z == k].mean(0) for k in range(4)])  # the theorem's condition: all classes have one mean
    assert np.abs(means - means[0]).max() < 1e-9 * np.abs(x).max()
    assert np.allclose(erased.mean(0), x.mean(0)) and fit_leace(x, z).rank == 3


def test_erasure_changes_as_little_as_can_be(concept: tuple[Any, Any]) -> None:
    """The problem is convex: at its minimum the gradient is orthogonal to every step that keeps the classes' means equal."""
    x, z = concept
    eraser = fit_leace(x, z)
    centred = x - x.mean(0)
    covariance = centred.T @ centred / len(x)
    shared = centred.T @ (np.eye(4)[z] - np.eye(4)[z].mean(0)) / len(x)
    free = np.eye(len(covariance)) - shared @ np.linalg.pinv(shared)  # rows of a step that keeps to it
    rng = np.random.default_rng(1)
    for _ in range(20):
        step = rng.normal(size=covariance.shape) @ free
        assert abs(np.trace(eraser.projection @ covariance @ step.T)) < 1e-8 * np.linalg.norm(step) * np.linalg.norm(covariance)
    spent = ((eraser(x) - x) ** 2).sum(1).mean()
    orthogonal = shared @ np.linalg.pinv(shared)  # as SAL erases: as complete, and larger
    assert np.abs((centred - centred @ orthogonal.T).T @ np.eye(4)[z]).max() < 1e-7 * len(x)
    assert spent < 0.999 * ((centred @ orthogonal.T) ** 2).sum(1).mean()


def test_erasure_is_that_of_its_authors_library(concept: tuple[Any, Any]) -> None:
    library = pytest.importorskip("concept_erasure")
    x, z = concept
    fitted = library.LeaceEraser.fit(torch.from_numpy(x), torch.from_numpy(np.eye(4)[z]), shrinkage=False)
    theirs = fitted(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(fit_leace(x, z)(x), theirs, atol=1e-6)


def test_labels_dealt_anew_and_refusals(concept: tuple[Any, Any]) -> None:
    x, z = concept
    assert fit_leace(x, np.random.default_rng(3).permutation(z)).rank == 3
    with pytest.raises(ValueError, match="two that differ"):
        fit_leace(x, np.zeros(len(x)))


# --- tables -------------------------------------------------------------------------------------------


def drawn_effects(shares: Any, pairs: int = 12, noise: float = 0.05) -> xr.Dataset:
    """Effects whose patch moves the given share (site, timestep), and whose controls move nothing."""
    rng = np.random.default_rng(0)
    whole = rng.uniform(1, 3, size=(1, 3, *shares.shape, pairs))
    true = np.stack([shares, shares * 0, shares * 0])[None, ..., None]
    dims = ("outcome", "change", "site", "timestep", "pair")
    coords = {"outcome": ["prediction"], "change": list(CHANGES), "site": [f"S{k}" for k in range(len(shares))],
              "timestep": 50 * np.arange(1, 1 + shares.shape[1])}  # fmt: skip
    moved = whole * (true + noise * rng.normal(size=whole.shape))
    return xr.Dataset({"moved": (dims, moved), "whole": (dims, whole)}, coords)


def test_a_cell_is_a_ratio_of_sums_and_holm_counts_the_grid() -> None:
    shares = np.array([[0.0, 0.5], [0.9, 0.02]])
    effects = drawn_effects(shares)
    table = causal_table(effects).set_index(["site", "timestep"])
    for (site, timestep), row in table.iterrows():
        cell = effects.sel(site=site, timestep=timestep, change="patch", outcome="prediction")
        assert row["value"] == pytest.approx(float(cell["moved"].sum() / cell["whole"].sum())) and row["n"] == 12
        assert row["low"] < row["value"] < row["high"] and abs(row["control_value"]) < 0.05
    assert (table["p_holm"] >= table["p"]).all()
    assert (table["p_holm"] < 0.05).tolist() == [False, True, True, False]


@pytest.mark.parametrize("sign", [1, -1, 0])
def test_agreement_of_ranks_with_its_interval(sign: int) -> None:
    shares = np.linspace(0, 0.8, 12).reshape(4, 3)
    rng = np.random.default_rng(1)
    accuracy = {1: shares, -1: 0.8 - shares, 0: rng.permutation(shares.ravel()).reshape(4, 3)}[sign]
    effects = drawn_effects(shares)
    hits = xr.DataArray(
        rng.random((200, 4, 3)) < accuracy, {d: effects[d] for d in ("site", "timestep")}, ("row", "site", "timestep")
    )
    found = rank_agreement(effects, hits)
    assert found["n"] == 12 and found["low"] <= found["value"] <= found["high"]
    assert found["low"] > 0.8 if sign == 1 else found["high"] < -0.8 if sign == -1 else abs(found["value"]) < 0.6


# --- patching -----------------------------------------------------------------------------------------


def test_patching_is_what_plain_hooks_give(tiny_model: Any) -> None:
    twins = load_twins(tiny_model, "colour", 10, batch_rows=8)
    dataset = TwinsDataset("mmvp", 9)
    assert twins.pairs[0] == dataset.pair(5) and twins.values[0] != twins.values[1]
    sites, timestep = ["U-L1-Out", "U-L3-Out"], 100
    table, readouts, classes = probe_twins(tiny_model, twins, sites, [timestep])
    assert set(table["site"]) == set(sites) and set(classes) == set(twins.values)
    found = activation_patching(tiny_model, twins, sites, [timestep], readouts, classes, batch_rows=4, progress=False)

    block, alpha = tiny_model.network.up_blocks[1], tiny_model.alphas_cumprod[timestep]
    noise = sample_noise(0, "twins-0", timestep, 0, twins.latents.shape[1:])
    noised = tiny_model.add_noise(twins.latents[:2], noise.expand(2, -1, -1, -1), torch.full((2,), timestep))
    text = tiny_model.encode_text([None, None])
    kept: list[torch.Tensor] = []
    handle = block.register_forward_hook(lambda m, a, output: kept.append(output))
    clean = tiny_model.denoise(noised, torch.full((2,), timestep), text)
    handle.remove()
    feature = kept[0]
    mask = torch.nn.functional.adaptive_max_pool2d(twins.masks[:1, None].float(), feature.shape[-2:])[:, 0].bool()

    def from_twin(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.where(mask[:, None], feature.flip(0), output)

    handle = block.register_forward_hook(from_twin)
    patched = tiny_model.denoise(noised, torch.full((2,), timestep), text)
    handle.remove()
    assert tiny_model.prediction_type == "epsilon" and 0 < alpha < 1
    way = (clean.flip(0) - clean).double()
    cell = found.sel(outcome="prediction", change="patch", site="U-L1-Out", timestep=timestep, pair=0)
    assert float(cell["moved"]) == pytest.approx(float(((patched - clean).double() * way).sum()), rel=1e-3, abs=1e-6)
    assert float(cell["whole"]) == pytest.approx(float((way**2).sum()), rel=1e-4)
    end = found.sel(outcome="probe logit", change="patch", site="U-L3-Out")
    np.testing.assert_allclose(end["moved"], end["whole"], rtol=1e-4)  # at the last block the way is over
    assert not np.allclose(found["moved"].sel(change="random direction"), found["moved"].sel(change="patch"))


def test_velocities_are_compared_as_the_network_gives_them(tiny: Callable[[str], Any]) -> None:
    """A whole patch of the output goes the whole way, although the predicted noise holds the input too."""
    from diffprobe.patching import own_output

    model = tiny("sd2v")
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    handle = model.network.register_forward_hook(lambda m, a, output: seen.append(output[0]))
    rows = [Row(0, None, 300), Row(1, None, 300)]
    with Recorder(model, "Noise") as nothing:
        for batch in Engine(model, batch_rows=2).run(nothing, latents, ["a", "b"], rows):
            torch.testing.assert_close(own_output(model, batch, batch.prediction), seen[0], atol=1e-5, rtol=1e-5)
    handle.remove()


def test_what_cannot_be_patched_is_refused(tiny_model: Any) -> None:
    assert grid_sites(tiny_model, "M-Out") == ["M-Out", "U-L3-Out"]
    with pytest.raises(ValueError, match="Twins of 'position' do not differ in one attribute in place; choose one of colour"):
        load_twins(tiny_model, "position", 2)
    with pytest.raises(ValueError, match="Site 'M-Ot' matches none"):
        grid_sites(tiny_model, "M-Ot")
    with pytest.raises(ValueError, match="Timestep 5000 is outside"):
        causal_map(tiny_model, timesteps=[5000])


# --- as a user types it -------------------------------------------------------------------------------


def test_the_command_writes_maps_that_are_drawn(run: Any, follow: Any, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "causal.csv"
    words = [
        "probe",
        "causal",
        "-m",
        tiny_folder,
        "--pairs",
        2,
        "--train-pairs",
        40,
        "-t",
        "100",
        "--sites",
        "M-Out,U-L1-Out",
        "-o",
        out,
    ]
    code, said, errors = run(*words)
    assert code == 0, errors
    assert "Rank correlation of the patch's effect on the prediction with the probe's accuracy" in said
    rows = read_rows(out)
    assert set(rows["label"]) == {"prediction", "probe logit", "colour"} and set(rows["site"]) == {
        "M-Out",
        "U-L1-Out",
        "U-L3-Out",
    }
    assert json.loads(out.with_suffix(".json").read_text())["options"]["attribute"] == "colour"
    follow(said)
    code, _, errors = run(*words[:-1], out, "--attribute", "position")
    assert code == 2 and errors.count("\n") <= 2 and "choose one of colour" in errors


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_short_form_of_each_experiment(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    experiment = load_experiment(FOLDER / f"{name}.py")
    claims = experiment.run(Options(model=str(tiny_folder), smoke=True, work=tmp_path), tmp_path)
    assert claims and all(claim.evidence for claim in claims)
    rows = read_rows(tmp_path / f"{name}.csv")
    assert {"value", "low", "high", "n"} <= set(rows) and isinstance(rows, pd.DataFrame) and len(rows) > 1
    assert experiment.redraw(tmp_path) == claims
