"""Fusions against plain loops; streams against the bare calls of the models, with and without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffprobe.data import ShapesDataset
from diffprobe.forward import to_pixels
from diffprobe.mllm.fusion import FUSIONS, GATE_SPEED, CrossAttention, Fusion, squared_distances, to_grid
from diffprobe.mllm.projector import Projector, soft_tokens
from diffprobe.mllm.streams import DiffusionEncoder, FeatureCache, Picture, Streams
from diffprobe.noise import sample_noise
from diffprobe.recorder import Recorder

SITE = "U-L1-R1-B0-Cross-Q"
IMAGES = [ShapesDataset(4)[k].load() for k in range(4)]
PICTURES = [Picture.of(image) for image in IMAGES]
QUESTIONS: list[str | None] = ["is there a red star?", None, "how many objects are there?", "is there a red star?"]


def tokens(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {"clip": 5 + 3 * torch.randn(3, 4, 8), "diffusion": torch.randn(3, 4, 6) * torch.tensor([1, 100, 1, 1, 1, 1.0])}


# --- grids ----------------------------------------------------------------------------------------


def test_stacked_places_lose_nothing_and_stay_in_place() -> None:
    features = torch.arange(2 * 3 * 4 * 6).float().view(2, 3, 4, 6)
    stacked = to_grid(features, 2, "stack")
    assert stacked.shape == (2, 4, 3 * 2 * 3)
    for row in range(2):
        for column in range(2):
            block = features[:, :, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
            assert torch.equal(stacked[:, 2 * row + column].view(2, 3, 2, 3), block)


def test_means_are_those_of_soft_tokens_and_a_finer_grid_is_filled() -> None:
    features = torch.randn(2, 3, 12, 12)
    assert torch.allclose(to_grid(features, 4), soft_tokens(features, 4))
    ramp = torch.linspace(0, 1, 3).view(1, 1, 1, 3).expand(1, 1, 3, 3)
    filled = to_grid(ramp, 6).view(6, 6)
    assert (filled.diff(dim=1) >= 0).all() and torch.allclose(filled[0], filled[-1])
    with pytest.raises(ValueError, match="one of mean, stack; got 'sum'"):
        to_grid(features, 4, "sum")


# --- fusions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FUSIONS)
def test_every_fusion_gives_tokens_of_the_language_models_size(kind: str) -> None:
    streams = tokens()
    fusion = Fusion(kind, {name: x.shape[-1] for name, x in streams.items()}, 16, rms=0.3)
    fusion.standardise(streams)
    soft = fusion(streams)
    assert soft.shape == (3, 8 if kind in ("sequence", "interleave") else 4, 16)
    assert 0.1 < float(soft.detach().square().mean().sqrt()) < 0.9
    soft.sum().backward()
    used = [name for name, p in fusion.named_parameters() if p.grad is None]
    assert used == []  # every part takes part, or processes that average gradients would wait for each other


def test_order_of_tokens() -> None:
    streams = tokens()
    sequence, interleave = (Fusion(kind, {"clip": 8, "diffusion": 6}, 16) for kind in ("sequence", "interleave"))
    one = {name: Projector(x.shape[-1], 16)(x) for name, x in streams.items()}
    assert torch.allclose(sequence(streams), torch.cat([one["clip"], one["diffusion"]], 1))
    assert torch.allclose(interleave(streams)[:, 0::2], one["clip"]) and torch.allclose(
        interleave(streams)[:, 1::2], one["diffusion"]
    )


def test_a_closed_gate_is_clip_alone() -> None:
    streams = tokens()
    alone, both = Fusion("clip", {"clip": 8}, 16), Fusion("cross_attention", {"clip": 8, "diffusion": 6}, 16)
    for fusion in (alone, both):
        fusion.standardise(streams)
    assert torch.equal(alone(streams), both(streams))
    torch.nn.init.ones_(both.attention.gate)
    assert not torch.allclose(alone(streams), both(streams))
    other = {**streams, "diffusion": streams["diffusion"] + 100}
    assert not torch.allclose(both(other), both(streams))


def test_cross_attention_equals_a_loop() -> None:
    attention = CrossAttention(8, heads=2)
    torch.nn.init.normal_(attention.gate)
    asking, answering = torch.randn(1, 9, 8), torch.randn(1, 4, 8)
    query, key, value = attention.query(asking)[0], attention.key(answering)[0], attention.value(answering)[0]
    places = [[((k // side + 0.5) / side, (k % side + 0.5) / side) for k in range(side**2)] for side in (3, 2)]
    expected = torch.zeros(9, 8)
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        for i, (y, x) in enumerate(places[0]):
            scores = torch.stack(
                [
                    query[i, part] @ key[j, part] / 2 - attention.sharpness[head].exp() * ((y - v) ** 2 + (x - u) ** 2)
                    for j, (v, u) in enumerate(places[1])
                ]
            )
            expected[i, part] = scores.softmax(0) @ value[:, part]
    assert torch.allclose(
        attention(asking, answering)[0], asking[0] + GATE_SPEED * attention.gate * attention.out(expected), atol=1e-5
    )
    with pytest.raises(ValueError, match="5 tokens are no square grid"):
        squared_distances(5, 4)
    with pytest.raises(ValueError, match="3 heads do not divide 8"):
        CrossAttention(8, heads=3)


def test_what_a_fusion_lacks_is_named() -> None:
    with pytest.raises(ValueError, match="'sum' is not one of clip, diffusion, concat"):
        Fusion("sum", {"clip": 8}, 16)
    with pytest.raises(ValueError, match="needs the streams clip, diffusion; diffusion is missing"):
        Fusion("concat", {"clip": 8}, 16)
    with pytest.raises(ValueError, match="was not given the stream diffusion"):
        Fusion("concat", {"clip": 8, "diffusion": 6}, 16)({"clip": torch.zeros(1, 4, 8)})


# --- streams --------------------------------------------------------------------------------------


class Counting:
    """An encoder that counts what it encodes."""

    def __init__(self, encoder: DiffusionEncoder) -> None:
        self.encoder, self.sites, self.seen = encoder, encoder.sites, list[tuple[str, str | None]]()

    def origin(self, site: str, portable: bool = False) -> dict[str, Any]:
        return self.encoder.origin(site)

    def encode(self, pictures: Sequence[Picture], prompts: Sequence[str | None]) -> dict[str, torch.Tensor]:
        self.seen += [(picture.id, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
        return self.encoder.encode(pictures, prompts)


def bare(model: Any, picture: Picture, prompt: str | None, timestep: int = 50) -> torch.Tensor:
    """Features of one picture by the model's own calls."""
    side = (model.resolution, model.resolution)
    latents = model.encode_image(torch.from_numpy(to_pixels(picture.load(), side, "pad")[None]))
    step = torch.tensor([timestep])
    noised = model.add_noise(latents, sample_noise(0, picture.id, timestep, 0, latents.shape[1:])[None], step)
    with Recorder(model, SITE) as recorder:
        model.denoise(noised, step, model.encode_text([prompt]))
    return recorder[SITE][0]


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_guided_features_are_those_of_single_passes(tiny_model: Any, scale: float) -> None:
    encoder = Counting(DiffusionEncoder(tiny_model, SITE))
    found = Streams({"diffusion": encoder}, 4, guidance=scale)(PICTURES, QUESTIONS)["diffusion"]
    for row, (picture, question) in enumerate(zip(PICTURES, QUESTIONS, strict=True)):
        null = bare(tiny_model, picture, None)
        expected = null + scale * (bare(tiny_model, picture, question) - null)
        assert torch.allclose(found[row], to_grid(expected[None], 4)[0], atol=1e-4)
    prompts = {prompt for _, prompt in encoder.seen}
    assert len(encoder.seen) == len(set(encoder.seen)) == {0.0: 4, 1.0: 4, 4.0: 7}[scale]
    assert prompts == ({None} if scale == 0 else set(QUESTIONS))


