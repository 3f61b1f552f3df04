"""What of its prompt can be read off features, by linear readers alone: for features from anywhere, without a model.

Weaker evidence than `diffprobe.mllm.leakage`: a linear reader that finds nothing does not say that a trained one would find
nothing.  What it finds under the text of another image was read from the prompt; what it finds under an image's own caption may
be seen in the image, so that it is compared with the same images' features without a prompt.

The invariant: no choice is made on the rows that are scored.  Ridge regression has one penalty, the mean squared norm of the
standardised rows; every row is answered by the fold that did not have it; a permutation moves texts and fits all again.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from diffprobe.conditioning import FUNCTION_WORDS, NULL
from diffprobe.data.labels import ID_COLUMNS, read_known
from diffprobe.mllm.captions import NUMBERS
from diffprobe.probes.task import FOLDS
from diffprobe.stats import Floats, bootstrap_interval
from diffprobe.store import features, open_store, prompt_texts, site_names

WEAKER = "Weaker evidence than 'diffprobe leakage run': linear readers alone, and one that finds nothing shows no absence."
RELATIONS = frozenset(
    {
        "left", "right", "above", "below", "under", "over", "behind", "front", "beside", "between", "near", "inside", "outside",
        "top", "bottom", "on",
    }
)  # fmt: skip
FEWEST = 5  # texts that have a word, and that do not


def vocabulary(texts: Sequence[str]) -> tuple[list[str], Floats]:
    """The words that some texts have and others do not, without function words, and (text, word) which text has which.

    >>> words, said = vocabulary(["a red star"] * 10 + ["a blue star on top"] * 10)
    >>> words, said.sum(0).tolist()
    (['blue', 'on', 'red', 'top'], [10.0, 10.0, 10.0, 10.0])
    """
    own = [set(re.findall(r"\w+", text.casefold())) for text in texts]
    every = sorted(set().union(*own) - (FUNCTION_WORDS - RELATIONS))
    said = np.array([[word in words for word in every] for words in own], np.float64).reshape(len(texts), -1)
    kept = (said.sum(0) >= FEWEST) & ((1 - said).sum(0) >= FEWEST)
    return [word for word, keep in zip(every, kept, strict=True) if keep], said[:, kept]


def cross_fitted(features: ArrayLike, seed: int = 0) -> Floats:
    """The matrix (row, row) that turns targets into the answers of ridge regressions that did not have the row.

    Raises:
        ValueError: there are fewer rows than two a fold, or features are not finite.
    """
    x = np.asarray(features, np.float64).reshape(len(np.asarray(features)), -1)
    if len(x) < 2 * FOLDS or not np.isfinite(x).all():
        raise ValueError(f"An audit needs finite features of at least {2 * FOLDS} samples; got {x.shape[0]} x {x.shape[1]}.")
    folds = np.random.default_rng(seed).permutation(len(x)) % FOLDS
    answers = np.zeros((len(x), len(x)))
    for fold in range(FOLDS):
        test, train = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        mean, spread = x[train].mean(0), x[train].std(0)
        rows = (x - mean) / np.where(spread > 0, spread, 1)
        kernel = rows[train] @ rows[train].T
        solved = np.linalg.solve(kernel + np.eye(len(train)) * np.trace(kernel) / len(train), np.eye(len(train)))
        centre = np.eye(len(train)) - 1 / len(train)
        answers[np.ix_(test, train)] = rows[test] @ rows[train].T @ solved @ centre + 1 / len(train)
    return answers


def audit(
    features: ArrayLike, texts: Sequence[str], null: ArrayLike | None = None, *, n_permutations: int = 199, seed: int = 0
) -> pd.DataFrame:
    """What of each sample's text can be read off its features.

    Args:
        features: (sample, ...), recorded while the model was told `texts`.
        texts: What it was told, one a sample.
        null: Features of the same samples without a prompt.
        n_permutations: Of texts over samples, each with all fits anew; the smallest p is 1 / (n_permutations + 1).

    Returns:
        Rows with kind ("word", "relation", "count": the area under the ROC curve of a word's presence; "rank": how far up among
        all texts a sample's own comes by its predicted words, 1 the first and 0 the last), name, value, chance .5, control (the
        mean over permutations), p (one-sided, of words for all words together), and n.  For "rank" also low and high (95%, over samples) and, where
        `null` is given, null_value and gain with gain_low and gain_high: what the prompt adds to what the image shows.

    Raises:
        ValueError: the texts have no words that differ, or sizes do not fit.

    >>> rng = np.random.default_rng(0)
    >>> texts = [("a red star", "a blue star")[n] for n in rng.integers(0, 2, 60)]
    >>> leaking = rng.normal(size=(60, 8)) + np.array([["red" in text] * 8 for text in texts]) * 3
    >>> audit(leaking, texts).query("name == 'red'")[["value", "p"]].round(3).values.tolist()
    [[1.0, 0.005]]
    """
    words, said = vocabulary(texts)
    if len(texts) != len(np.asarray(features)) or not words:
        raise ValueError(
            f"{len(texts)} texts have {len(words)} words that at least {FEWEST} of them have and {FEWEST} do not, for features "
            f"of {len(np.asarray(features))} samples; an audit needs a text a sample, and words that differ."
        )
    weights = cross_fitted(features, seed)
    own, ranks = _auc(weights @ said, said), _ranks(weights @ said, said)
    rng = np.random.default_rng([seed, 1])
    drawn_auc, drawn_rank = np.zeros((n_permutations, len(words))), np.zeros(n_permutations)
    for number in range(n_permutations):
        moved = said[rng.permutation(len(said))]
        drawn_auc[number], drawn_rank[number] = _auc(weights @ moved, moved), _ranks(weights @ moved, moved).mean()
    # against the largest of all words in each permutation (Westfall & Young 1993), so that many words need no more permutations
    p = (1 + (drawn_auc.max(1)[:, None] >= own).sum(0)) / (n_permutations + 1)
    kind = lambda word: "relation" if word in RELATIONS else "count" if word in NUMBERS or word.isdigit() else "word"  # noqa: E731
    rows = [
        {"kind": kind(word), "name": word, "value": own[k], "control": drawn_auc[:, k].mean(), "p": p[k]}
        for k, word in enumerate(words)
    ]
    low, high = bootstrap_interval(ranks, seed=seed)
    rank = {"kind": "rank", "name": "the whole text", "value": ranks.mean(), "low": low, "high": high, "control": drawn_rank.mean(),
            "p": (1 + (drawn_rank >= ranks.mean()).sum()) / (n_permutations + 1)}  # fmt: skip
    if null is not None:
        gain = ranks - _ranks(cross_fitted(null, seed) @ said, said)
        ends = bootstrap_interval(gain, seed=seed)
        rank |= {"null_value": ranks.mean() - gain.mean(), "gain": gain.mean(), "gain_low": ends[0], "gain_high": ends[1]}
    return pd.DataFrame([rank, *rows]).assign(chance=0.5, n=len(texts))


def _auc(answers: Floats, said: Floats) -> Floats:
    """(word,) share of pairs of a text with and one without the word that are in the right order; ties count half."""
    have, count = said.sum(0), len(said)
    return (np.asarray(rankdata(answers, axis=0) * said).sum(0) - have * (have + 1) / 2) / (have * (count - have))


def _ranks(answers: Floats, said: Floats) -> Floats:
    """(sample,) share of other samples' texts that the predicted words fit less than the own one; equal fits count half."""
    spread = lambda values: (values - values.mean(0)) / np.where(values.std(0) > 0, values.std(0), 1)  # noqa: E731
    fits = spread(answers) @ spread(said).T
    own = np.diag(fits)[:, None]
    return np.asarray(((fits < own - 1e-9).sum(1) + 0.5 * (np.abs(fits - own) <= 1e-9).sum(1) - 0.5) / (len(said) - 1))


