"""Scores of single texts of a leakage run, and labels compared image by image: what several figures stand on."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd

from diffprobe.mllm.captions import Similarity, content_f1
from diffprobe.mllm.verdict import KEYS, crossed_mean, score_matrix


def item_scores(texts: pd.DataFrame, condition: str = "mismatched", similarity: Similarity = content_f1) -> pd.DataFrame:
    """Leak (of words) and sight of every text: columns control, arm, site, timestep, guidance, seed, sample, leak, sight.

    As in `diffprobe.mllm.verdict`: a similarity less its mean over the texts of other images.
    """
    rows = []
    chosen = texts[texts["condition"] == condition]
    chosen = chosen.assign(references=[json.loads(r) for r in chosen["references"]])
    for key, group in chosen.groupby([*KEYS, "seed"], dropna=False, sort=False):
        own = {score: np.diag(score_matrix(group, score, similarity)[1]) for score in ("leak", "sight")}
        about = dict(zip([*KEYS, "seed"], key, strict=True))
        rows.append(pd.DataFrame({**about, "sample": group["sample"].to_numpy(str), **own}))
    return pd.concat(rows, ignore_index=True)


def compare(items: pd.DataFrame, label: str, baseline: str) -> pd.DataFrame:
    """Mean leak and sight of each label and their change from the baseline's, on the same images and projector seeds.

    Args:
        items: Of `item_scores`, with a column that names what is compared.
        baseline: The label that the others are compared with.

    Returns:
        Rows of label and score with value, low, high, change, change_low, change_high, n, n_seeds, chance.
    """
    rows = []
    for score in ("leak", "sight"):
        tables = {
            name: part.pivot(index="seed", columns="sample", values=score) for name, part in items.groupby(label, sort=False)
        }
        base = tables[baseline]
        for name, table in tables.items():
            mean, change = crossed_mean(table.to_numpy()), crossed_mean((table - base[table.columns]).to_numpy())
            rows.append(
                {"label": name, "score": score, **{k: mean[k] for k in ("value", "low", "high")},
                 "change": change["value"], "change_low": change["low"], "change_high": change["high"],
                 "n": table.shape[1], "n_seeds": table.shape[0], "chance": 0.0}
            )  # fmt: skip
    return pd.DataFrame(rows)
