"""Each family's network is given what the family's own pipeline gives it; text tokens, noise and latents are its own too.

The oracle samples: the pipeline encodes the prompts, takes the same latents and its own scheduler, and its network's arguments are
caught by a hook.  One step of its scheduler to no noise is the predicted image.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from diffprobe.conditioning import word_tokens
from diffprobe.data import load_dataset
from diffprobe.extraction import extract
from diffprobe.families import FAMILIES, pack
from diffprobe.forward import to_pixels
from diffprobe.models import DiffusionModel
from diffprobe.noise import sample_noise
from diffprobe.recorder import Recorder
from diffprobe.rundir import RequestError
from diffprobe.store import attention_maps, open_store, provenance, word_sites
from tests.pipelines import DIFFUSIONS, FLOWS, family_pipeline

PROMPTS = ["a red star", "the circle on a red star"]
EVERY = (*FLOWS, *DIFFUSIONS)


def model_of(name: str) -> DiffusionModel:
    return DiffusionModel(family_pipeline(name), name)


def pictures(model: DiffusionModel, count: int = 2) -> Tensor:
    unit = 32 if model.family == "sana" else max(16, 2 * model.granularity)
    return torch.rand(count, 3, unit, 2 * unit, generator=torch.Generator().manual_seed(3)) * 2 - 1


class Caught(Exception):
    """Ends a sampling run at its first pass."""


def sampled(model: DiffusionModel, latents: Tensor, share: float, prompts: list[str]) -> tuple[dict[str, Any], Any]:
    """What the pipeline gives its network in one step without guidance, and the latents that the step leads to."""
    import inspect

    pipeline, given = model.pipeline, dict[str, Any]()
    takes = inspect.signature(type(pipeline).__call__).parameters
    forward = inspect.signature(model.network.forward)
    hook = model.network.register_forward_pre_hook(
        lambda module, args, kwargs: given.update(forward.bind(*args, **kwargs).arguments), with_kwargs=True
    )
    height, width = (side * model.vae_factor for side in latents.shape[-2:])
    asked: dict[str, Any] = {
        "prompt": list(prompts), "latents": pack(model.kind, latents), "height": height, "width": width, "num_inference_steps": 1,
        "output_type": "latent", "use_resolution_binning": False,
    }  # fmt: skip
    if "sigmas" in takes and model.kind.flow:
        asked["sigmas"] = np.array([share], np.float32)
    if model.family == "cogview4":
        asked["timesteps"] = [1000 * share]
    if not model.kind.guided and takes["guidance_scale"].default is not None:
        asked["guidance_scale"] = 0.0
    if "true_cfg_scale" in takes:
        asked["true_cfg_scale"] = 1.0
    try:
        with torch.no_grad():
            found = pipeline(**{name: value for name, value in asked.items() if name in takes})
    finally:
        hook.remove()
    return {n: v for n, v in given.items() if n != "return_dict" and v is not None}, found.images


def equal(ours: Any, theirs: Any) -> bool:
    if isinstance(theirs, Tensor):
        return isinstance(ours, Tensor) and ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(theirs, list | tuple):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[n], theirs[n]) for n in theirs)
    return bool(ours == theirs)


@pytest.mark.parametrize("name", EVERY)
def test_the_network_is_given_what_the_pipeline_gives_it(name: str) -> None:
    model = model_of(name)
    latents = model.encode_image(pictures(model))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(4))
    share, steps = 0.618, torch.tensor([618, 618])
    if not model.kind.flow:
        model.pipeline.scheduler.set_timesteps(1)
        steps = torch.full((2,), int(model.pipeline.scheduler.timesteps[0]))
    noised = model.add_noise(latents, noise, steps)
    theirs, image = sampled(model, noised, share, PROMPTS)
    before = dict(vars(model.pipeline))
    text = model.encode_text(PROMPTS)
    ours = model.given(noised, steps, text)
    assert vars(model.pipeline) == before, "the pipeline is left as it was"
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if key == "timestep" and not model.kind.flow:
            assert ours[key].tolist() == torch.as_tensor(value).expand(2).tolist()
        else:
            assert equal(ours[key], value), key
    predicted = model.denoise(noised, steps, text)
    assert predicted is not None and predicted.shape == noised.shape and predicted.abs().max() > 0
    if model.kind.flow:
        again = (noised.double() - 0.618 * predicted.double()) / (1 - 0.618)
        if name == "flux2-klein":  # gives latents of its image encoder
            bn = model.pipeline.vae.bn
            again = again * (bn.running_var + 1e-4).sqrt().view(-1, 1, 1).double() + bn.running_mean.view(-1, 1, 1).double()
            again = torch.nn.functional.pixel_shuffle(again, 2)
        packed = again.flatten(2).mT if name == "flux2" else pack(model.kind, again)
        torch.testing.assert_close(packed, image.double().reshape(packed.shape), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_rows_of_a_batch_have_their_own_noise_and_prompt(name: str) -> None:
    model = model_of(name)
    latents = model.encode_image(pictures(model))
    texts = [model.encode_text([prompt]) for prompt in (PROMPTS[0], " on ".join(PROMPTS * 2))]
    steps = torch.tensor([250, 618])
    together = texts[0].together(texts) == 2
    assert together == (name != "cogview4"), "its prompts have lengths of their own, and no mask"
    alone = [model.denoise(latents[row : row + 1], steps[row : row + 1], texts[row]) for row in (0, 1)]
    if together:
        both = model.denoise(latents, steps, texts[0].concatenate(texts))
        assert both is not None
        for row, one in enumerate(alone):
            assert one is not None
            torch.testing.assert_close(both[row], one[0], atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", FLOWS)
def test_a_velocity_of_known_noise_gives_noise_and_image_back(name: str) -> None:
    model = model_of(name)
    generator = torch.Generator().manual_seed(5)
    image, noise = (torch.randn(3, 4, 2, 2, generator=generator) for _ in range(2))
    steps = torch.tensor([100, 500, 900])
    noised = model.add_noise(image, noise, steps)
    share = (steps.double() / 1000).view(-1, 1, 1, 1)
    velocity = model.kind.sign * (noise - image)
    found = model.noise_in(velocity, noised, steps).double()
    torch.testing.assert_close(found, noise.double(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((noised.double() - share * found) / (1 - share), image.double(), atol=1e-4, rtol=1e-4)


def test_latents_are_those_of_the_image_pipelines() -> None:
    """Flux, Qwen-Image and Flux.2 against the encoders of their pipelines that take an image; the others' config is followed."""
    flux, qwen, klein = (model_of(name) for name in ("flux", "qwen-image", "flux2-klein"))
    images = pictures(flux)
    parts = {**flux.pipeline.components}
    theirs = diffusers.FluxImg2ImgPipeline(**parts)
    torch.manual_seed(0)
    spread = flux.pipeline.vae.encode(images).latent_dist
    flux.pipeline.vae.encode(images)
    mean = (spread.mean - 0.1) * 0.36
    torch.testing.assert_close(flux.encode_image(images), mean)
    drawn = flux.encode_image(images, "sample", [torch.Generator().manual_seed(seed) for seed in (1, 2)])
    wanted = theirs._encode_vae_image(images, [torch.Generator().manual_seed(seed) for seed in (1, 2)])
    torch.testing.assert_close(drawn, wanted)
    theirs = diffusers.QwenImageImg2ImgPipeline(**qwen.pipeline.components)
    wanted = theirs._encode_vae_image(images[:, :, None], [torch.Generator().manual_seed(seed) for seed in (1, 2)])
    drawn = qwen.encode_image(images, "sample", [torch.Generator().manual_seed(seed) for seed in (1, 2)])
    torch.testing.assert_close(drawn, wanted[:, :, 0])
    assert torch.equal(klein.encode_image(images), klein.pipeline._encode_vae_image(images, torch.Generator()))
    assert (klein.vae_factor, klein.latent_channels) == (4, 16)


