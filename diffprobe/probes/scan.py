"""Which site and noise level holds most: all are scored, one is chosen on some samples, and others judge it.

The invariant: what chose a cell never judges it.  Samples are dealt into folds.  For each fold in turn the cell is chosen without it and
scored on it, so that the held-out score is not lifted by the number of cells, as the highest score of a table is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from diffprobe.data.samples import did_you_mean
from diffprobe.probes.cells import column_means, mean_interval, resampling_weights
from diffprobe.probes.fitting import ProbeResult
from diffprobe.probes.grounding import attention_localization
from diffprobe.probes.localization import OWN, SCORES
from diffprobe.probes.scoring import make_row
from diffprobe.probes.task import FOLDS, Floats, number_ids, split_folds

# Half-widths of the interval of maps, whose folds take part in each other's choices: that makes their scores covary.  The correction of
# Nadeau & Bengio (2003) for five folds; without it 82% of the intervals of tables of noise held the truth, with it 94%.
WIDENED = (1 + FOLDS / (FOLDS - 1)) ** 0.5


def scan_probes(
    get: Callable[[str], xr.DataArray],
    sites: Sequence[str],
    labels: str | Sequence[str],
    probe: Callable[..., ProbeResult],
    **options: Any,
) -> pd.DataFrame:
    """Probes of every label at every site, as `probe_table`, with the best cell of each label and conditioning.

    In each of five turns one fold of the samples tests, one validates and three train (`fit_probe` with `cross_fit`).  The turn's cell
    is the one with the best validation score, and its test rows judge it.  No control task is fitted.

    Args:
        get, sites, labels, probe, options: As for `probe_table`; the probe must have several penalties (or k) to choose from.

    Returns:
        The table of `probe_table` with, for each label and conditioning, `validation` (mean validation score of the turns), `chosen` (turns
        that chose the cell), `bold` (whether it has the best `validation`: the cell to take), and in all its rows `held_out`,
        `held_out_low` and `held_out_high`, the score of what the turns chose.

    Raises:
        ValueError: the sites have different numbers of rows (patches), or nothing was validated.
    """
    names = [labels] if isinstance(labels, str) else list(labels)
    options |= {"cross_fit": True, "control": False, "keep_estimators": False}
    found: dict[str, list[tuple[str, ProbeResult]]] = {name: [] for name in names}
    for site in sites:
        features = get(site)
        for name in names:
            found[name].append((site, probe(features, name, **options)))
    frames = []
    for results in found.values():
        table = pd.concat([one.table.assign(site=site) for site, one in results], ignore_index=True)
        table = table[["site", *table.columns.drop("site")]]
        probes: list[Any] = [one for _, one in results]
        turns = [turns for one in probes for turns in one.turns_]
        if len({len(one.problem.target) for one in probes}) > 1:
            raise ValueError(
                "A scan compares sites on the same rows, and these have different numbers of patches; pool them by mean or flatten."
            )
        validated = np.array([[turn.validation for turn in cell] for cell in turns])  # (cell, turn)
        if np.isnan(validated).any():
            raise ValueError(
                "A scan chooses by validation scores, and there are none; give several penalties (or k) to choose from."
            )
        kinds = table["conditioning"] if "conditioning" in table else pd.Series("", table.index)
        for rows in (np.flatnonzero(kinds == kind) for kind in dict.fromkeys(kinds)):
            chosen = rows[validated[rows].argmax(0)]
            judged = make_row(
                probes[0].problem, probes[0].settings, [turns[cell][turn] for turn, cell in enumerate(chosen)], {}, 0
            )
            frames.append(_marked(table.iloc[rows].assign(validation=validated[rows].mean(1)), rows, chosen, judged))
    return pd.concat(frames, ignore_index=True)


def scan_maps(
    tree: xr.DataTree, dataset: Any = None, *, score: str = "auc", seed: int = 0, n_resamples: int = 2000, **options: Any
) -> pd.DataFrame:
    """Localization of words at every map site and timestep, with the best cell of each role.

    Args:
        score: One of `diffprobe.probes.localization.SCORES`.
        options: Others of `attention_localization`.

    Returns:
        The lines of one score of `attention_localization` for the words' own maps and the control "wrong word", whose `label` names the
        role; `validation`, `chosen`, `bold` and `held_out` as in `scan_probes`, and `held_out_lead` with its ends, over the wrong word.

    Raises:
        ValueError: there are fewer images than folds, or no such score; "iou_tuned" has thresholds from the judging images.
    """
    if score not in set(SCORES) - {"iou_tuned"}:
        fit = [name for name in SCORES if name != "iou_tuned"]
        raise ValueError(f"Score {score!r} is not one that a scan can choose by: {', '.join(fit)}.{did_you_mean(score, fit)}")
    options |= {"merged": False, "keep_rows": True, "seed": seed, "n_resamples": n_resamples}
    frame = attention_localization(tree, dataset, **options)
    frame = frame[frame["score"] == score]
    frames = []
    for role, part in frame[frame["map"] == OWN].groupby("role", sort=False):
        wrong = frame[(frame["role"] == role) & (frame["map"] == "wrong word")]
        groups = number_ids(part["row_groups"].iloc[0], len(part["row_groups"].iloc[0]), "row_groups", "word")
        table, other = (np.stack(lines["rows"].tolist(), axis=1) for lines in (part, wrong))
        chosen, folds = choose_held_out(table, groups, seed)
        cell = chosen[folds]
        own, control = (values[np.arange(len(folds)), cell][:, None] for values in (table, other))
        weights = resampling_weights(int(groups.max()) + 1, seed, n_resamples)
        judged, over = (_judged(values, groups, weights) for values in (own, own - control))
        lead = {"held_out_lead": over["value"], "held_out_lead_low": over["low"], "held_out_lead_high": over["high"]}
        lines = part.drop(columns=["rows", "row_groups"]).assign(
            label=f"localization of {role}s", validation=column_means(table), **lead
        )
        frames.append(_marked(lines, np.arange(len(lines)), chosen, judged))
    found = pd.concat(frames, ignore_index=True)
    found.attrs["left_out"] = frame.attrs.get("left_out", {})
    return found


def choose_held_out(table: Floats, groups: NDArray[np.int64], seed: int = 0) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
    """The column with the best mean over the rows of the other folds, for each fold.

    Args:
        table: (row, cell) scores; NaN where a row has none.
        groups: (row,) ids, whose rows stay in one fold.

    Returns:
        (fold,) columns, and (row,) the fold of each row.

    >>> cells, folds = choose_held_out(np.tile([0.1, 0.9, 0.4], (10, 1)), np.arange(10))
    >>> cells.tolist(), np.bincount(folds).tolist()
    ([1, 1, 1, 1, 1], [2, 2, 2, 2, 2])
    """
    if (there := len(np.unique(groups))) < FOLDS:
        raise ValueError(f"A choice that is judged on other images needs at least {FOLDS} of them; there are {there}.")
    folds = split_folds(np.zeros(len(groups), np.int64), groups, seed)
    means = [column_means(table[folds != fold]) for fold in range(FOLDS)]
    return np.array([np.nanargmax(mean) for mean in means]), folds


def _judged(own: Floats, groups: NDArray[np.int64], weights: Floats) -> dict[str, float]:
    """Mean and interval of the rows' scores (row, 1), each at the cell that was chosen for it."""
    value, (low, high) = column_means(own)[0], mean_interval(own, groups, weights)
    return {"value": value, "low": value - WIDENED * (value - low[0]), "high": value + WIDENED * (high[0] - value)}


def _marked(frame: pd.DataFrame, rows: NDArray[np.intp], chosen: NDArray[np.intp], judged: dict[str, Any]) -> pd.DataFrame:
    """The lines with what was chosen among them, and how that was judged."""
    best = np.arange(len(frame)) == int(frame["validation"].to_numpy().argmax())
    held = {"held_out": judged["value"], "held_out_low": judged["low"], "held_out_high": judged["high"]}
    return frame.assign(chosen=[int((chosen == row).sum()) for row in rows], bold=best, **held)
