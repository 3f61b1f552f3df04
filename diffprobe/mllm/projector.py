"""The projector of LLaVA: image features become soft tokens of a language model.

Arrays run over (sample, token, channel).  Features are standardised per channel first, by moments fixed from the training
features (UNet features have channels with massive values), so the projector learns from every channel.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffprobe.rundir import file_digest, whole_file, write_json

KINDS = ("linear", "mlp2x_gelu")
CONFIG, WEIGHTS = "config.json", "projector.safetensors"


class Projector(nn.Module):
    """Standardised features into a language model's embedding width.

    Args:
        width: width of the language model's token embeddings.
        kind: "linear", or "mlp2x_gelu" (Linear-GELU-Linear, LLaVA-1.5).
        rms: root mean square of the language model's token embeddings, which the outputs begin with.

    >>> Projector(96, 128)(torch.zeros(2, 36, 96)).shape
    torch.Size([2, 36, 128])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int, width: int, kind: str = "mlp2x_gelu", rms: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"Projector {kind!r} is not one of {', '.join(KINDS)}.")
        self.channels, self.width, self.kind = channels, width, kind
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        sizes = [(channels, width)] if kind == "linear" else [(channels, width), (width, width)]
        layers: list[nn.Module] = []
        generator = torch.Generator("cpu").manual_seed(seed)
        for inputs, outputs in sizes:
            layer = nn.Linear(inputs, outputs)
            with torch.no_grad():  # variance is kept through the layers, GELU's loss of power made up for
                gain = 1.0 if not layers else 1.5
                layer.weight.copy_(torch.randn(outputs, inputs, generator=generator) * gain / inputs**0.5)
                layer.bias.zero_()
            layers += [nn.GELU(), layer] if layers else [layer]
        with torch.no_grad():
            layer.weight.mul_(rms)
        self.layers = nn.Sequential(*layers)

    def standardise(self, features: Float[Tensor, "sample token channel"]) -> None:
        """Fix the moments; a channel that never changes gives zero."""
        flat = features.reshape(-1, self.channels).double()
        mean, std = flat.mean(0), flat.std(0, correction=0)
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6 * mean.abs().clamp(min=1e-6), std, torch.inf))

    def standardised(self, features: Float[Tensor, "sample token channel"]) -> Float[Tensor, "sample token channel"]:
        """Features less their means, over their deviations."""
        if features.shape[-1] != self.channels:
            raise ValueError(f"This projector takes {self.channels} channels; the features have {features.shape[-1]}.")
        return (features.float() - self.mean) / self.std

    def forward(self, features: Float[Tensor, "sample token channel"]) -> Float[Tensor, "sample token width"]:
        projected: Tensor = self.layers(self.standardised(features))
        return projected

    def save(self, folder: str | Path) -> None:
        """Write ``projector.safetensors``, and its shape and checksum as ``config.json``."""
        shape = {"channels": self.channels, "width": self.width, "kind": self.kind}
        with whole_file(Path(folder) / WEIGHTS) as beside:  # takes its place last, because it means "finished"
            save_file(self.state_dict(), beside)
            write_json(Path(folder) / CONFIG, {**shape, "sha256": file_digest(beside)})

    @classmethod
    def load(cls, folder: str | Path) -> Projector:
        """A saved projector; raises ValueError if there is none, or its weights are not those that were written."""
        config, weights = Path(folder) / CONFIG, Path(folder) / WEIGHTS
        if not weights.is_file() or not config.is_file():
            raise ValueError(f"{folder} holds no projector: {CONFIG} and {WEIGHTS} are needed.")
        kept = json.loads(config.read_text(encoding="utf-8"))
        digest = kept.pop("sha256", None)  # earlier versions kept none
        if digest and file_digest(weights) != digest:
            raise ValueError(
                f"{weights} is not what was written there (its checksum differs); remove its folder, and train again."
            )
        projector = cls(**kept)
        projector.load_state_dict(load_file(weights))
        return projector.eval()


def soft_tokens(features: Float[Tensor, "sample channel y x"], grid: int) -> Float[Tensor, "sample token channel"]:
    """Places as tokens, row by row, averaged to at most `grid` on a side.

    >>> soft_tokens(torch.zeros(2, 96, 12, 12), 6).shape, soft_tokens(torch.zeros(2, 96, 3, 4), 6).shape
    (torch.Size([2, 36, 96]), torch.Size([2, 12, 96]))
    """
    height, width = (min(grid, side) for side in features.shape[-2:])
    return nn.functional.adaptive_avg_pool2d(features.float(), (height, width)).flatten(2).transpose(1, 2)
