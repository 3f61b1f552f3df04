"""The embedded models are there and work like any others; their recipes train, stop and go on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffprobe.data import ShapesDataset, shapes
from diffprobe.models import DiffusionModel, load_model
from diffprobe.sites import PAPER_SITES, select_sites
from diffprobe.zoo import WEIGHTS, embedded, locate, recipe


@pytest.fixture(scope="module")
def shapes_sd() -> DiffusionModel:
    return load_model("shapes-sd", "cpu")


def test_shapes_sd_has_the_six_sites_and_no_special_case(shapes_sd: DiffusionModel) -> None:
    assert [s.name for s in select_sites(shapes_sd.sites, "paper")] == sorted(
        PAPER_SITES, key=[s.name for s in shapes_sd.sites].index
    )
    assert shapes_sd.prediction_type == "epsilon"
    assert shapes_sd.resolution == 96
    by_folder = load_model(WEIGHTS / "shapes-sd", "cpu")
    assert by_folder.weights_hash() == shapes_sd.weights_hash()


def test_each_model_has_a_folder_and_a_card() -> None:
    assert [name for name, _, _ in embedded()] == ["shapes-clip", "shapes-lm", "shapes-sd"]
    for name, folder, _ in embedded():
        assert locate(name) == folder
        assert (folder / "README.md").read_text().startswith(f"# {name}\n")
        assert list(folder.glob("*_loss.csv")), name
    with pytest.raises(ValueError, match=r"'shapes-clop'; it has shapes-clip, .* Did you mean 'shapes-clip'"):
        locate("shapes-clop")


def test_they_are_small_and_say_nothing_of_where_it_was_made() -> None:
    assert sum(size for _, _, size in embedded()) < 40e6
    for path in WEIGHTS.rglob("*.json"):
        assert "name_or_path" not in path.read_text(), path
    assert not [p for p in WEIGHTS.rglob("*") if p.suffix in (".bin", ".pt", ".ckpt", ".pkl")], "safetensors only"


def test_it_was_really_trained(shapes_sd: DiffusionModel) -> None:
    """Its noise error is well below that of predicting zero (1), and where noise hides the image the true caption helps."""
    dataset = ShapesDataset(32, split="test", n_objects=1)
    pixels = torch.from_numpy(np.stack([recipe.drawn(dataset.scene(i)) for i in range(32)]))
    latents = shapes_sd.encode_image(pixels)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.full((32,), 600)
    noised = shapes_sd.add_noise(latents, noise, timesteps)
    own = [dataset[i].captions[0].text for i in range(32)]
    errors = []
    for prompts in (own, own[1:] + own[:1]):
        predicted = shapes_sd.denoise(noised, timesteps, shapes_sd.encode_text(prompts))
        assert predicted is not None
        errors.append((predicted - noise).square().mean((1, 2, 3)))
    assert float(errors[0].mean()) < 0.1
    assert float(errors[0].mean()) < float(errors[1].mean())


def test_the_vae_gives_drawings_back(shapes_sd: DiffusionModel) -> None:
    pixels = torch.from_numpy(np.stack([recipe.drawn(shapes.random_scene(0, i, "test")) for i in range(8)]))
    with torch.no_grad():
        vae = shapes_sd.pipeline.vae
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    psnr = 10 * torch.log10(4 / (decoded - pixels).square().mean((1, 2, 3)))
    assert float(psnr.mean()) > 22


def test_the_tokenizer_pads_as_stable_diffusion_2_does_and_loses_nothing() -> None:
    tokenizer = recipe.build_tokenizer(recipe.Config())
    ids = recipe.tokenize(tokenizer, ["a red star", "Überraschung, 雪!"])
    assert ids.shape == (2, 77)
    assert tokenizer.pad_token_id == 0
    assert tokenizer.convert_ids_to_tokens(0) == "!"
    assert tokenizer.decode(ids[0], skip_special_tokens=True).replace("!", "").split() == ["a", "red", "star"]
    assert "雪" in tokenizer.decode(tokenizer("雪").input_ids, skip_special_tokens=True)


@pytest.mark.slow
def test_training_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe.Config(
        vae_steps=4, vae_batch=2, text_steps=4, text_batch=4, unet_steps=4, unet_batch=2, scenes=6, save_every=2
    )
    for folder, stops in ((tmp_path / "whole", ()), (tmp_path / "cut", (2,))):
        for stage in ("vae", "text", "unet"):
            for steps in stops:
                with monkeypatch.context() as cut:  # stop as a kill after the checkpoint would, schedule unchanged
                    cut.setattr(recipe.Progress, "save", stop_after(steps, recipe.Progress.save))
                    with pytest.raises(KeyboardInterrupt):
                        recipe.STAGES[stage](config, folder)
            recipe.STAGES[stage](config, folder)
    for stage in ("vae", "text", "unet"):
        whole, cut_off = (torch.load(tmp_path / f / f"{stage}.pt", weights_only=True) for f in ("whole", "cut"))
        assert whole["step"] == cut_off["step"] == 4
        for part in whole:
            if part in ("vae", "tower", "model", "average"):
                for name, tensor in whole[part].items():
                    torch.testing.assert_close(cut_off[part][name], tensor, msg=f"{stage} {name}")
    assert load_model(tmp_path / "cut" / "shapes-sd", "cpu").resolution == 96
    assert recipe.learning_rate_share(900, 1000, 0.2) == 0.5
    assert replace(config, seed=1) != config


def stop_after(steps: int, save: object) -> object:
    def saved(progress: recipe.Progress) -> None:
        save(progress)  # type: ignore[operator]
        if progress.step == steps:
            raise KeyboardInterrupt

    return saved
