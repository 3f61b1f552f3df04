"""Reading a store for training, and the sparse autoencoder: against plain NumPy and a planted dictionary."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch.utils.data import DataLoader

from diffprobe import store
from diffprobe.probes import sae
from diffprobe.store import ArraySpec, create_store
from diffprobe.torch import StoreDataset, StoreStream

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine of one core
SITE, COUNT, UNIT = "U-L1-Out", 23, 4


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A store of 23 samples in units of 4, of which two could not be read, and its features."""
    path = tmp_path_factory.mktemp("store") / "s.zarr"
    spec = ArraySpec(SITE, "up_blocks.1", "block", "features", ("channel", "y", "x"), (3, 2, 4), ("null", "caption"))
    tokens = np.zeros((COUNT, 2, 1), np.int32)
    create_store(
        path, attributes={"request": {"timesteps": [10, 500], "conditionings": ["null", "caption"]}, "data": "none"},
        sample_ids=[f"s{i}" for i in range(COUNT)], labels={"kind": np.array([f"k{i % 3}" for i in range(COUNT)], object), "size": np.arange(COUNT) / 2},
        timesteps=[10, 500], conditionings=["null", "caption"], tokens=[0], specs=[spec], unit_samples=UNIT, dtype="float16",
        prompts={"text": np.full((COUNT, 2), "", object), "token_id": tokens, "token_start": tokens, "token_end": tokens},
    )  # fmt: skip
    values = np.random.default_rng(0).random((COUNT, 2, 2, 3, 2, 4)).astype(np.float16)
    writer = store.StoreWriter(path)
    for unit in range(-(-COUNT // UNIT)):
        first, last = writer.bounds(unit)
        status = np.array([store.UNREADABLE if i in (5, 20) else store.COMPLETE for i in range(first, last)], np.uint8)
        writer.write_unit(unit, {SITE: values[first:last]}, status)
    return path, values


def good(values: np.ndarray) -> np.ndarray:
    return np.delete(values, [5, 20], axis=0)


def test_a_dataset_by_index(kept: tuple[Path, np.ndarray]) -> None:
    path, values = kept
    data = StoreDataset(path, SITE, timestep=500, label="kind")
    assert len(data) == 21 and data.ids[5] == "s6" and data.shape == (2, 3, 2, 4) and data.classes == ["k0", "k1", "k2"]
    for index in (0, 5, 20):
        item = data[index]
        np.testing.assert_array_equal(item["features"], good(values)[index, :, 1])
        assert int(item["sample"]) == index and data.classes[int(item["label"])] == f"k{int(data.ids[index][1:]) % 3}"
    mean = StoreDataset(path, SITE, timestep=10, conditioning="null", rows="mean", label="size", dtype=torch.float16)[3]
    np.testing.assert_allclose(mean["features"], values[3, 0, 0].mean((1, 2), np.float32), rtol=1e-3)
    assert mean["features"].dtype == torch.float16 and float(mean["label"]) == 1.5
    loader = DataLoader(data, batch_size=4, shuffle=True, num_workers=2)
    assert sorted(int(n) for batch in loader for n in batch["sample"]) == list(range(21))
    with pytest.raises(ValueError, match=r"There is no label 'knd'.*Did you mean 'kind'"):
        StoreDataset(path, SITE, label="knd")


@pytest.mark.parametrize("rows", ["none", "mean", "tokens"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_stream_yields_every_row_once(kept: tuple[Path, np.ndarray], rows: Any, shuffle: bool) -> None:
    path, values = kept
    stream = StoreStream(path, SITE, timestep=10, rows=rows, shuffle=shuffle, batch_size=5, buffer=2, label="size")
    chosen = good(values)[:, :, 0]
    plain = {
        "none": chosen,
        "mean": chosen.mean((3, 4), np.float32).reshape(-1, 3),
        "tokens": chosen.transpose(0, 1, 3, 4, 2).reshape(-1, 3),
    }[rows].astype(np.float32)
    batches = list(stream)
    sizes = [len(batch["sample"]) for batch in batches]
    assert set(sizes[:-1]) == {5} and sum(sizes) == len(plain)
    got, numbers = (torch.cat([batch[name] for batch in batches]).numpy() for name in ("features", "sample"))
    labels = torch.cat([batch["label"] for batch in batches]).numpy()
    np.testing.assert_array_equal(labels, [float(stream.ids[n][1:]) / 2 for n in numbers])
    assert stream.shape == plain.shape[1:]
    if not shuffle:
        np.testing.assert_allclose(got, plain, rtol=1e-6)
        return
    assert (numbers != np.sort(numbers)).any()
    order = lambda array: array[np.lexsort(array.reshape(len(array), -1).T)]  # noqa: E731
    np.testing.assert_allclose(order(got), order(plain), rtol=1e-6)
    again = torch.cat([batch["features"] for batch in stream]).numpy()
    np.testing.assert_array_equal(got, again)
    stream.set_epoch(1)
    assert not np.array_equal(got, torch.cat([batch["features"] for batch in stream]).numpy())


def test_ranks_and_workers_share_the_units_out(kept: tuple[Path, np.ndarray]) -> None:
    path, _ = kept
    seen: list[int] = []
    for rank in range(2):
        stream = StoreStream(path, SITE, rank=rank, ranks=2, batch_size=3, seed=4)
        seen += [int(n) for batch in DataLoader(stream, batch_size=None, num_workers=2) for n in batch["sample"]]
    assert sorted(seen) == list(range(21))
    part = StoreStream(path, SITE, samples=["s9", "s2", "s8"])
    with pytest.raises(ValueError, match="has no sample 'nobody'"):
        StoreStream(path, SITE, samples=["s9", "nobody"])
    assert part.ids == ["s2", "s8", "s9"] and sorted(torch.cat([b["sample"] for b in part]).tolist()) == [0, 1, 2]


# --- the sparse autoencoder -----------------------------------------------------------------------


def test_the_forward_is_the_formula() -> None:
    coder = sae.SparseCoder(sae.SparseConfig(5, 12, k=3), seed=2)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    x = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    weight, bias, decoder, centre = (
        t.detach().numpy().astype(np.float64) for t in (coder.encoder.weight, coder.encoder.bias, coder.W_dec, coder.b_dec)
    )
    wanted = np.empty((40, 5))
    for row, token in enumerate(x.astype(np.float64)):
        latents = np.maximum(weight @ (token - centre) + bias, 0)
        latents[np.argsort(latents)[:-3]] = 0
        wanted[row] = latents @ decoder + centre
    np.testing.assert_allclose(coder(torch.from_numpy(x)).detach(), wanted, rtol=1e-4, atol=1e-5)


class Tokens:
    """A stream of tokens that are given."""

    def __init__(self, x: np.ndarray, samples: np.ndarray, batch: int = 256) -> None:
        self.x, self.samples, self.batch, self.epoch = (
            torch.from_numpy(x.astype(np.float32)),
            torch.from_numpy(samples),
            batch,
            0,
        )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Any:
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(self.epoch))
        for rows in order.split(self.batch):
            yield {"features": self.x[rows], "sample": self.samples[rows]}


def planted(tokens: int, seed: int, latents: int = 32, channels: int = 16, k: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Sums of k of some fixed directions, far from the origin; and the directions."""
    directions = np.random.default_rng(7).normal(size=(latents, channels))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    rng = np.random.default_rng(seed)
    codes = np.zeros((tokens, latents))
    for row in codes:
        row[rng.choice(latents, k, replace=False)] = rng.uniform(2, 6, k)
    return codes @ directions + 5, directions


def test_a_planted_dictionary_is_found_and_scored() -> None:
    x, directions = planted(12_000, 0)
    config = sae.SparseConfig(16, 32, k=3)
    coder = sae.train_sae(
        config, Tokens(x, np.arange(len(x)) // 20), sae.SparseTraining(epochs=25, dead_tokens=2000, learning_rate=3e-3)
    )
    cosines = directions @ (coder.W_dec / coder.W_dec.norm(dim=1, keepdim=True)).detach().numpy().T
    assert cosines.max(1).mean() > 0.95, cosines.max(1)
    held, _ = planted(2000, 1)
    samples = np.arange(len(held)) // 20
    random = sae.random_directions(config, torch.from_numpy(x.astype(np.float32)))
    table = sae.score_sae({"trained": coder, "random": random}, Tokens(held, samples), n_resamples=500).set_index(
        ["coder", "score"]
    )
    for name, one in (("trained", coder), ("random", random)):
        made = one(torch.from_numpy(held.astype(np.float32))).detach().numpy()
        fvu = ((held - made) ** 2).sum() / ((held - held.mean(0)) ** 2).sum()
        row = table.loc[(name, "fvu")]
        np.testing.assert_allclose(row["value"], fvu, rtol=1e-4)
        assert row["low"] < row["value"] < row["high"] and row["n"] == 100 and row["tokens"] == 2000
        dense = one.latents(torch.from_numpy(held.astype(np.float32))).detach().numpy()
        kept = np.where(dense >= np.sort(dense, axis=1)[:, -3:-2], dense, 0)
        np.testing.assert_allclose(table.loc[(name, "l0"), "value"], (kept > 0).sum(1).mean())
        np.testing.assert_allclose(table.loc[(name, "dead"), "value"], (~(kept > 0).any(0)).mean())
    assert table.loc[("trained", "fvu"), "high"] < 0.3 < 0.5 < table.loc[("random", "fvu"), "low"]


def test_the_loss_is_the_formula_and_trains_dead_latents() -> None:
    """Gao et al. 2024, appendix A.2: dead latents, and they alone, are trained to make what the living leave."""
    x, _ = planted(200, 0)
    coder = sae.SparseCoder(sae.SparseConfig(16, 40, k=3))
    dead = torch.arange(40) >= 30
    with torch.no_grad():
        coder.encoder.bias[:30] = 20.0  # the others are never among the largest
        coder.b_dec.fill_(5.0)
    loss, used = sae.loss_of(coder, torch.from_numpy(x.astype(np.float32)), dead, variance=7.0, auxiliary=0.25)
    assert not dead[used].any()
    decoder, dense = (
        tensor.detach().numpy().astype(np.float64) for tensor in (coder.W_dec, coder.latents(torch.from_numpy(x).float()))
    )
    error, extra = np.empty_like(x), np.empty_like(x)
    for row, latents in enumerate(dense):
        kept, silent = np.zeros(40), np.where(dead, latents, 0)
        kept[np.argsort(latents)[-3:]] = latents[np.argsort(latents)[-3:]]
        silent[np.argsort(np.where(dead, latents, -1))[:-8]] = 0  # half as many as channels
        error[row], extra[row] = x[row] - kept @ decoder - 5, silent @ decoder
    wanted = (error**2).sum(1).mean() / 7 + 0.25 * ((error - extra) ** 2).sum() / (error**2).sum()
    np.testing.assert_allclose(loss.item(), wanted, rtol=1e-4)
    loss.backward()
    moved = coder.encoder.weight.grad.norm(dim=1)
    assert (moved[30:] > 0).all()
    sae.loss_of(coder, torch.from_numpy(x.astype(np.float32)), torch.zeros_like(dead), 7.0, 0.25)[0].backward()


def test_the_interval_of_dead_latents() -> None:
    fires = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0]], bool)
    value, low, high = sae._dead(fires)
    without = np.array([0.5, 0.25, 0.5])  # computed by hand: of all samples but one
    error = np.sqrt(2 / 3 * ((without - without.mean()) ** 2).sum())
    np.testing.assert_allclose([value, low, high], [0.25, max(0, 0.25 - 1.96 * error), 0.25 + 1.96 * error])


def test_files_are_those_of_sparsify(tmp_path: Path) -> None:
    coder = sae.SparseCoder(sae.SparseConfig(6, 20, k=4), seed=3)
    sae.save_sae(coder, tmp_path)
    told = json.loads((tmp_path / "cfg.json").read_text())
    assert (told["d_in"], told["num_latents"], told["k"], told["activation"]) == (6, 20, 4, "topk")
    shapes = {name: tensor.shape for name, tensor in load_file(tmp_path / "sae.safetensors").items()}
    assert shapes == {"encoder.weight": (20, 6), "encoder.bias": (20,), "W_dec": (20, 6), "b_dec": (6,)}
    x = torch.randn(9, 6)
    torch.testing.assert_close(sae.load_sae(tmp_path)(x), coder(x))
    # as sparsify of another version wrote it: with settings that are not known here, and latents by the factor
    (tmp_path / "cfg.json").write_text(
        json.dumps({**told, "num_latents": 0, "expansion_factor": 20, "d_in": 1, "signed": False})
    )
    with pytest.raises(ValueError, match="do not have the shapes"):
        sae.load_sae(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps({**told, "gram_lookup": False}))
    torch.testing.assert_close(sae.load_sae(tmp_path)(x), coder(x))
    for change, words in (
        ({"activation": "groupmax"}, "activation 'groupmax'"),
        ({"skip_connection": True}, "skip_connection True"),
    ):
        (tmp_path / "cfg.json").write_text(json.dumps({**told, **change}))
        with pytest.raises(ValueError, match=words):
            sae.load_sae(tmp_path)
    (tmp_path / "cfg.json").unlink()
    with pytest.raises(ValueError, match=r"has no cfg\.json"):
        sae.load_sae(tmp_path)


def test_the_command(run: Any, follow: Callable[[str], list[str]], tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    given = ("--data", "shapes:20?objects=1", "--sites", "U-L2-R2-Res-Out", "-t", "50", "-c", "null")
    assert run("extract", "--model", tiny_folder, *given, "-o", out)[0] == 0
    code, said, errors = run("probe", "sae", out, "--epochs", "2", "-k", "4", "--draw", "2", "-o", tmp_path / "coder")
    assert code == 0, errors
    assert "random directions" in said and "fvu" in said and "dead" in said
    assert {p.name for p in (tmp_path / "coder").iterdir()} >= {
        "cfg.json",
        "sae.safetensors",
        "scores.csv",
        "scores.json",
        "latents.png",
    }
    follow(said)
    assert run("probe", "sae", out, "-o", tmp_path / "coder")[0] == 2
    assert (
        "of 6 channels"
        in (
            sae.save_sae(sae.SparseCoder(sae.SparseConfig(6, 8, k=2)), tmp_path / "six"),
            run("probe", "sae", out, "--sae", tmp_path / "six"),
        )[1][2]
    )
