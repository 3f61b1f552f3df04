"""A sparse autoencoder of one site's tokens: TopK with AuxK (Gao et al. 2024, "Scaling and evaluating sparse autoencoders").

The k largest latents of a token make its reconstruction; latents that have been silent for long learn to make what is left
(AuxK, their appendix A.2).  Files are those of EleutherAI's sparsify: ``cfg.json`` and ``sae.safetensors`` with the tensors
encoder.weight (latent, channel), encoder.bias, W_dec (latent, channel) and b_dec.  The invariant: samples of the scores were
not trained on, and every score stands beside that of random directions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffprobe.data.files import parse_json
from diffprobe.rundir import whole_file, write_json
from diffprobe.stats import bootstrap_sums

_NEEDED = {"activation": "topk", "skip_connection": False, "transcode": False}  # of a file's settings, where it has them


@dataclass(frozen=True)
class SparseConfig:
    """The settings of sparsify's ``cfg.json`` that are used here, by its names."""

    d_in: int
    num_latents: int = 0
    expansion_factor: int = 32
    k: int = 32
    normalize_decoder: bool = True

    @property
    def latents(self) -> int:
        return self.num_latents or self.d_in * self.expansion_factor


class SparseCoder(nn.Module):
    """x' = W_dec^T top_k(relu(W_enc (x - b_dec) + b_enc)) + b_dec, of x (token, channel)."""

    def __init__(self, config: SparseConfig, seed: int = 0) -> None:
        super().__init__()
        if not 1 <= config.k <= config.latents:
            raise ValueError(f"k is {config.k}, of {config.latents} latents.")
        self.config = config
        self.encoder = nn.Linear(config.d_in, config.latents)
        directions = torch.randn(config.latents, config.d_in, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            self.encoder.weight.copy_(nn.functional.normalize(directions, dim=1))
            self.encoder.bias.zero_()
        self.W_dec = nn.Parameter(self.encoder.weight.detach().clone())
        self.b_dec = nn.Parameter(torch.zeros(config.d_in))

    def latents(self, x: Tensor) -> Tensor:
        """(token, latent), before the k largest are chosen."""
        return self.encoder(x - self.b_dec).relu()

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The k largest latents of each token and their numbers, both (token, k)."""
        values, numbers = self.latents(x).topk(self.config.k, dim=-1, sorted=False)
        return values, numbers

    def decode(self, values: Tensor, numbers: Tensor) -> Tensor:
        """(token, channel), without b_dec."""
        return nn.functional.embedding_bag(numbers, self.W_dec, per_sample_weights=values, mode="sum")

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(*self.encode(x)) + self.b_dec

    @torch.no_grad()
    def scale(self, by: float) -> None:
        """Makes the coder of x into that of `by` x; the same latents are chosen."""
        self.encoder.bias.mul_(by)
        self.b_dec.mul_(by)


def save_sae(coder: SparseCoder, folder: str | Path) -> None:
    """Writes ``cfg.json`` and ``sae.safetensors``, which sparsify's `SparseCoder.load_from_disk` reads."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in coder.state_dict().items()}
    with whole_file(Path(folder) / "sae.safetensors") as beside:
        save_file(tensors, beside)
    defaults = {"multi_topk": False, **_NEEDED}
    write_json(Path(folder) / "cfg.json", {**asdict(coder.config), **defaults})


def load_sae(folder: str | Path) -> SparseCoder:
    """Reads what `save_sae` or sparsify wrote.

    Raises:
        ValueError: a file is missing, or describes another kind of coder.
    """
    folder = Path(folder)
    for name in ("cfg.json", "sae.safetensors"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}; a sparse autoencoder is a folder of cfg.json and sae.safetensors.")
    told: Any = parse_json((folder / "cfg.json").read_text(encoding="utf-8"), str(folder / "cfg.json"))
    tensors = load_file(folder / "sae.safetensors")
    for name, value in _NEEDED.items():
        if told.get(name, value) != value:
            raise ValueError(f"{folder} is a coder with {name} {told[name]!r}; those with {value!r} are read here.")
    coder = SparseCoder(SparseConfig(**{name: told[name] for name in SparseConfig.__dataclass_fields__ if name in told}))
    try:
        coder.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"The tensors of {folder} do not have the shapes or names that its cfg.json says: {error}") from error
    return coder.float()


