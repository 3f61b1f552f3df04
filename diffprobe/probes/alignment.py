"""Image-text alignment on arrays: scores from what forward passes give, the benchmarks' strict rules, a learned text map.

Scores are (item, image, text), larger where the text fits the image better; in every item text i is true of image i.
Scores of single passes are (item, image, text, timestep, draw) and are averaged over timesteps and draws before a choice.
`diffprobe.matching` runs the models and names the scores.

The invariant: a choice counts only where the true candidate is strictly above every other one; a tie, and a score that
is not a number, is a miss.

Sources: MMVP-VLM (Tong et al. 2024), Winoground (Thrush et al. 2022, equations 1-3), SugarCrepe (Hsieh et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from sklearn.linear_model import RidgeCV
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.preprocessing import StandardScaler

from diffprobe.stats import Floats, bootstrap_interval, bootstrap_sums, holm, paired_permutation_test, wilson_interval

Bools = NDArray[np.bool_]
ALL, MACRO = "all", "macro"
PENALTIES = tuple(10.0**k for k in range(-1, 6))
DIMS = ("item", "image", "text")
PAPER, DISCFFUSION = "attention_lse_paper", "attention_lse_discffusion"
LOSS, NORMALISED = "denoising_loss", "denoising_loss_normalised"
POOLED, CLIP = "pooled_cosine", "clip_cosine"
DIFFUSION_SCORES = (PAPER, DISCFFUSION, LOSS, NORMALISED)
SCORES = (*DIFFUSION_SCORES, POOLED, CLIP)


# --- scores of one item -----------------------------------------------------------------------------


def diffusion_scores(raw: Mapping[str, Floats], names: Sequence[str], candidates: int, numbers: int) -> dict[str, Floats]:
    """The scores (image, text, ...) from what the passes gave; their formulas stand in `diffprobe.matching`.

    Args:
        raw: (image, text, ...) of "error" (mean squared), "map_lse" and "score_lse", as far as `names` need them; the
            null text follows the candidates.
        names: Names of scores; those that are not in `DIFFUSION_SCORES` are ignored.
        candidates: Texts without the null text.
        numbers: Numbers in one latent: an error's norm is the root of `numbers` times its mean square.

    >>> diffusion_scores({"error": np.array([[1.0, 4.0, 9.0]])}, (LOSS, NORMALISED), 2, 100)
    {'denoising_loss': array([[-1., -4.]]), 'denoising_loss_normalised': array([[8., 5.]])}
    """
    given = {name: values[:, :candidates] for name, values in raw.items()}
    null = {name: values[:, candidates:] for name, values in raw.items()}
    formulas: dict[str, Callable[[], Floats]] = {
        PAPER: lambda: given["map_lse"],
        DISCFFUSION: lambda: (
            (given["score_lse"] + null["score_lse"]) / 2 + np.sqrt(numbers) * (np.sqrt(null["error"]) - np.sqrt(given["error"]))
        ),
        LOSS: lambda: -given["error"],
        NORMALISED: lambda: null["error"] - given["error"],
    }
    return {name: formula() for name, formula in formulas.items() if name in names}


# --- strict choices -------------------------------------------------------------------------------


def texts_right(scores: Floats) -> Bools:
    """Whether every image of an item chooses its own text; (item, image, text) -> (item,).

    >>> texts_right(np.array([[[0.9, 0.1], [0.2, 0.8]], [[0.9, 0.9], [0.2, 0.8]]])).tolist()
    [True, False]
    """
    return np.all(_strictly_first(scores), axis=1)


def images_right(scores: Floats) -> Bools:
    """Whether every text that is true of an image chooses that image; (item, image, text) -> (item,)."""
    return np.all(_strictly_first(scores[:, :, : scores.shape[1]].swapaxes(1, 2)), axis=1)


def _strictly_first(scores: Floats) -> Bools:
    """(item, asker, candidate) -> (item, asker): candidate i is strictly above all others for asker i."""
    askers, candidates = scores.shape[1:]
    own = np.eye(askers, candidates, dtype=bool)
    mine = scores[:, own][:, :, None]
    return np.asarray((own | (mine > scores)).all(2) & np.isfinite(mine[:, :, 0]))


def group_right(scores: Floats) -> Bools:
    """Winoground's group score: both of the above."""
    return texts_right(scores) & images_right(scores)


