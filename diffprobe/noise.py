"""Timesteps, noise levels, and noise that belongs to the sample.

Noise is a pure function of (seed, sample id, timestep, draw), made on the CPU in float32.  No batch size, order,
number of processes or restart changes it; that is what makes two extractions comparable.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

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


def sigma(alphas_cumprod: Float[Tensor, " train_step"], timestep: int) -> float:
    """Noise over signal, sqrt((1 - a) / a), of a variance-preserving schedule at a training timestep; inf for pure noise.

    >>> round(sigma(torch.tensor([0.9, 0.5]), 1), 3)
    1.0
    """
    alpha = float(alphas_cumprod[timestep])
    return ((1 - alpha) / alpha) ** 0.5 if alpha > 0 else math.inf