# --- training -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SparseTraining:
    """How a coder is trained; `dead_tokens` (0: one epoch) without a use make a latent dead, which AuxK then trains."""

    epochs: int = 10
    learning_rate: float = 1e-3
    auxiliary: float = 1 / 32
    dead_tokens: int = 0
    seed: int = 0


def train_sae(
    config: SparseConfig, stream: Any, settings: SparseTraining, device: str = "cpu", advance: Any = None
) -> SparseCoder:
    """Trains a coder on the batches of a stream with `set_epoch`, such as `diffprobe.torch.StoreStream` of tokens.

    Loss: |x - x'|^2 / variance + auxiliary |e - e'|^2 / |e|^2, with e = x - x' and e' its reconstruction by the d_in / 2 largest
    dead latents.  Decoder directions stay of unit length, and gradients along them are removed (appendix A.1).  Features are
    trained on at mean squared length d_in, and the coder is that of the features as they are.

    Args:
        stream: gives {"features": (token, channel)}.
        advance: is called after each epoch with 1.
    """
    mean, squared, count = torch.zeros(config.d_in, dtype=torch.float64), 0.0, 0
    for batch in stream:
        x = batch["features"].double()
        mean, squared, count = mean + x.sum(0), squared + float(x.square().sum()), count + len(x)
    if not count or squared == 0:
        raise ValueError("There are no tokens to train on, or all are zero.")
    length = (squared / count / config.d_in) ** 0.5
    coder = SparseCoder(config, settings.seed).to(device)
    with torch.no_grad():
        coder.b_dec.copy_(mean / count / length)
    variance = max(squared / count / length**2 - float((mean / count / length).square().sum()), 1e-12)
    optimiser = torch.optim.Adam(coder.parameters(), lr=settings.learning_rate, betas=(0.9, 0.999), eps=6.25e-10)
    silent = torch.zeros(config.latents, dtype=torch.int64, device=device)
    for epoch in range(settings.epochs):
        stream.set_epoch(epoch)
        for batch in stream:
            x = batch["features"].to(device).float() / length
            loss, used = loss_of(coder, x, silent >= (settings.dead_tokens or count), variance, settings.auxiliary)
            optimiser.zero_grad()
            loss.backward()
            with torch.no_grad():
                gradient: Any = coder.W_dec.grad
                gradient -= (gradient * coder.W_dec).sum(1, keepdim=True) * coder.W_dec
                optimiser.step()
                coder.W_dec.copy_(nn.functional.normalize(coder.W_dec, dim=1))
                silent += len(x)
                silent[used] = 0
        if advance:
            advance(1)
    coder.scale(length)
    return coder.cpu().eval()