def test_several_sites_stand_side_by_side(tiny_model: Any) -> None:
    both = Streams({"diffusion": DiffusionEncoder(tiny_model, [SITE, "U-L2-R1-B0-Cross-Q"])}, 4)
    found = both(PICTURES[:1], [None])["diffusion"]
    alone = Streams({"diffusion": DiffusionEncoder(tiny_model, SITE)}, 4)(PICTURES[:1], [None])["diffusion"]
    assert both.channels() == {"diffusion": found.shape[-1]} and torch.allclose(found[..., : alone.shape[-1]], alone, atol=1e-5)


def test_the_cache_computes_each_pass_once(tiny_model: Any, tmp_path: Path) -> None:
    encoder = Counting(DiffusionEncoder(tiny_model, SITE))
    streams = Streams({"diffusion": encoder}, 4, guidance=4.0, cache=FeatureCache(tmp_path))
    done_of: list[tuple[int, int]] = []
    streams.prepare(PICTURES[:2], QUESTIONS[:2], lambda done, total: done_of.append((done, total)))
    assert done_of == [(3, 3)]
    live = Streams({"diffusion": DiffusionEncoder(tiny_model, SITE)}, 4, guidance=4.0)(PICTURES, QUESTIONS)["diffusion"]
    found = streams(PICTURES, QUESTIONS)["diffusion"]
    assert torch.allclose(found, live, rtol=0.01, atol=0.01)  # float16 apart
    assert len(encoder.seen) == len(set(encoder.seen)) == 7
    again = Streams({"diffusion": encoder}, 4, guidance=4.0, cache=FeatureCache(tmp_path))
    assert torch.equal(again(PICTURES, QUESTIONS)["diffusion"], found) and len(encoder.seen) == 7
    other = Counting(DiffusionEncoder(tiny_model, SITE, timestep=100))
    Streams({"diffusion": other}, 4, guidance=0.0, cache=FeatureCache(tmp_path))(PICTURES[:1], [None])
    assert len(other.seen) == 1 and len(list(tmp_path.iterdir())) == 2  # settings apart, folders apart


def test_the_cache_refuses_what_float16_cannot_hold(tiny_model: Any, tmp_path: Path) -> None:
    encoder = DiffusionEncoder(tiny_model, SITE)
    with pytest.raises(ValueError, match=f"{SITE} are not finite in float16"):
        FeatureCache(tmp_path).write(encoder, [("a", None)], {SITE: torch.full((1, 2, 2, 2), 1e6)})
    assert not list(tmp_path.rglob("*.safetensors"))
    with pytest.raises(ValueError, match="only where there is a cache"):
        Streams({"diffusion": encoder}, 4).prepare(PICTURES, QUESTIONS, lambda done, total: None)


def test_prompts_that_are_cut_are_counted(tiny_model: Any) -> None:
    encoder = DiffusionEncoder(tiny_model, SITE)
    long = "is there a red star? " * 20
    encoder.encode(PICTURES[:3], [long, "is there a red star?", long])
    assert encoder.engine.cut == {long}


def test_images_that_are_not_square_are_padded() -> None:
    wide = Image.new("RGB", (8, 4), (255, 0, 0))
    pixels = to_pixels(wide, (4, 4), "pad")[None]
    assert pixels.shape == (1, 3, 4, 4) and np.allclose(pixels[0, 0, 1:3], 1) and not np.allclose(pixels[0, 1, 0], -1)
