"""How many bits a label costs once features are known: online codelength (Voita & Titov 2020, minimum description length).

Labels are sent block after block, each coded by a probe that was trained on all blocks before it; the first is coded evenly.
An accuracy says how good a probe becomes, a codelength also how soon: features from which a label is read after few examples
cost fewer bits.  The invariant: no label helps to code itself.
"""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from diffprobe.probes.task import Floats

SHARES = tuple(2.0**-k for k in range(6, -1, -1))  # of all rows: the ends of the blocks


def label_bits(features: ArrayLike, labels: ArrayLike, *, strength: float = 0.1, seed: int = 0) -> Floats:
    """Bits that each row's label costs, in the rows' order; log2 of the number of classes for the first block.

    Args:
        features: (row, channel).
        labels: (row,) classes.
        strength: C of the logistic regression, on features standardised over the rows that it was trained on.
        seed: Of the order in which rows are sent.

    Raises:
        ValueError: lengths differ, a value is not finite, or there is one class only.

    >>> x = np.random.default_rng(0).normal(size=(640, 2))
    >>> told, silent = label_bits(x, x[:, 0] > 0), label_bits(x[:, 1:], x[:, 0] > 0)
    >>> bool(told.mean() < 0.5), round(float(silent.mean()), 1)
    (True, 1.0)
    """
    x, classes = np.asarray(features, np.float64), np.asarray(labels)
    names, y = np.unique(classes, return_inverse=True)
    if len(x) != len(y) or not np.isfinite(x).all() or len(names) < 2:
        raise ValueError(
            f"Codelengths need finite features, a label each and two classes; got {len(x)} rows, {len(y)} labels, {len(names)} classes."
        )
    order = np.random.default_rng(seed).permutation(len(y))
    ends = sorted({max(1, round(share * len(y))) for share in SHARES})
    bits = np.full(len(y), np.log2(len(names)))
    for start, end in itertools.pairwise(ends):
        train, test = order[:start], order[start:end]
        share = np.full((len(test), len(names)), 1 / len(names))
        if len(seen := pd.unique(y[train])) > 1:
            model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                told = model.fit(x[train], y[train]).predict_proba(x[test])
            doubt = len(names) / (len(train) + len(names))  # a class that was not seen yet can come
            share *= doubt
            share[:, np.sort(seen)] += (1 - doubt) * told
        bits[test] = -np.log2(share[np.arange(len(test)), y[test]])
    return bits