# --- features from files and stores -----------------------------------------------------------------

Cell = tuple[dict[str, Any], Floats, list[str], Floats | None]


def cells_of_file(path: str | Path, captions: str | Path | None, null: str | Path | None = None) -> Iterator[Cell]:
    """The one cell of an .npz file: where it is, features, texts, and features without a prompt.

    Args:
        path: With the arrays features (sample, ...), ids and, in place of `captions`, texts.
        captions: A .csv, .jsonl or .parquet file with a column id (or sample, file, file_name) and one caption, text or fed.
        null: Another such file, of the same ids.

    Raises:
        ValueError: a file lacks what is needed.
    """
    held = _arrays(path)
    ids = [str(name) for name in held.get("ids", range(len(held["features"])))]
    if captions is not None:
        there = set(ids)
        find = lambda name: name if name in there else None  # noqa: E731
        known, _ = read_known(Path(captions), find, ID_COLUMNS, ("caption", "captions", "text", "fed"))
        if lacking := [name for name in ids if name not in known or not known[name].captions]:
            raise ValueError(f"'{captions}' has no text for {len(lacking)} of {len(ids)} samples, such as {lacking[0]!r}.")
        texts = [known[name].captions[0] for name in ids]
    elif "texts" in held:
        texts = [str(text) for text in held["texts"]]
    else:
        raise ValueError(f"What the model was told is not known: give --captions FILE, or an array 'texts' in {path}.")
    reference = None
    if null is not None:
        other = _arrays(null)
        order = {str(name): row for row, name in enumerate(other.get("ids", range(len(other["features"]))))}
        if set(order) < set(ids):
            raise ValueError(f"'{null}' lacks {len(set(ids) - set(order))} of the samples of '{path}'.")
        reference = other["features"][[order[name] for name in ids]]
    yield {}, held["features"], texts, reference


def _arrays(path: str | Path) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as held:
            found = dict(held)
    except (OSError, ValueError) as error:
        raise ValueError(f"'{path}' could not be read as .npz without pickled objects ({error}).") from error
    if "features" not in found:
        raise ValueError(f"'{path}' has the arrays {', '.join(found) or 'none'}; one must be called 'features'.")
    return found


def cells_of_store(path: str | Path, sites: Sequence[str] = (), conditionings: Sequence[str] = ()) -> Iterator[Cell]:
    """A cell for each site, timestep and conditioning of a store that has a text, features averaged over places."""
    tree = open_store(path)
    for site in sites or [name for name in site_names(tree) if "features" in tree[name].data_vars]:
        values = features(tree, site, pool="mean")
        there = [str(name) for name in values["conditioning"].values]
        chosen = list(conditionings) or [name for name in there if name != NULL]
        for conditioning, timestep in itertools.product(chosen, values["timestep"].values.tolist()):
            at = values.sel(timestep=timestep)
            texts = [str(text) for text in prompt_texts(tree, conditioning.partition("@")[0])["text"].values]
            null = at.sel(conditioning=NULL).values if NULL in there else None
            place = {"site": site, "timestep": timestep, "conditioning": conditioning}
            yield place, features(tree, site, conditioning=conditioning, timestep=timestep, pool="mean").values, texts, null