@pytest.mark.parametrize("name", EVERY)
def test_the_unconditional_input_is_the_pipelines(name: str) -> None:
    model = model_of(name)
    if model.kind.null is None:
        with pytest.raises(ValueError, match=f"{name} has no unconditional input: guidance was distilled into its network"):
            model.encode_text([None])
        return
    text = model.encode_text(["a red star", None])
    if model.kind.null == "negative":
        from diffprobe.families import encode_prompts

        negative = {"negative_prompt": [""]} if name == "kolors" else {}
        takes = {
            "prompt": ["a red star"],
            "device": model.device,
            "num_images_per_prompt": 1,
            "do_classifier_free_guidance": True,
            **negative,
        }
        if name == "sd3":
            takes |= {"prompt_2": None, "prompt_3": None}
        if name == "z-image":
            del takes["num_images_per_prompt"]
        found = dict(zip(model.kind.returns, model.pipeline.encode_prompt(**takes), strict=True))
        wanted = found["negative_prompt_embeds"]
        wanted = wanted[0][None] if isinstance(wanted, list) else wanted
        assert torch.equal(text.embeddings[1:, : wanted.shape[1]], wanted)
        assert encode_prompts(model.kind, model.pipeline, [""], model.device, True)["prompt_embeds"].shape == wanted.shape
    assert not text.spans[1].any() and text.spans[0].any()