def loss_of(coder: SparseCoder, x: Tensor, dead: Tensor, variance: float, auxiliary: float) -> tuple[Tensor, Tensor]:
    """The loss of tokens (token, channel) as `train_sae` describes it, and the latents that they use.

    Args:
        dead: (latent,), which latents are dead.
        variance: the mean squared distance of a token from the mean.
    """
    dense = coder.latents(x)
    values, numbers = dense.topk(coder.config.k, dim=-1, sorted=False)
    error = x - coder.decode(values, numbers) - coder.b_dec
    loss = error.square().sum(1).mean() / variance
    if number := int(dead.sum()):
        most = min(max(1, coder.config.d_in // 2), number)
        extra = coder.decode(*dense.masked_fill(~dead, -torch.inf).topk(most, dim=-1, sorted=False))
        left = error.detach()
        loss = loss + auxiliary * (left - extra).square().sum() / left.square().sum().clamp_min(1e-12)
    return loss, numbers[values > 0]


# --- scores ---------------------------------------------------------------------------------------


@torch.no_grad()
def random_directions(config: SparseConfig, x: Tensor, seed: int = 1) -> SparseCoder:
    """A coder of random unit directions with as many latents and the same k.

    Its encoder is its decoder, b_dec the mean of the tokens x, and one factor on all directions the best for them.
    """
    coder = SparseCoder(config, seed).eval()
    coder.b_dec.copy_(x.mean(0))
    made = torch.cat([coder(part) for part in x.split(4096)]) - coder.b_dec
    coder.W_dec.mul_((made * (x - coder.b_dec)).sum() / made.square().sum().clamp_min(1e-12))
    return coder


@torch.no_grad()
def score_sae(
    coders: dict[str, SparseCoder], batches: Iterable[dict[str, Tensor]], n_resamples: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """Scores of coders on the same tokens, each with a 95% interval over samples.

    - fvu: squared error over the variance of the tokens; 0 is perfect, 1 what their mean gives.
    - l0: latents of a token that are not zero.
    - dead: the share of latents that no token uses.  Its interval is the jackknife's, for a resample has fewer samples to
      use them.

    Args:
        coders: by name.
        batches: of "features" (token, channel) and "sample" (token,).

    Returns:
        One row a coder and score: coder, score, value, low, high, n (samples), tokens.
    """
    read = [(batch["features"].float(), batch["sample"]) for batch in batches]
    x, samples = torch.cat([one for one, _ in read]), torch.cat([one for _, one in read])
    ids, place = np.unique(samples.numpy(), return_inverse=True)
    sums = lambda values: np.bincount(place, np.asarray(values, np.float64), len(ids))  # noqa: E731
    spread, tokens = sums((x - x.mean(0)).square().sum(1)), np.bincount(place, minlength=len(ids)).astype(np.float64)
    rows = []
    for name, coder in coders.items():
        errors, active = [], []
        fires = np.zeros((len(ids), coder.config.latents), bool)
        for part, where in zip(x.split(4096), np.split(place, range(4096, len(place), 4096)), strict=True):
            values, numbers = coder.encode(part)
            errors.append((part - coder.decode(values, numbers) - coder.b_dec).square().sum(1))
            active.append((values > 0).sum(1))
            fires[np.repeat(where, coder.config.k)[(values > 0).flatten().numpy()], numbers[values > 0].numpy()] = True
        error, l0 = sums(torch.cat(errors)), sums(torch.cat(active))
        ratio = lambda s: s[:, 0] / s[:, 1]  # noqa: E731
        scored = {
            score: (top.sum() / below.sum(), *bootstrap_sums(np.c_[top, below], ratio, n_resamples=n_resamples, seed=seed))
            for score, top, below in (("fvu", error, spread), ("l0", l0, tokens))
        }
        rows += [
            {"coder": name, "score": score, "value": value, "low": low, "high": high, "n": len(ids), "tokens": len(x)}
            for score, (value, low, high) in (scored | {"dead": _dead(fires)}).items()
        ]
    return pd.DataFrame(rows)


def _dead(fires: NDArray[np.bool_]) -> tuple[float, float, float]:
    """The share of latents (column) that no sample (row) uses, and its jackknife interval."""
    samples, latents = fires.shape
    times = fires.sum(0)
    value = float((times == 0).mean())
    without = value + (fires & (times == 1)).sum(1) / latents  # of all samples but one
    error = float(np.sqrt((samples - 1) / samples * np.square(without - without.mean()).sum())) if samples > 1 else np.nan
    return value, max(0.0, value - 1.96 * error), min(1.0, value + 1.96 * error)


@torch.no_grad()
def latent_activations(
    coder: SparseCoder, batches: Iterable[dict[str, Tensor]], places: int
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """The chosen latents of whole samples: their numbers (sample,), and activations (sample, place, latent) with zeros."""
    for batch in batches:
        values, numbers = coder.encode(batch["features"].float())
        dense = torch.zeros(len(values), coder.config.latents).scatter_(1, numbers, values)
        yield batch["sample"][::places].numpy(), dense.unflatten(0, (-1, places)).numpy()