@dataclass(frozen=True)
class Metric:
    """A strict choice and the share that random scores get right."""

    right: Callable[[Floats], Bools]
    chance: float


# The first metric of a protocol is the one that its benchmark reports.
PROTOCOLS: dict[str, dict[str, Metric]] = {
    "mmvp-vlm": {"pair": Metric(images_right, 1 / 4)},
    "winoground": {
        "text": Metric(texts_right, 1 / 4),
        "image": Metric(images_right, 1 / 4),
        "group": Metric(group_right, 1 / 6),
    },
    "sugarcrepe": {"positive": Metric(texts_right, 1 / 2)},
}


def protocol_metrics(protocol: str) -> dict[str, Metric]:
    """The metrics of a protocol.

    Raises:
        ValueError: there is no such protocol.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"Protocol {protocol!r} is not one of {', '.join(PROTOCOLS)}.")
    return PROTOCOLS[protocol]


def over_draws(scores: xr.DataArray) -> NDArray[np.float64]:
    """(item, image, text): the mean over timesteps and draws.  Scores that are equal in all draws stay equal exactly."""
    over = [d for d in scores.dims if d not in DIMS]
    values = scores.transpose(*DIMS, *over).to_numpy()
    return np.asarray(values.reshape(*values.shape[:3], -1).mean(3)) if over else values


# --- tables ---------------------------------------------------------------------------------------


def alignment_table(scores: xr.Dataset, protocol: str, *, seed: int = 0) -> pd.DataFrame:
    """The share of items that each score gets right: one row per score, metric and pattern.

    Args:
        scores: Variables (item, image, text[, timestep, draw]) with the coordinate `pattern` on item.
        protocol: A key of `PROTOCOLS`.
        seed: Seed of the bootstrap behind the rows of pattern "macro".

    Returns:
        Columns score, metric, pattern, value, low, high, n, chance, seed.  Rows "all" and those of single patterns have
        Wilson intervals over items; "macro" is the mean over patterns, its items resampled.

    Raises:
        ValueError: the protocol is unknown, or the scores do not have its dimensions.
    """
    metrics = protocol_metrics(protocol)
    rows = []
    for name, hits in item_hits(scores, protocol).items():
        patterns = np.asarray(hits["pattern"].values, dtype=str)
        for metric, kept in metrics.items():
            right = hits.sel(metric=metric).to_numpy()
            row = {"score": name, "metric": metric, "chance": kept.chance, "seed": seed}
            names = list(dict.fromkeys(patterns))
            for pattern in [ALL, *names] if len(names) > 1 else [ALL]:
                mine = right if pattern == ALL else right[patterns == pattern]
                low, high = wilson_interval(int(mine.sum()), len(mine))
                rows.append({**row, "pattern": pattern, "value": mine.mean(), "low": low, "high": high, "n": len(mine)})
            if len(names) > 1:
                rows.append({**row, "pattern": MACRO, "n": len(right), **_macro(right, patterns, seed)})
    columns = ["score", "metric", "pattern", "value", "low", "high", "n", "chance", "seed"]
    return pd.DataFrame(rows)[columns]


def _macro(right: Bools, patterns: NDArray[np.str_], seed: int) -> dict[str, float]:
    """Mean over patterns of the share right, with its bootstrap interval."""
    shown = (patterns[:, None] == np.unique(patterns)).astype(np.float64)
    columns = np.concatenate([shown * right[:, None], shown], axis=1)

    def mean_share(sums: Floats) -> Floats:
        hits, counts = np.split(sums, 2, axis=1)
        with np.errstate(invalid="ignore"):  # NaN for a resample that lacks a pattern
            return np.asarray((hits / counts).mean(1))

    value = float(mean_share(columns.sum(0, keepdims=True))[0])
    low, high = bootstrap_sums(columns, mean_share, seed=seed)
    if not low < high:  # all resamples are equal, as with few items per pattern: take the interval over items
        low, high = wilson_interval(value * len(right), len(right))
    return {"value": value, "low": low, "high": high}


def item_hits(scores: xr.Dataset, protocol: str) -> dict[str, xr.DataArray]:
    """For each score, by name, whether each item is right by each metric: (metric, item)."""
    metrics = protocol_metrics(protocol)
    found = {}
    for name, values in scores.data_vars.items():
        if not set(DIMS) <= set(values.dims):
            continue
        pooled = over_draws(values)
        images, texts = pooled.shape[1:]
        if texts < max(2, images) or (images < 2 and protocol != "sugarcrepe"):
            raise ValueError(f"Protocol {protocol} cannot score items of {images} images and {texts} texts.")
        right = np.stack([metric.right(pooled) for metric in metrics.values()])
        coords = {"metric": list(metrics), "item": values["item"], "pattern": ("item", values["pattern"].values)}
        found[str(name)] = xr.DataArray(right, coords, ("metric", "item"))
    if not found:
        raise ValueError(
            f"There are no scores over {', '.join(DIMS)}; found {', '.join(map(str, scores.data_vars)) or 'none'}."
        )
    return found


def compare_scores(scores: xr.Dataset, protocol: str, baseline: str, *, seed: int = 0) -> pd.DataFrame:
    """Each score against a baseline on the same items: difference of the shares right, paired by item.

    Returns:
        Columns score, baseline, metric, value, low, high, p, p_holm, n, seed: the mean difference with its
        bootstrap interval, the p value of an exact test (McNemar's), and the same after Holm over the rows.

    Raises:
        ValueError: the baseline is not among the scores.
    """
    hits = item_hits(scores, protocol)
    if baseline not in hits:
        raise ValueError(f"Baseline {baseline!r} is not one of the scores {', '.join(hits)}.")
    rows = []
    for name in hits:
        for metric in protocol_metrics(protocol) if name != baseline else ():
            a, b = (hits[which].sel(metric=metric).to_numpy().astype(np.float64) for which in (name, baseline))
            low, high = bootstrap_interval(a - b, seed=seed)
            value, p = paired_permutation_test(a, b, seed=seed)
            row = {"score": name, "baseline": baseline, "metric": metric, "value": value, "low": low, "high": high}
            rows.append({**row, "p": p, "n": len(a), "seed": seed})
    frame = pd.DataFrame(rows, columns=["score", "baseline", "metric", "value", "low", "high", "p", "n", "seed"])
    frame.insert(7, "p_holm", holm(frame["p"]))
    return frame


# --- a learned baseline ---------------------------------------------------------------------------


@dataclass(frozen=True)
class TextMap:
    """A linear map from pooled features to text embeddings; `fit_text_map` makes one.

    Attributes:
        scaler: Of the training features.
        ridge: From standardised features to texts about their mean; its penalty is chosen by leave-one-out error.
        offset: (width,) mean text embedding.
    """

    scaler: StandardScaler
    ridge: RidgeCV
    offset: Floats

    def cosine(self, features: Floats, texts: Floats) -> Floats:
        """Cosine of mapped features (image, channel) and texts (text, width), both about the training texts' mean: (image, text)."""
        mapped = self.ridge.predict(self.scaler.transform(features))
        return np.asarray(cosine_similarity(mapped, texts - self.offset))


def fit_text_map(features: Floats, texts: Floats) -> TextMap:
    """Ridge regression of text embeddings (sample, width) on standardised features (sample, channel).

    Raises:
        ValueError: there are fewer than ten samples, or a value is not finite.
    """
    if len(features) != len(texts) or len(features) < 10:
        raise ValueError(f"A map to text needs at least 10 samples with one text each; got {len(features)} and {len(texts)}.")
    if not (np.isfinite(features).all() and np.isfinite(texts).all()):
        raise ValueError("Training features or texts are not finite; extract them in float32.")
    scaler, offset = StandardScaler().fit(features), texts.mean(0)
    ridge = RidgeCV(PENALTIES, fit_intercept=False).fit(scaler.transform(features), texts - offset)
    return TextMap(scaler, ridge, offset)