@pytest.mark.parametrize("name", EVERY)
def test_words_stand_where_the_encoders_put_them(name: str) -> None:
    """NaN in a text encoder's real output, at the tokens that spell a word, comes out where the spans say."""
    model = model_of(name)
    text = model.encode_text(PROMPTS)
    assert torch.equal(model.tokens(PROMPTS)[0], text.ids) and torch.equal(model.tokens(PROMPTS)[1], text.spans)
    marked = torch.zeros(text.ids.shape, dtype=torch.bool)
    for number, suffix in enumerate(("", "_2", "_3")):
        encoder, tokenizer = (getattr(model.pipeline, part + suffix, None) for part in ("text_encoder", "tokenizer"))
        if encoder is None or (name == "flux" and number == 0):  # Flux's CLIP gives a pooled vector alone
            continue

        def spoil(module: Any, args: Any, kwargs: Any, output: Any, tokenizer: Any = tokenizer) -> Any:
            ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
            tokens = [tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()]
            here = torch.zeros(ids.shape, dtype=torch.bool)
            for row, spelled in enumerate(tokens):
                plain = [token.replace("</w>", "").strip("▁Ġ#") for token in spelled]
                found = [at for at in range(len(plain) - 1) if plain[at : at + 2] == ["st", "ar"]]
                here[row, found[-1] : found[-1] + 2] = True
            for key, value in list(output.items()):
                if isinstance(value, Tensor) and value.shape[:2] == ids.shape:
                    output[key] = value.masked_fill(here[..., None], torch.nan)
                elif isinstance(value, tuple):  # Kolors' encoder puts tokens before rows
                    at = here.T if value[0].shape[:2] == ids.T.shape else here
                    output[key] = tuple(layer.masked_fill(at[..., None], torch.nan) for layer in value)
            return output

        handle = encoder.register_forward_hook(spoil, with_kwargs=True)
        try:
            spoiled = model.encode_text(PROMPTS)
        finally:
            handle.remove()
        parts = [spoiled.embeddings, *(part for part in spoiled.more.values() if part.ndim == 3)]
        marked |= torch.cat([part.isnan().any(2) for part in parts], 1)
    for row, prompt in enumerate(PROMPTS):
        wanted = marked[row].nonzero().flatten().tolist()
        assert word_tokens(prompt, "star", text.spans[row].tolist()) == wanted and len(wanted) >= 2
        assert word_tokens(prompt, "blue", text.spans[row].tolist()) == []
        lengths = model.tokens(PROMPTS)[2]
        assert wanted[-1] < lengths[row] <= model.prompt_tokens
    encoders = {"sd3": 2, "hunyuan-dit": 2}.get(name, 1)
    assert len(wanted) == 2 * encoders


def test_a_prompt_that_one_encoder_takes_whole_is_not_cut() -> None:
    model = model_of("sd3")
    long = " ".join(["red"] * 100)
    text = model.encode_text([long, " ".join(["red"] * 300)])
    assert text.truncated == (False, True)
    assert model.tokens([long])[2][0] == 77 + 101


def test_guidance_that_is_an_input_is_given_and_named() -> None:
    pipeline = family_pipeline("flux")
    usual, low = DiffusionModel(pipeline), DiffusionModel(pipeline, guidance=1.5)
    assert (usual.guidance, low.guidance) == (3.5, 1.5)
    noised, steps = torch.zeros(1, 4, 4, 4), torch.tensor([500])
    text = usual.encode_text(["a red star"])
    assert usual.given(noised, steps, text)["guidance"].tolist() == [3.5]
    assert low.given(noised, steps, text)["guidance"].tolist() == [1.5]
    with pytest.raises(ValueError, match="sd3 takes no guidance as an input of its network"):
        DiffusionModel(family_pipeline("sd3"), "sd3", guidance=2.0)
    assert DiffusionModel(family_pipeline("lcm")).guidance == 8.5


@pytest.mark.parametrize("name", ["flux", "qwen-image", "sd3", "z-image", "sana", "hunyuan-dit"])
def test_a_recorder_sees_the_pass_and_the_predicted_noise(name: str) -> None:
    model = model_of(name)
    latents, steps, text = model.encode_image(pictures(model)), torch.tensor([250, 618]), model.encode_text(PROMPTS)
    with Recorder(
        model,
        "T-B1-Out,Noise,S-B1-Out" if name == "flux" else "[TS]-B1-Out,Noise",
        maps="T-B1-*-Map,S-B1-*-Map" if name == "flux" else "[TS]-B1-*-Map",
    ) as recorder:
        noise = model.denoise(latents, steps, text)
    assert noise is not None and len(recorder.steps) == 1
    packed = pack(model.kind, noise)
    found = recorder["Noise"]
    torch.testing.assert_close(found.flatten(2).mT if packed.ndim == 3 else found, packed)
    with Recorder(model, "[TS]-B0-Out", stop_early=True):
        assert model.denoise(latents, steps, text) is None


