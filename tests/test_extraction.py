"""The main job end to end on a tiny random model; every claim against a plain loop or an uninterrupted run."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffprobe import store
from diffprobe.data import ShapesDataset, load_dataset
from diffprobe.data.images import fit_image
from diffprobe.extraction import describe_forecast, extract, repair
from diffprobe.forward import NotFiniteError
from diffprobe.models import DiffusionModel
from diffprobe.noise import noise_seed, sample_noise
from diffprobe.recorder import Recorder
from diffprobe.sites import select_sites
from diffprobe.store import attention_maps, features, open_store
from diffprobe.units import array_specs, make_reduce, parse_reduce, projection

SITES = ["U-L1-R1-B0-Cross-Q", "U-L2-R2-Res-Out"]
MAP = "U-L1-R1-B0-Cross-Map"
QUICK: dict[str, Any] = {"sites": SITES, "timesteps": (50, 500), "batch_rows": 4, "progress": False}


def arrays(path: Path) -> dict[str, np.ndarray]:
    """Every site's whole array."""
    tree = open_store(path, complete=False)
    return {
        n: tree[n].to_dataset()["maps" if "maps" in tree[n].data_vars else "features"].values for n in store.site_names(tree)
    }


def assert_same(left: Path, right: Path) -> None:
    a, b = arrays(left), arrays(right)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_values_equal_a_plain_loop(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    dataset = ShapesDataset(5)
    summary = extract(tiny_model, dataset, tmp_path / "s.zarr", maps=[MAP], unit_samples=2, **QUICK)
    assert (summary.complete, summary.skipped) == (5, {})
    tree = open_store(tmp_path / "s.zarr")
    for index in (0, 4):
        sample = dataset[index]
        side = tiny_model.resolution
        pixels = np.asarray(fit_image(sample.load(), (side, side)), np.float32) / 127.5 - 1
        latent = tiny_model.encode_image(torch.from_numpy(pixels).permute(2, 0, 1)[None])
        for timestep in (50, 500):
            noise = sample_noise(0, sample.id, timestep, 0, latent.shape[1:])[None]
            noised = tiny_model.add_noise(latent, noise, torch.tensor([timestep]))
            for conditioning, prompt in (("null", None), ("caption", sample.captions[0].text)):
                with Recorder(tiny_model, SITES, maps=[MAP]) as recorder:
                    tiny_model.denoise(noised, torch.tensor([timestep]), tiny_model.encode_text([prompt]))
                for site in SITES:
                    got = features(tree, site, timestep=timestep, conditioning=conditioning).values[index]
                    np.testing.assert_allclose(got, recorder[site][0], rtol=2e-3, atol=2e-3)
                word = sample.captions[0].words()[0][0]
                if conditioning == "caption":
                    got = attention_maps(tree, word, timestep=timestep).sel(sample=sample.id).values[0]
                    _, spans, _ = tiny_model.tokens([prompt])
                    start = sample.captions[0].spans[1].start
                    places = [i for i, (a, b) in enumerate(spans[0].tolist()) if b > a and start <= a < start + len(word)]
                    np.testing.assert_allclose(got, recorder[MAP][0, 0, places].mean(0), rtol=5e-3, atol=1e-5)


def test_batches_order_and_processes_do_not_change_the_noise(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    """What `extract` promises: beside one rounding of the store's dtype, a share of the site's scale."""
    given: dict[str, Any] = {**QUICK, "guidance": [7.5], "maps": [MAP]}
    for dtype, rounding in (("float16", 2.0**-10), ("float32", 2.0**-23)):
        left, right = tmp_path / f"a-{dtype}.zarr", tmp_path / f"b-{dtype}.zarr"
        extract(tiny_model, ShapesDataset(6), left, store_dtype=dtype, **given)
        extract(tiny_model, ShapesDataset(6), right, store_dtype=dtype, unit_samples=5, **{**given, "batch_rows": 7})
        others = arrays(right)
        for name, values in arrays(left).items():
            a, b = values.astype(float), others[name].astype(float)
            beyond = np.abs(a - b) - rounding * np.maximum(np.abs(a), np.abs(b))
            share = beyond.max((0, *range(2, a.ndim))) / np.sqrt((a[:, :2] ** 2).mean())  # of each conditioning
            assert share.max() <= 1e-3 if name == MAP else (share <= 1e-4 * np.array([1, 1, 1 + 2 * 7.5])).all(), (name, share)
    extract(tiny_model, ShapesDataset(6), tmp_path / "c.zarr", **{**given, "seed": 1})
    assert not np.allclose(arrays(tmp_path / "a-float16.zarr")[SITES[0]], arrays(tmp_path / "c.zarr")[SITES[0]], atol=1e-2)


def test_guidance_and_noise_draws(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    extract(tiny_model, ShapesDataset(2), tmp_path / "g.zarr", guidance=[1.5, 4.0], **QUICK)
    tree = open_store(tmp_path / "g.zarr")
    stored = features(tree, SITES[0])
    assert stored["conditioning"].values.tolist() == ["null", "caption", "caption@1.5", "caption@4"]
    extract(tiny_model, ShapesDataset(2), tmp_path / "exact.zarr", store_dtype="float32", **QUICK)
    for site in SITES:
        null, text = (features(open_store(tmp_path / "exact.zarr"), site, conditioning=c).values for c in ("null", "caption"))
        for scale in (1.5, 4.0):  # in float32 until the end: what a float16 store holds is rounded once
            guided = (null + scale * (text - null)).astype(np.float16)
            np.testing.assert_array_equal(features(tree, site, guidance=scale).values, guided)
    extract(tiny_model, ShapesDataset(2), tmp_path / "d.zarr", noise_draws=3, store_dtype="float32", **QUICK)
    extract(tiny_model, ShapesDataset(2), tmp_path / "h.zarr", noise_draws=3, **QUICK)
    for site in SITES:  # so is an average
        mean, half = (features(open_store(tmp_path / f"{name}.zarr"), site).values for name in ("d", "h"))
        np.testing.assert_array_equal(half, mean.astype(np.float16))
    singles = []
    for draw in range(3):
        sample = ShapesDataset(2)[1]
        side = tiny_model.resolution
        pixels = np.asarray(fit_image(sample.load(), (side, side)), np.float32) / 127.5 - 1
        latent = tiny_model.encode_image(torch.from_numpy(pixels).permute(2, 0, 1)[None])
        noised = tiny_model.add_noise(latent, sample_noise(0, sample.id, 50, draw, latent.shape[1:])[None], torch.tensor([50]))
        with Recorder(tiny_model, SITES) as recorder:
            tiny_model.denoise(noised, torch.tensor([50]), tiny_model.encode_text([None]))
        singles.append(recorder[SITES[1]][0].double().numpy())
    got = features(open_store(tmp_path / "d.zarr"), SITES[1], timestep=50, conditioning="null").values[1]
    np.testing.assert_allclose(got, np.mean(singles, axis=0), rtol=1e-4, atol=1e-4)


def test_guidance_is_computed_in_float32(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    """Bit for bit, so that not even a float16 step on the way passes."""
    extract(tiny_model, ShapesDataset(2), tmp_path / "g.zarr", guidance=[1.5, 7.5], store_dtype="float32", **QUICK)
    for site in SITES:
        null, text, *guided = (features(open_store(tmp_path / "g.zarr"), site).isel(conditioning=i).values for i in range(4))
        for scale, found in zip((1.5, 7.5), guided, strict=True):
            np.testing.assert_array_equal(found, null + np.float32(scale) * (text - null))


def test_each_samples_latent_is_drawn_with_its_own_seed(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    dataset, side = ShapesDataset(3), tiny_model.resolution
    options = {**QUICK, "sites": ["Noised-Latent"], "timesteps": (50,)}
    extract(tiny_model, dataset, tmp_path / "s.zarr", latent_rule="sample", store_dtype="float32", **options)
    stored = features(open_store(tmp_path / "s.zarr"), "Noised-Latent", timestep=50, conditioning="null")
    for index in range(3):
        sample = dataset[index]
        pixels = np.asarray(fit_image(sample.load(), (side, side)), np.float32) / 127.5 - 1
        own = torch.Generator().manual_seed(noise_seed(0, sample.id, -1))
        latent = tiny_model.encode_image(torch.from_numpy(pixels).permute(2, 0, 1)[None], "sample", [own])
        noise = sample_noise(0, sample.id, 50, 0, latent.shape[1:])[None]
        wanted = tiny_model.add_noise(latent, noise, torch.tensor([50]))[0]
        np.testing.assert_allclose(stored.values[index], wanted, atol=1e-4)


def test_self_maps_beside_cross_maps(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    maps = [MAP, "U-L1-R1-B0-Self-Map"]
    extract(tiny_model, ShapesDataset(2), tmp_path / "s.zarr", maps=maps, heads="all", **{**QUICK, "sites": ()})
    tree = open_store(tmp_path / "s.zarr")
    cross, own = (tree[name].to_dataset()["maps"] for name in maps)
    assert own.sizes["token"] == own.sizes["y"] * own.sizes["x"] != cross.sizes["token"]
    np.testing.assert_allclose(own.sum("token").values, 1, atol=2e-2)
    assert cross.sizes["head"] == own.sizes["head"] == 2


def test_reductions_equal_numpy(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    extract(tiny_model, ShapesDataset(2), tmp_path / "full.zarr", store_dtype="float32", **QUICK)
    for rule in ("mean", "grid:2x1", "project:3"):
        extract(tiny_model, ShapesDataset(2), tmp_path / "r.zarr", store_dtype="float32", reduce=rule, **QUICK)
        full = arrays(tmp_path / "full.zarr")[SITES[0]].astype(np.float64)
        got = arrays(tmp_path / "r.zarr")[SITES[0]]
        if rule == "mean":
            expected = full.mean((-1, -2))
        elif rule == "grid:2x1":
            half = full.shape[-2] // 2
            expected = np.stack([full[..., :half, :].mean((-1, -2)), full[..., half:, :].mean((-1, -2))], -1)[..., None]
        else:
            matrix = projection(SITES[0], 0, full.shape[3], 3).double().numpy()
            expected = np.einsum("kc,sntcyx->sntkyx", matrix, full)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4, err_msg=rule)
        for file in sorted((tmp_path / "r.zarr").rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        (tmp_path / "r.zarr").rmdir()


def test_reduce_rules_by_site(tiny_model: DiffusionModel) -> None:
    sites = select_sites(tiny_model.sites, SITES)
    assert parse_reduce(["grid:2x2", "*-Res-Out=mean"], sites) == {SITES[0]: "grid:2x2", SITES[1]: "mean"}
    with pytest.raises(ValueError, match="not one of none, mean, grid:HxW, project:K"):
        parse_reduce("median", sites)
    kept = torch.ones(1)
    assert make_reduce({}, 0)(sites[0], kept) is kept
    specs = array_specs(sites, {s.name: (8, 4, 4) for s in sites}, {s.name: "project:3" for s in sites}, ["null"], [])
    assert specs[0].shape == (3, 4, 4)


def test_the_same_command_resumes_and_another_is_refused(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    extract(tiny_model, ShapesDataset(6), tmp_path / "whole.zarr", unit_samples=2, **QUICK)
    extract(tiny_model, ShapesDataset(6), tmp_path / "s.zarr", unit_samples=2, **QUICK)
    store.StoreWriter(tmp_path / "s.zarr").forget_unit(1)
    passes = count_passes(tiny_model)
    summary = extract(tiny_model, ShapesDataset(6), tmp_path / "s.zarr", **{**QUICK, "batch_rows": None})
    assert summary.complete == 6
    assert_same(tmp_path / "whole.zarr", tmp_path / "s.zarr")
    assert passes() <= 4, "only the missing unit is computed again"
    with pytest.raises(ValueError, match=r"seed: the store has 0, you ask for 1.*timesteps: |timesteps: .*seed: "):
        extract(tiny_model, ShapesDataset(6), tmp_path / "s.zarr", **{**QUICK, "seed": 1, "timesteps": (50,)})
    with pytest.raises(ValueError, match="samples: the store has 6, you ask for 7"):
        extract(tiny_model, ShapesDataset(7), tmp_path / "s.zarr", **QUICK)


def count_passes(model: DiffusionModel) -> Any:
    calls = []
    handle = model.network.register_forward_pre_hook(lambda *_: calls.append(1))
    return lambda: (handle.remove(), len(calls))[1]


def test_an_image_is_encoded_once_and_a_prompt_once(
    tiny_model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, prompts = [], []
    encode_image, encode_text = tiny_model.encode_image, tiny_model.encode_text
    monkeypatch.setattr(tiny_model, "encode_image", lambda x, *a: (images.append(len(x)), encode_image(x, *a))[1])
    monkeypatch.setattr(tiny_model, "encode_text", lambda p: (prompts.extend(p), encode_text(p))[1])
    extract(tiny_model, ShapesDataset(4), tmp_path / "s.zarr", unit_samples=4, noise_draws=2, **QUICK)
    assert sum(images) == 4
    assert len(prompts) == len(set(prompts))


def test_a_killed_run_resumes_to_equal_arrays(tmp_path: Path, tiny_folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "diffprobe",
        "extract",
        "--model",
        str(tiny_folder),
        "--data",
        "shapes:48",
        "--sites",
        ",".join(SITES),
    ]
    command += ["--timesteps", "50", "--batch-rows", "2", "--out"]
    subprocess.run([*command, str(tmp_path / "whole.zarr")], check=True, capture_output=True)
    rng = np.random.default_rng(0)
    kills = 0
    for _ in range(12):
        process = subprocess.Popen([*command, str(tmp_path / "s.zarr")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while not (tmp_path / "s.zarr").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(float(rng.uniform(0, 0.6)))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        if not store.StoreWriter(tmp_path / "s.zarr").pending or kills == 3:
            break
    assert kills, "no run was caught while it worked"
    subprocess.run([*command, str(tmp_path / "s.zarr")], check=True, capture_output=True)
    assert_same(tmp_path / "whole.zarr", tmp_path / "s.zarr")
    assert store.verify_store(tmp_path / "s.zarr") == []


@pytest.mark.slow
def test_two_processes_give_the_same_store(tmp_path: Path, tiny_folder: Path) -> None:
    arguments = [
        "extract",
        "--model",
        str(tiny_folder),
        "--data",
        "shapes:12",
        "--sites",
        ",".join(SITES),
        "--timesteps",
        "50,500",
    ]
    arguments += ["--batch-rows", "4", "--out"]
    subprocess.run([sys.executable, "-m", "diffprobe", *arguments, str(tmp_path / "one.zarr")], check=True, capture_output=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "diffprobe"]
    done = subprocess.run([*launch, *arguments, str(tmp_path / "two.zarr")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "one.zarr", tmp_path / "two.zarr")
    assert "12 of 12 samples" in done.stdout
    assert done.stdout.count("Next:") == 1, "one rank speaks"
    assert store.StoreWriter(tmp_path / "two.zarr").attributes["processes"] == 2


def test_bad_images_are_counted_and_left_out(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "c.png"):
        Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(folder / name)
    (folder / "b.png").write_bytes(b"not a picture")
    summary = extract(tiny_model, str(folder), tmp_path / "s.zarr", **{**QUICK, "conditionings": ("null", "fixed:a star")})
    assert summary.complete == 2
    assert "b.png" in summary.skipped
    tree = open_store(tmp_path / "s.zarr")
    assert tree.dataset["sample"].values.tolist() == ["a.png", "c.png"]
    assert np.isfinite(features(tree, SITES[0]).values).all()
    assert store.store_info(tmp_path / "s.zarr")["status"] == {"complete": 2, "image unreadable": 1}
    for options in ({"noise_draws": 2}, {"guidance": [4.0]}, {"noise_draws": 2, "guidance": [4.0]}):
        place = tmp_path / "-".join(options)
        extract(tiny_model, str(folder), place, **{**QUICK, "conditionings": ("null", "fixed:a star")}, maps=[MAP], **options)
        for name, values in arrays(place).items():
            assert np.isnan(values[1]).all() and np.isfinite(values[[0, 2]]).all(), (name, options)
    with pytest.raises(ValueError, match="has no caption '0'"):
        extract(tiny_model, str(folder), tmp_path / "t.zarr", **QUICK, conditionings=("null", "caption"))


def test_values_that_are_not_finite(tiny_model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_noise = tiny_model.add_noise

    def poisoned(clean: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        noised = add_noise(clean, noise, timesteps)
        victim = sample_noise(0, ShapesDataset(4)[2].id, 500, 0, noise.shape[1:])
        return torch.where((noise == victim).flatten(1).all(1)[:, None, None, None], torch.nan, noised)

    monkeypatch.setattr(tiny_model, "add_noise", poisoned)
    with pytest.raises(NotFiniteError, match=r"Sample 'shapes-train-0-000002', site U-L1.*, timestep 500"):
        extract(tiny_model, ShapesDataset(4), tmp_path / "s.zarr", unit_samples=1, **QUICK)
    readable = open_store(tmp_path / "s.zarr")
    assert readable.sizes["sample"] >= 1, "what was complete stays readable"
    summary = extract(tiny_model, ShapesDataset(4), tmp_path / "m.zarr", on_nonfinite="mark", **QUICK)
    assert summary.complete == 3
    assert list(summary.skipped) == ["shapes-train-0-000002"]


@pytest.mark.parametrize("draws", [1, 2])
def test_guided_values_that_the_store_cannot_hold(tiny_model: DiffusionModel, tmp_path: Path, draws: int) -> None:
    large: dict[str, Any] = {**QUICK, "guidance": [1e6], "noise_draws": draws}
    with pytest.raises(NotFiniteError, match=r"Sample 'shapes-train-0-000000', site U-L1.*'caption@1e\+06'.*float16"):
        extract(tiny_model, ShapesDataset(2), tmp_path / "s.zarr", **large)
    assert store.store_info(tmp_path / "s.zarr")["status"] == {"pending": 2}
    summary = extract(tiny_model, ShapesDataset(2), tmp_path / "m.zarr", on_nonfinite="mark", **large)
    assert summary.complete == 0 and all("'caption@1e+06'" in reason for reason in summary.skipped.values())
    assert store.verify_store(tmp_path / "m.zarr") == [], "what is marked is no fault"
    assert repair(tmp_path / "m.zarr", tiny_model, progress=False) == ([], None)
    fine = extract(tiny_model, ShapesDataset(2), tmp_path / "f.zarr", store_dtype="float32", **large)
    assert fine.complete == 2 and store.verify_store(tmp_path / "f.zarr") == []


def test_float32_saves_what_float16_cannot_hold(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    half = tiny_model.network.half()
    tiny_model.pipeline.text_encoder.half()
    try:
        weight = half.up_blocks[2].resnets[2].conv2.weight
        kept = weight.data.clone()
        weight.data[0] = 60000.0
        with pytest.raises(NotFiniteError):
            extract(tiny_model, ShapesDataset(1), tmp_path / "a.zarr", store_dtype="float32", **QUICK)
        summary = extract(
            tiny_model, ShapesDataset(1), tmp_path / "b.zarr", store_dtype="float32", on_nonfinite="float32", **QUICK
        )
        assert summary.complete == 1
        assert tiny_model.dtype == torch.float16, "the model is given back as it was"
    finally:
        weight.data = kept
        tiny_model.pipeline.text_encoder.float()
        half.float()


def test_a_batch_that_does_not_fit_is_halved(
    tiny_model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    denoise = tiny_model.denoise

    def small(noised: torch.Tensor, timesteps: torch.Tensor, text: Any) -> Any:
        if len(noised) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return denoise(noised, timesteps, text)

    extract(tiny_model, ShapesDataset(3), tmp_path / "a.zarr", **QUICK)
    monkeypatch.setattr(tiny_model, "denoise", small)
    monkeypatch.setattr("diffprobe.units.Run.find_batch", lambda self, seconds: setattr(self.engine, "batch_rows", 4) or 0.1)
    extract(tiny_model, ShapesDataset(3), tmp_path / "b.zarr", **{**QUICK, "progress": True, "batch_rows": None})
    assert "A batch of 4 did not fit into memory; going on with 2." in capsys.readouterr().err
    for name, values in arrays(tmp_path / "a.zarr").items():
        np.testing.assert_allclose(values.astype(float), arrays(tmp_path / "b.zarr")[name].astype(float), atol=2e-3, rtol=2e-3)


def test_repair_computes_only_what_is_broken(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    for name in ("whole", "s"):
        extract(tiny_model, ShapesDataset(6), tmp_path / f"{name}.zarr", maps=[MAP], unit_samples=2, **QUICK)
    shard = sorted(p for p in (tmp_path / f"s.zarr/{SITES[0]}/features/c").rglob("*") if p.is_file())[2]
    raw = bytearray(shard.read_bytes())
    raw[100] ^= 4
    shard.write_bytes(bytes(raw))
    passes = count_passes(tiny_model)
    faults, summary = repair(tmp_path / "s.zarr", tiny_model, progress=False)
    assert [(f.unit, f.site) for f in faults] == [(2, SITES[0])]
    assert summary is not None
    assert passes() <= 4
    assert_same(tmp_path / "whole.zarr", tmp_path / "s.zarr")
    assert repair(tmp_path / "s.zarr", tiny_model, progress=False) == ([], None)


def test_forecast_is_true_and_a_full_disk_is_refused(
    tiny_model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = extract(tiny_model, ShapesDataset(8), tmp_path / "s.zarr", dry_run=True, **QUICK)
    assert not (tmp_path / "s.zarr").exists()
    assert summary.forecast is not None
    forecast = summary.forecast
    assert forecast.passes == 8 * 2 * 2
    extract(tiny_model, ShapesDataset(8), tmp_path / "s.zarr", **QUICK)
    stored = {n: v.nbytes for n, v in arrays(tmp_path / "s.zarr").items()}
    assert stored == forecast.bytes_by_site
    monkeypatch.setattr("diffprobe.rundir.free_bytes", lambda _: 1000)
    with pytest.raises(ValueError, match=r"The store needs .* and 1 kB are free"):
        extract(tiny_model, ShapesDataset(8), tmp_path / "t.zarr", **QUICK)
    assert extract(tiny_model, ShapesDataset(8), tmp_path / "t.zarr", force=True, **QUICK).complete == 8


def test_the_forecast_of_a_large_dataset_looks_at_some_of_it(
    tiny_model: DiffusionModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked, get = [], ShapesDataset.__getitem__
    monkeypatch.setattr(ShapesDataset, "__getitem__", lambda self, index: (looked.append(index), get(self, index))[1])
    options: dict[str, Any] = {**QUICK, "maps": [MAP], "dry_run": True}
    many = extract(tiny_model, ShapesDataset(100_000), tmp_path / "s.zarr", **options).forecast
    assert len(looked) == 500 and max(looked) > 99_000, "spread over the whole"
    few = extract(tiny_model, ShapesDataset(200), tmp_path / "s.zarr", **options).forecast
    assert many is not None and few is not None and (few.looked_at, many.looked_at) == (200, 500)
    assert {site: size / 500 for site, size in many.bytes_by_site.items()} == few.bytes_by_site
    assert many.passes == 100_000 * 2 * 2
    assert "(judged by 500 of them)" in describe_forecast(many) and "judged" not in describe_forecast(few)
    extract(
        tiny_model,
        ShapesDataset(1200),
        tmp_path / "s.zarr",
        **{**QUICK, "timesteps": (50,), "conditionings": ("null",), "maps": [], "sites": "Noised-Latent"},
    )
    looked.clear()
    with pytest.raises(ValueError, match="fingerprint: the store has"):
        extract(tiny_model, ShapesDataset(1200, seed=1), tmp_path / "s.zarr", **options)
    assert len(set(looked)) == 1200, "beside a store the whole request is compared"


def test_one_writer_at_a_time(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / "s.zarr.lock-0").open("w") as lock:
        lock.write("pid 12345")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"Another process \(pid 12345\) is writing"):
            extract(tiny_model, ShapesDataset(2), tmp_path / "s.zarr", **QUICK)
    extract(tiny_model, ShapesDataset(2), tmp_path / "s.zarr", **QUICK)
    assert not (tmp_path / "s.zarr.lock-0").exists()


def test_a_remote_store_is_written_and_read(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    extract(tiny_model, ShapesDataset(3), "memory://tests/extract.zarr", **QUICK)
    extract(tiny_model, ShapesDataset(3), tmp_path / "s.zarr", **QUICK)
    remote = features(open_store("memory://tests/extract.zarr"), SITES[0])
    np.testing.assert_array_equal(remote.values, features(open_store(tmp_path / "s.zarr"), SITES[0]).values)


def test_non_square_images_and_prompts_that_are_cut(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    side = tiny_model.resolution
    dataset = load_dataset("shapes:2")
    long = "fixed:" + "a red star and " * 40
    summary = extract(
        tiny_model, dataset, tmp_path / "s.zarr", resolution=(side, 2 * side), **{**QUICK, "conditionings": ("null", long)}
    )
    assert summary.forecast is not None
    assert summary.forecast.truncated_prompts == 1
    got = features(open_store(tmp_path / "s.zarr"), SITES[1])
    assert got.sizes["x"] == 2 * got.sizes["y"]
    with pytest.raises(ValueError, match="sides must be multiples of"):
        extract(tiny_model, dataset, tmp_path / "t.zarr", resolution=side + 1, **QUICK)


def test_mistakes_are_named_before_anything_is_written(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"timesteps": (50, 1000)}, "Timestep 1000 is outside 0..999"),
        ({"timesteps": (50, 50)}, "each once"),
        ({"conditionings": ("nul",)}, "'nul' is not one of: null, caption"),
        ({"conditionings": ("caption",), "guidance": (4.0,)}, "Guidance needs the conditioning 'null'"),
        ({"noise_draws": 0}, "at least 1"),
        ({"sites": ["up_blocks.4"]}, "Site 'up_blocks.4' matches none"),
        ({"conditionings": ("caption:99",)}, "has no caption '99'"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            extract(tiny_model, ShapesDataset(2), tmp_path / "s.zarr", **{**QUICK, **change})
    assert not (tmp_path / "s.zarr").exists()
