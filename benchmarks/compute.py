"""Probes, caption scores and the training of a projector against the plain loops that one would write instead.

Each comparison first checks that both sides do the same thing.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xarray as xr
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from benchmarks.measure import Row, alternate, detail_of, row_of
from diffprobe import fit_probe
from diffprobe.mllm.captions import cider_d, document_frequencies
from diffprobe.mllm.config import TrainConfig
from diffprobe.mllm.language import load_language_model
from diffprobe.mllm.train import Captioned, batch_of, train_projector

if TYPE_CHECKING:
    from benchmarks.run import Setting

PENALTIES = (0.1, 1.0, 10.0, 100.0, 1000.0)


def planted(samples: int, channels: int) -> tuple[xr.DataArray, np.ndarray]:
    """Features (sample, timestep, conditioning, channel) from which four classes can be read, less and less over time."""
    rng = np.random.default_rng(0)
    classes = np.arange(samples) % 4
    centres = rng.normal(size=(4, channels))
    values = rng.normal(size=(samples, 5, 2, channels)) * np.linspace(2, 8, 5)[:, None, None] + centres[classes][:, None, None]
    return xr.DataArray(values.astype(np.float32), dims=("sample", "timestep", "conditioning", "channel")), classes


def plain_probes(features: np.ndarray, classes: np.ndarray) -> list[float]:
    """Scikit-learn by hand: standardise, choose a penalty on validation, fit again with it, test; 3/5, 1/5, 1/5."""
    order = np.random.default_rng(0).permutation(len(classes))
    train, validation, test = np.split(order, [3 * len(order) // 5, 4 * len(order) // 5])
    scores = []
    for timestep, conditioning in itertools.product(range(features.shape[1]), range(features.shape[2])):
        values = features[:, timestep, conditioning]

        def fitted(rows: np.ndarray, penalty: float, values: np.ndarray = values) -> tuple[StandardScaler, LogisticRegression]:
            scaler = StandardScaler().fit(values[rows])
            return scaler, LogisticRegression(C=1 / penalty, tol=1e-6, max_iter=2000).fit(
                scaler.transform(values[rows]), classes[rows]
            )

        def accuracy(probe: tuple[StandardScaler, LogisticRegression], rows: np.ndarray, values: np.ndarray = values) -> float:
            return float(probe[1].score(probe[0].transform(values[rows]), classes[rows]))

        best = max(PENALTIES, key=lambda penalty: accuracy(fitted(train, penalty), validation))
        scores.append(accuracy(fitted(np.concatenate([train, validation]), best), test))
    return scores


def probe_grid(setting: Setting) -> Iterator[Row]:
    """Ten probes of 128 channels with five penalties each, without control and with it; one process, one thread team."""
    features, classes = planted(200 if setting.smoke else 1000, 16 if setting.smoke else 128)
    values = features.values

    def ours(control: bool) -> np.ndarray:
        return fit_probe(features, classes, penalties=PENALTIES, control=control, n_jobs=1).table["value"].to_numpy()

    apart = abs(np.mean(plain_probes(values, classes)) - ours(False).mean())
    if apart > 0.15:
        raise AssertionError(f"The two loops' mean accuracies are {apart:.2f} apart.")
    for control in (False, True):
        times = alternate(lambda: plain_probes(values, classes), lambda control=control: ours(control), setting.repeats)
        what = f"fit_probe {'with its control' if control else 'without control'} / plain scikit-learn loop, seconds, 10 probes"
        yield row_of("probes", what, [b / a for a, b in times], "", f"{detail_of(times)}; mean accuracies apart by {apart:.3f}")


def caption_scores(setting: Setting) -> Iterator[Row]:
    """CIDEr-D against pycocoevalcap's, document frequencies included; the numbers are equal to 1e-9."""
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError:
        yield Row("captions", "cider_d / pycocoevalcap", detail="not installed: pip install pycocoevalcap")
        return
    rng, words = np.random.default_rng(0), np.array([f"w{number}" for number in range(400)])
    count = 50 if setting.smoke else 2000
    texts = [[" ".join(rng.choice(words, rng.integers(5, 15))) for _ in range(6)] for _ in range(count)]
    outputs, references = [row[0] for row in texts], [row[1:] for row in texts]

    def theirs() -> np.ndarray:
        return np.asarray(Cider().compute_score(dict(enumerate(references)), {i: [text] for i, text in enumerate(outputs)})[1])

    def ours() -> np.ndarray:
        return cider_d(outputs, references, document_frequencies("itself", references))

    np.testing.assert_allclose(ours(), theirs(), atol=1e-9)
    times = alternate(theirs, ours, setting.repeats)
    yield row_of("captions", f"cider_d / pycocoevalcap's Cider, seconds, {count} captions x 5 references", [b / a for a, b in times], "",
                 detail_of(times))  # fmt: skip


CAPTION = "a small red star left of a large blue circle"


def training(setting: Setting) -> Iterator[Row]:
    """`train_projector` against the loop that one would write with transformers: the same batches, model, loss and optimizer."""
    language = load_language_model("shapes-lm", setting.subject.model.device)
    config = TrainConfig(steps=4 if setting.smoke else 40, batch=8 if setting.smoke else 32, evaluate_every=10**6, patience=0)
    torch.manual_seed(0)
    features = torch.randn(8 * config.batch, 36, 96)
    data, dev = Captioned(features, [CAPTION] * len(features)), Captioned(features[:1], [CAPTION])
    before, after = language.prompt(config.request)
    answer = language.answer(CAPTION)
    ids = {
        name: torch.tensor(numbers, device=language.device)
        for name, numbers in (("before", before), ("after", after), ("answer", answer))
    }
    last: dict[str, float] = {}

    def plain() -> None:
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(96, language.width), nn.GELU(), nn.Linear(language.width, language.width)).to(
            language.device
        )
        optimizer = torch.optim.AdamW(layers.parameters(), lr=config.learning_rate, weight_decay=0.0)
        mean, std = features.mean((0, 1)), features.std((0, 1))
        known = {name: language.embeddings(numbers)[None] for name, numbers in ids.items()}
        for step in range(config.steps):
            chosen, _ = batch_of(step, len(features), config)
            soft = layers(((features[chosen] - mean) / std).to(language.device))
            parts: Any = [known["before"], soft, known["after"], known["answer"]]
            embeddings = torch.cat([part.expand(config.batch, -1, -1) for part in parts], 1)
            logits = language.model(inputs_embeds=embeddings, logits_to_keep=len(answer) + 1, use_cache=False).logits
            loss = nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids["answer"].repeat(config.batch))
            loss.backward()
            nn.utils.clip_grad_norm_(layers.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        last["plain"] = float(loss.detach())

    def ours() -> None:
        shutil.rmtree(setting.folder / "projector", ignore_errors=True)
        lines: list[str] = []
        train_projector(language, data, dev, setting.folder / "projector", config, log=lines.append)
        last["ours"] = float(lines[-1].split("dev ")[1].split()[0])

    with torch.enable_grad():
        times = alternate(plain, ours, setting.repeats)
    tokens = config.steps * config.batch * (len(before) + features.shape[1] + len(after) + len(answer))
    speeds = [sorted(tokens / seconds for seconds in column)[len(times) // 2] for column in zip(*times, strict=True)]
    detail = (
        f"{speeds[1]:.0f} tokens/s against {speeds[0]:.0f} tokens/s; last losses {last['ours']:.3f} and {last['plain']:.3f}"
    )
    yield row_of("training", "train_projector / plain transformers loop, seconds", [b / a for a, b in times], "<= 1.10", detail)