def test_every_family_has_a_test() -> None:
    tested = {model_of(name).family for name in EVERY} | {"sd", "sdxl", "pixart"}
    assert tested == {family.name for family in FAMILIES.values()}


# --- into a store ---------------------------------------------------------------------------------

DATA = "shapes:3?split=test"


@pytest.mark.parametrize("name", ["flux", "qwen-image", "sd3", "kolors"])
def test_a_store_of_a_family(name: str, tmp_path: Path) -> None:
    """Noise levels are coordinates, and the map of a word is that of a pass with this sample's own noise."""
    model, out, data = model_of(name), tmp_path / "s.zarr", load_dataset(DATA)
    asked: dict[str, Any] = {
        "sites": "blocks",
        "maps": "words",
        "conditionings": ["caption"],
        "resolution": 32,
        "progress": False,
    }
    extract(model, data, out, log_snr=[2.0, 0.0], **asked)
    assert extract(model, data, out, log_snr=[2.0, 0.0], **asked).complete == 3
    tree = open_store(out)
    levels = tree[word_sites(tree)[0]]
    steps = levels["timestep"].values.tolist()
    for step, sigma, ratio, wanted in zip(steps, levels["sigma"].values, levels["log_snr"].values, (2.0, 0.0), strict=True):
        assert abs(ratio - wanted) < 0.02 and sigma == model.levels.sigma(step) and ratio == model.levels.log_snr(step)
    assert provenance(tree)["log_snr"] == dict(zip(steps, levels["log_snr"].values.tolist(), strict=True))
    assert steps == [model.levels.nearest(log_snr=2.0), model.levels.nearest(log_snr=0.0)]
    request = provenance(tree)["request"]
    assert request.get("network_guidance") == (3.5 if name == "flux" else None)
    if name == "flux":
        with pytest.raises(RequestError, match=r"network_guidance: the store has 3\.5, you ask for 1\.0"):
            extract(DiffusionModel(model.pipeline, name, guidance=1.0), data, out, timesteps=steps, **asked)
    captions = [sample.captions[0].text for sample in data]
    lengths = model.tokens(captions)[2]
    sample = lengths.index(min(lengths))
    latents = model.encode_image(torch.from_numpy(to_pixels(data[sample].load(), (32, 32), "crop"))[None])
    noise = sample_noise(0, data[sample].id, steps[1], 0, latents.shape[1:])[None]
    at = torch.tensor([steps[1]])
    text = model.encode_text([captions[sample]])
    site = word_sites(tree)[0]
    tokens = word_tokens(captions[sample], "a", text.spans[0].tolist())
    with Recorder(model, maps=site, tokens=tokens) as recorder:
        model.denoise(model.add_noise(latents, noise, at), at, text)
    found = attention_maps(tree, "a", site=site, timestep=steps[1]).sel(sample=data[sample].id)
    wanted_map = recorder[site][0, 0].mean(0).numpy()
    np.testing.assert_allclose(found.values.squeeze(), wanted_map, atol=1e-3)
    if name == "qwen-image" and max(lengths) > min(lengths):  # prompts keep their own lengths
        maps = tree[site].to_dataset()["maps"].isel(sample=sample, timestep=1, conditioning=0)
        assert maps.sizes["token"] == max(lengths) and not maps[:, min(lengths) :].values.any()


def test_what_a_family_cannot_do_is_said(tmp_path: Path) -> None:
    model, out = model_of("flux"), tmp_path / "s.zarr"
    with pytest.raises(ValueError, match="flux has no unconditional input: guidance was distilled"):
        extract(model, DATA, out, sites="blocks", resolution=32, progress=False)
    with pytest.raises(ValueError, match=r"'paper' names places of a UNet, so it is not applicable.*T-B1-Out"):
        extract(model, DATA, out, conditionings=["caption"], resolution=32, progress=False)
    with pytest.raises(ValueError, match="Give one of timesteps, sigmas and log-SNR"):
        extract(model, DATA, out, timesteps=[10], log_snr=[0.0])
    with pytest.raises(ValueError, match="Two of these noise levels mean the same timestep of flux: 500, 500"):
        extract(model, DATA, out, log_snr=[0.0, 0.001], conditionings=["caption"])
    with pytest.raises(ValueError, match="sides must be multiples of 4; try 32x32"):
        extract(model, DATA, out, sites="blocks", conditionings=["caption"], resolution=31, progress=False)
    assert not out.exists()
