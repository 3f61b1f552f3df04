"""The forward engine against the model's own calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffprobe.data.drawn import ShapesDataset
from diffprobe.encoders import load_encoder
from diffprobe.forward import Engine, Row, in_parts, rows_not_finite, to_pixels
from diffprobe.models import DiffusionModel
from diffprobe.noise import sample_noise
from diffprobe.recorder import Recorder

SITE = "U-L1-R0-B0-Cross-Q"


def pixels_of(model: Any, count: int) -> list[np.ndarray]:
    height, width = model.size
    return [to_pixels(ShapesDataset(count)[row].load(), (height, width), "crop") for row in range(count)]


def alone(model: DiffusionModel, pixels: np.ndarray, name: str, prompt: str | None, timestep: int) -> torch.Tensor:
    latent = model.encode_image(torch.from_numpy(pixels[None]))
    noised = model.add_noise(latent, sample_noise(7, name, timestep, 0, latent.shape[1:])[None], torch.tensor([timestep]))
    with Recorder(model, SITE, stop_early=True) as recorder:
        model.denoise(noised, torch.tensor([timestep]), model.encode_text([prompt]))
    return recorder.last[SITE]


def test_rows_give_what_the_models_own_calls_give(tiny_model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    images, ids, prompts = pixels_of(tiny_model, 2), ["a", "b", "a"], ["a red star", None, "a blue circle"]
    encoded, encode = [], tiny_model.encode_image
    monkeypatch.setattr(tiny_model, "encode_image", lambda part, *rest: encoded.append(len(part)) or encode(part, *rest))
    engine = Engine(tiny_model, seed=7, batch_rows=2)
    with Recorder(tiny_model, SITE, stop_early=True, keep_steps=False, reuse=True) as recorder:
        latents = engine.encode_images(images, ["a", "b"])
        rows = [Row("ab".index(name), prompt, 50) for name, prompt in zip(ids, prompts, strict=True)]
        found = torch.cat([batch.tensors[SITE] for batch in engine.run(recorder, latents, ["a", "b"], rows)])
    assert sum(encoded) == 2, "an image that two prompts share is encoded once"
    monkeypatch.undo()
    for row, (name, prompt) in enumerate(zip(ids, prompts, strict=True)):
        expected = alone(tiny_model, images["ab".index(name)], name, prompt, 50)
        torch.testing.assert_close(found[row : row + 1], expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found[0], found[2]), "prompts differ"
    assert engine.cut == set()
    engine.encode_prompts(["star " * 500])
    assert engine.cut == {"star " * 500}


def test_a_batch_holds_its_noise_and_the_prediction(tiny_model: DiffusionModel) -> None:
    engine = Engine(tiny_model, seed=7, batch_rows=4)
    latents = engine.encode_images(pixels_of(tiny_model, 1), ["a"])
    rows = [Row(0, "a red star", timestep, draw) for timestep in (50, 500) for draw in (0, 1)]
    with Recorder(tiny_model, SITE, keep_steps=False) as recorder:
        (batch,) = engine.run(recorder, latents, ["a"], rows)
    assert batch.noise is not None and batch.prediction is not None and batch.timesteps.tolist() == [50, 50, 500, 500]
    for row, (_, _, timestep, draw) in enumerate(rows):
        assert torch.equal(batch.noise[row], sample_noise(7, "a", timestep, draw, latents.shape[1:]))
    text = tiny_model.encode_text(["a red star"]).take([0] * 4)
    assert torch.equal(batch.prediction, tiny_model.denoise(batch.inputs, batch.timesteps, text))


def test_what_does_not_fit_is_halved_and_stays_smaller(tiny_model: DiffusionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    engine = Engine(tiny_model, seed=7, batch_rows=8, log=told.append)
    latents = engine.encode_images(pixels_of(tiny_model, 1), ["a"])
    rows = [Row(0, None, timestep) for timestep in range(0, 900, 100)]
    sizes, denoise = [], tiny_model.denoise

    def small(noised: torch.Tensor, *rest: Any) -> Any:
        if len(noised) > 3:
            raise torch.OutOfMemoryError("out of memory")
        sizes.append(len(noised))
        return denoise(noised, *rest)

    with Recorder(tiny_model, SITE, keep_steps=False, reuse=True) as recorder:
        whole = torch.cat([batch.tensors[SITE] for batch in engine.run(recorder, latents, ["a"], rows)])
        monkeypatch.setattr(tiny_model, "denoise", small)
        batches = list(engine.run(recorder, latents, ["a"], rows))
    assert [len(batch.rows) for batch in batches] == [5, 2, 2] and sizes == [2, 2, 1, 2, 2] and engine.batch_rows == 2
    assert told == ["A batch of 5 did not fit into memory; going on with 2."]
    torch.testing.assert_close(torch.cat([batch.tensors[SITE] for batch in batches]), whole, atol=1e-5, rtol=1e-4)
    assert all(batch.prediction is not None and len(batch.prediction) == len(batch.rows) for batch in batches)


def test_one_row_that_does_not_fit_is_an_error() -> None:
    def run(part: slice) -> None:
        raise torch.OutOfMemoryError("out of memory")

    sizes: list[tuple[int, int]] = []
    with pytest.raises(torch.OutOfMemoryError):
        in_parts(run, 5, 4, lambda *pair: sizes.append(pair))
    assert sizes == [(4, 2), (2, 1)]


def test_a_vision_encoder_takes_the_same_calls() -> None:
    tiny_encoder = load_encoder("shapes-clip", "cpu")
    images = pixels_of(tiny_encoder, 3)
    with tiny_encoder.recorder(["last"]) as recorder:
        engine = Engine(tiny_encoder, batch_rows=2)
        latents = engine.encode_images(images, ["a", "b", "c"])
        rows = [Row(image, None, 0) for image in range(3)]
        found = torch.cat([batch.tensors["last"] for batch in engine.run(recorder, latents, ["a", "b", "c"], rows)])
    with tiny_encoder.recorder(["last"]) as recorder:
        tiny_encoder.forward(tiny_encoder.encode_image(torch.from_numpy(np.stack(images))))
    torch.testing.assert_close(found, recorder.last["last"], atol=1e-5, rtol=1e-4)


def test_rows_are_finite_in_the_stores_numbers() -> None:
    tensors = {"a": torch.tensor([[1.0, 2.0], [1e6, 0.0], [3.0, float("nan")]]), "b": torch.ones(3, 1, 1)}
    assert rows_not_finite(tensors, torch.float16).tolist() == [False, True, True]
    assert rows_not_finite(tensors, torch.float32).tolist() == [False, False, True]


def test_pixels_of_an_image_run_from_minus_one_to_one() -> None:
    image = Image.fromarray(np.array([[[0, 255, 51]]], np.uint8))
    np.testing.assert_allclose(to_pixels(image, (1, 1), "crop")[:, 0, 0], [-1, 1, -0.6], atol=1e-6)
