"""Timesteps, noise levels, and noise that belongs to the sample.

Noise is a pure function of (seed, sample id, timestep, draw), made on the CPU in float32.  No batch size, order,
number of processes or restart changes it; that is what makes two extractions comparable.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def noise_seed(seed: int, sample_id: str, timestep: int, draw: int = 0) -> int:
    """The 63-bit seed of one noise tensor.

    >>> noise_seed(0, "cat.png", 50) == noise_seed(0, "cat.png", 50)
    True
    >>> noise_seed(0, "cat.png", 50) == noise_seed(0, "cat.png", 100)
    False
    """
    digest = hashlib.sha256(f"{seed}\0{sample_id}\0{timestep}\0{draw}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def sample_noise(seed: int, sample_id: str, timestep: int, draw: int, shape: Sequence[int]) -> Float[Tensor, "channel y x"]:
    """Standard normal noise of one sample at one timestep, float32 on the CPU.

    >>> sample_noise(0, "cat.png", 50, 0, (4, 8, 8)).shape
    torch.Size([4, 8, 8])
    """
    generator = torch.Generator("cpu").manual_seed(noise_seed(seed, sample_id, timestep, draw))
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)


@dataclass(frozen=True)
class Levels:
    """The noise at every training timestep: x_t = signal x_0 + spread e.

    Attributes:
        flow: a straight line, signal = 1 - s and spread = s at the timestep 1000 s; else a variance-preserving schedule, sqrt(a) and
            sqrt(1 - a).
    """

    signal: Float[Tensor, " step"]
    spread: Float[Tensor, " step"]
    flow: bool

    @classmethod
    def of_alphas(cls, alphas_cumprod: Float[Tensor, " train_step"]) -> Levels:
        alphas = alphas_cumprod.float().cpu()
        return cls(alphas.sqrt(), (1 - alphas).sqrt(), False)

    @classmethod
    def of_flow(cls, steps: int = 1000) -> Levels:
        """Flow matching; the last of the timesteps 0..steps is pure noise.

        >>> Levels.of_flow().sigma(250), round(Levels.of_flow().log_snr(250), 3)
        (0.25, 2.197)
        """
        share = (torch.arange(steps + 1, dtype=torch.float64) / steps).float()
        return cls(1 - share, share, True)

    def sigma(self, timestep: int) -> float:
        """As the family's own schedulers count: s of a flow, else noise over signal; inf for pure noise."""
        signal, spread = float(self.signal[timestep]), float(self.spread[timestep])
        return spread if self.flow else spread / signal if signal > 0 else math.inf

    def log_snr(self, timestep: int) -> float:
        """The natural logarithm of signal over noise, in power: the same scale for every family."""
        return _log_ratio(float(self.signal[timestep]), float(self.spread[timestep]))

    def nearest(self, *, sigma: float | None = None, log_snr: float | None = None) -> int:
        """The training timestep whose noise is nearest to a sigma, or to a logarithm of the signal-to-noise ratio.

        Raises:
            ValueError: the noise levels of this schedule do not reach so far.

        >>> Levels.of_flow().nearest(log_snr=0.0), Levels.of_flow().nearest(sigma=0.3)
        (500, 300)
        """
        asked = f"sigma {sigma:g}" if log_snr is None else f"log-SNR {log_snr:g}"
        if log_snr is None:
            assert sigma is not None
            signal = 1 - sigma if self.flow else 1.0
            log_snr = math.nan if min(signal, sigma) < 0 else _log_ratio(signal, sigma)
        there = [self.log_snr(timestep) for timestep in range(len(self.signal))]
        if log_snr in there:
            return there.index(log_snr)
        near = [abs(value - log_snr) for value in there]
        best = min(range(len(near)), key=near.__getitem__)
        known = [value for value in there if math.isfinite(value)]
        # Half of the last step may be missing at either end.
        if not known[-1] - (known[-2] - known[-1]) <= log_snr <= known[0] + (known[0] - known[1]):
            of = self.sigma if "sigma" in asked else self.log_snr
            low, high = sorted((of(0), of(len(there) - 1)))
            raise ValueError(f"No timestep of this model has the {asked}; its noise levels reach from {low:.4g} to {high:.4g}.")
        return best


def _log_ratio(signal: float, spread: float) -> float:
    """Signal over noise in power, as a natural logarithm."""
    return -math.inf if signal == 0 else math.inf if spread == 0 else 2 * math.log(signal / spread)
