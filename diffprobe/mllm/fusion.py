"""Two streams of image features into the soft tokens of a language model.

A stream is an encoder's features on one token grid, (image, token, channel).  `Fusion` standardises each stream by moments
fixed from training features (UNet features have channels with massive values), joins them, and projects into the language
model's width:

- ``clip``, ``diffusion``: one stream alone;
- ``concat``: channels of both side by side, as many tokens as one stream has;
- ``sequence``: tokens of both, one stream after the other; ``interleave``: place by place in turn;
- ``cross_attention``: CLIP's tokens are the queries, diffusion's the keys and values; the output is added to CLIP's features
  through a gate that is zero at first, so training starts from CLIP alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from diffprobe.mllm.projector import Projector
from diffprobe.models import fresh_weights

CLIP, DIFFUSION = "clip", "diffusion"
FUSIONS: dict[str, tuple[str, ...]] = {
    CLIP: (CLIP,),
    DIFFUSION: (DIFFUSION,),
    "concat": (CLIP, DIFFUSION),
    "sequence": (CLIP, DIFFUSION),
    "interleave": (CLIP, DIFFUSION),
    "cross_attention": (CLIP, DIFFUSION),
}
TWICE = ("sequence", "interleave")  # as many tokens as both streams have
MERGES = ("mean", "stack")
# an optimizer that moves each weight by its learning rate would leave a plain gate shut for thousands of steps
GATE_SPEED = 10.0


def to_grid(
    features: Float[Tensor, "image channel y x"], grid: int, merge: str = "mean"
) -> Float[Tensor, "image token grid_channel"]:
    """Features on a grid of tokens, row by row.

    Places that share a token are averaged, or, with "stack", stand side by side in its channels, so that nothing is lost (the
    side is brought to the nearest multiple of the grid first).  A grid finer than the features is filled bilinearly.

    >>> to_grid(torch.zeros(2, 128, 12, 12), 6).shape, to_grid(torch.zeros(2, 128, 12, 12), 6, "stack").shape
    (torch.Size([2, 36, 128]), torch.Size([2, 36, 512]))
    >>> to_grid(torch.zeros(2, 96, 6, 6), 12, "stack").shape
    torch.Size([2, 144, 96])
    """
    if merge not in MERGES:
        raise ValueError(f"Places of a token are merged by one of {', '.join(MERGES)}; got {merge!r}.")
    features = features.float()
    height, width = ((max(1, round(side / grid)) if merge == "stack" else 1) * grid for side in features.shape[-2:])
    if (height, width) != tuple(features.shape[-2:]):
        if height <= features.shape[-2] and width <= features.shape[-1]:
            features = functional.adaptive_avg_pool2d(features, (height, width))
        else:
            features = functional.interpolate(features, (height, width), mode="bilinear", align_corners=False)
    tall, wide = height // grid, width // grid
    places = features.unflatten(-1, (grid, wide)).unflatten(-3, (grid, tall))  # (image, channel, row, tall, column, wide)
    return places.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


class CrossAttention(nn.Module):
    """Tokens of one stream attend to those of another; both lie on square grids over the same image.

    Each head begins by attending near its own place: a learnt multiple of the squared distance (in image sides) is subtracted
    from the scores.

    Args:
        channels: channels of both streams; the heads must divide them.
    """

    def __init__(self, channels: int, heads: int = 4, seed: int = 0) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"{heads} heads do not divide {channels} channels; choose a divisor.")
        self.heads = heads
        layers = fresh_weights(lambda: nn.ModuleList([nn.Linear(channels, channels) for _ in range(4)]), seed)
        assert isinstance(layers, nn.ModuleList)
        self.query, self.key, self.value, self.out = layers
        with torch.no_grad():
            for layer in (self.value, self.out):  # the output keeps the power of the values' features
                assert isinstance(layer, nn.Linear)
                layer.weight.mul_(3**0.5)
                layer.bias.zero_()
        self.sharpness = nn.Parameter(torch.linspace(2.0, 6.0, heads))  # from most of the image to one place of a 6 x 6 grid
        self.gate = nn.Parameter(torch.zeros(channels))

    def forward(
        self, queries: Float[Tensor, "image token channel"], context: Float[Tensor, "image other channel"]
    ) -> Float[Tensor, "image token channel"]:
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, x in ((self.query, queries), (self.key, context), (self.value, context))
        )
        distance = squared_distances(queries.shape[1], context.shape[1]).to(query)
        nearness = -self.sharpness.exp()[:, None, None] * distance
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=nearness.to(query.dtype)[None])
        return queries + GATE_SPEED * self.gate * self.out(mixed.transpose(1, 2).flatten(2))


def squared_distances(tokens: int, others: int) -> Float[Tensor, "token other"]:
    """Between the places of two square grids over one image, in image sides.

    >>> squared_distances(4, 1).flatten().round(decimals=3).tolist()
    [0.125, 0.125, 0.125, 0.125]

    Raises:
        ValueError: the tokens of one are no square grid.
    """
    points = []
    for count in (tokens, others):
        side = round(count**0.5)
        if side * side != count:
            raise ValueError(f"{count} tokens are no square grid.")
        line = (torch.arange(side) + 0.5) / side
        points.append(torch.cartesian_prod(line, line).view(-1, 2))
    return torch.cdist(points[0], points[1], compute_mode="donot_use_mm_for_euclid_dist").square()


class Fusion(nn.Module):
    """Standardise, join and project.

    Args:
        kind: one of `FUSIONS`.
        channels: number of channels by the name of the stream.
        width, rms: width and root mean square of the language model's token embeddings.

    >>> fusion = Fusion("interleave", {"clip": 512, "diffusion": 96}, 128)
    >>> fusion({"clip": torch.zeros(2, 36, 512), "diffusion": torch.zeros(2, 36, 96)}).shape
    torch.Size([2, 72, 128])
    """

    def __init__(
        self, kind: str, channels: Mapping[str, int], width: int, *, projector: str = "mlp2x_gelu", rms: float = 1.0,
        heads: int = 4, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if kind not in FUSIONS:
            raise ValueError(f"Fusion {kind!r} is not one of {', '.join(FUSIONS)}.")
        self.kind, self.streams = kind, FUSIONS[kind]
        if absent := [name for name in self.streams if name not in channels]:
            raise ValueError(f"Fusion {kind!r} needs the streams {', '.join(self.streams)}; {', '.join(absent)} is missing.")
        sizes = {name: channels[name] for name in self.streams}
        if kind == "concat":
            sizes = {"concat": sum(sizes.values())}
        widths = dict.fromkeys(sizes, width)
        if kind == "cross_attention":  # diffusion's tokens are brought to CLIP's own width
            widths[DIFFUSION] = sizes[CLIP]
            self.attention = CrossAttention(sizes[CLIP], heads, seed)
        self.projectors = nn.ModuleDict()
        for name, size in sizes.items():
            inner = kind == "cross_attention" and name == DIFFUSION
            self.projectors[name] = Projector(size, widths[name], "linear" if inner else projector, 1.0 if inner else rms, seed)

    def _inputs(self, streams: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if absent := [name for name in self.streams if name not in streams]:
            raise ValueError(f"Fusion {self.kind!r} was not given the stream {absent[0]}.")
        if self.kind == "concat":
            return {"concat": torch.cat([streams[name] for name in self.streams], -1)}
        return {name: streams[name] for name in self.streams}

    def standardise(self, streams: Mapping[str, Float[Tensor, "image token channel"]]) -> None:
        """Fix the moments of every stream from training features."""
        for name, features in self._inputs(streams).items():
            self._projector(name).standardise(features)

    @property
    def standardised(self) -> bool:
        """Whether the moments were fixed."""
        return any(bool((p.mean != 0).any() or (p.std != 1).any()) for p in map(self._projector, self.projectors))

    def _projector(self, name: str) -> Projector:
        found = self.projectors[name]
        assert isinstance(found, Projector)
        return found

    def forward(self, streams: Mapping[str, Float[Tensor, "image token channel"]]) -> Float[Tensor, "image soft width"]:
        inputs = self._inputs(streams)
        if self.kind == "cross_attention":
            clip = self._projector(CLIP)
            mixed = self.attention(clip.standardised(inputs[CLIP]), self._projector(DIFFUSION)(inputs[DIFFUSION]))
            soft: Tensor = clip.layers(mixed)
            return soft
        projected = [self._projector(name)(features) for name, features in inputs.items()]
        if self.kind == "interleave":
            return torch.stack(projected, 2).flatten(1, 2)
        return torch.cat(projected, 1)
