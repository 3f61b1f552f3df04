"""The audit of features from elsewhere: planted leaks are found, nothing is found where there is none, files and stores are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

from diffprobe.extraction import extract
from diffprobe.mllm.audit import audit, cells_of_file, cells_of_store, cross_fitted, vocabulary
from diffprobe.probes.task import FOLDS


def told(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    words = (("red", "blue"), ("star", "circle"), ("left of", "right of"), ("one", "two"))
    return [" ".join(rng.choice(pair) for pair in words) for _ in range(count)]


def planted(texts: list[str], word: str, strength: float, seed: int = 1) -> np.ndarray:
    """Noise, of which one direction is whether a text has the word."""
    values = np.random.default_rng(seed).normal(size=(len(texts), 12))
    values[:, 3] += strength * np.array([word in text.split() for text in texts])
    return values


def test_the_readers_are_ridge_regressions_that_did_not_have_the_row() -> None:
    x, (_, said) = planted(told(60), "red", 2.0), vocabulary(told(60))
    answers, folds = cross_fitted(x, seed=4) @ said, np.random.default_rng(4).permutation(60) % FOLDS
    for fold in range(FOLDS):
        train, test = folds != fold, folds == fold
        mean, spread = x[train].mean(0), x[train].std(0)
        rows = (x - mean) / spread
        oracle = Ridge(alpha=(rows[train] ** 2).sum() / train.sum()).fit(rows[train], said[train])
        np.testing.assert_allclose(answers[test], oracle.predict(rows[test]), atol=1e-9)
    words, own = vocabulary(told(60))[0], audit(x, told(60), n_permutations=9, seed=4)
    for k, word in enumerate(words):
        value = own[own["name"] == word]["value"].iloc[0]
        assert value == pytest.approx(roc_auc_score(said[:, k], answers[:, k]))


def test_what_was_planted_is_found_and_nothing_else() -> None:
    texts = told(120)
    frame = audit(planted(texts, "left", 3.0), texts).set_index("name")
    assert (
        frame.loc["left", "kind"] == "relation" and frame.loc["two", "kind"] == "count" and frame.loc["star", "kind"] == "word"
    )
    assert (
        frame.loc["left", "value"] > 0.95 and frame.loc["left", "p"] < 0.05 and abs(frame.loc["left", "control"] - 0.5) < 0.05
    )
    assert set(frame[(frame["p"] < 0.05) & (frame["kind"] != "rank")].index) == {"left", "right"}
    whole = frame.loc["the whole text"]
    assert whole["value"] > 0.6 and whole["p"] < 0.05 and whole["low"] > 0.5


def test_without_a_leak_few_tests_find_one() -> None:
    found = []
    for seed in range(20):
        frame = audit(planted(told(60), "red", 0.0, seed=seed + 10), told(60), n_permutations=99, seed=seed)
        found.append(
            [bool((frame[frame["kind"] != "rank"]["p"] < 0.05).any()), bool(frame[frame["kind"] == "rank"]["p"].iloc[0] < 0.05)]
        )
    assert np.sum(found, axis=0).max() <= 4, "of 20, where 1 is expected"


def test_what_the_prompt_adds_is_beside_what_the_image_shows() -> None:
    texts = told(150)
    seen = planted(texts, "red", 3.0)
    both = seen.copy()
    both[:, 5] += 3 * np.array(["star" in text.split() for text in texts])
    same, more = (audit(x, texts, seen, n_permutations=9).iloc[0] for x in (seen, both))
    assert same["gain"] == 0 and more["gain_low"] > 0 and more["null_value"] == pytest.approx(same["value"])


def test_what_cannot_be_audited_is_refused() -> None:
    with pytest.raises(ValueError, match="60 texts have 0 words that at least 5"):
        audit(np.zeros((60, 3)), ["a star"] * 60)
    with pytest.raises(ValueError, match="for features of 59 samples"):
        audit(np.zeros((59, 3)), told(60))
    with pytest.raises(ValueError, match="finite features of at least 10 samples"):
        audit(np.full((60, 3), np.nan), told(60))


def test_files_are_joined_by_id(tmp_path: Path) -> None:
    texts, ids = told(30), [f"image {number}" for number in range(30)]
    values = planted(texts, "red", 3.0)
    np.savez(tmp_path / "f.npz", features=values, ids=ids)
    np.savez(tmp_path / "n.npz", features=values[::-1], ids=ids[::-1])
    pd.DataFrame({"id": ids[::-1], "fed": texts[::-1]}).to_csv(tmp_path / "c.csv", index=False)
    ((place, found, fed, null),) = cells_of_file(tmp_path / "f.npz", tmp_path / "c.csv", tmp_path / "n.npz")
    assert place == {} and fed == texts
    np.testing.assert_array_equal(found, values)
    np.testing.assert_array_equal(null, values)
    with pytest.raises(ValueError, match="What the model was told is not known: give --captions"):
        list(cells_of_file(tmp_path / "f.npz", None))
    pd.DataFrame({"id": ids[1:], "fed": texts[1:]}).to_csv(tmp_path / "c.csv", index=False)
    with pytest.raises(ValueError, match="has no text for 1 of 30 samples, such as 'image 0'"):
        list(cells_of_file(tmp_path / "f.npz", tmp_path / "c.csv"))
    np.savez(tmp_path / "bad.npz", features=np.array([{}], object))
    with pytest.raises(ValueError, match=r"could not be read as \.npz without pickled objects"):
        list(cells_of_file(tmp_path / "bad.npz", None))


def test_a_store_is_audited_from_the_shell(tiny_model: Any, tmp_path: Path, run: Any) -> None:
    out = tmp_path / "s.zarr"
    extract(
        tiny_model,
        "shapes:40?objects=1",
        out,
        sites="U-L1-R1-B0-Cross-Q",
        timesteps=[50],
        conditionings=["null", "mismatched"],
        progress=False,
    )
    ((place, values, texts, null),) = cells_of_store(out)
    assert place == {"site": "U-L1-R1-B0-Cross-Q", "timestep": 50, "conditioning": "mismatched"}
    assert len(texts) == len(values) == 40 and null is not None and null.shape == values.shape
    code, output, errors = run("leakage", "audit", out, "--permutations", "9")
    assert code == 0, errors
    assert "mismatched" in output and "Weaker evidence than 'diffprobe leakage run'" in " ".join(output.split())
    assert set(pd.read_csv(f"{out}.audit.csv")["kind"]) >= {"rank", "word"}
