"""Words on a recorder: against attention in float64, from the network's own queries and keys, while its pipeline samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import zoom

from diffprobe.models import DiffusionModel
from diffprobe.plotting import overlay, save_gif
from diffprobe.recorder import Recorder
from diffprobe.words import find_word, spelled
from tests.conftest import clip_encoder, clip_tokenizer, t5_tokenizer

PROMPTS = ["a red star on a blue star", "a circle on the left"]


def build_sd3() -> Any:
    """A Stable Diffusion 3 whose text is the 77 tokens of CLIP and, behind them, those of T5."""
    import diffusers
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    tokenizer, other, t5 = clip_tokenizer("<|endoftext|>"), clip_tokenizer("!"), t5_tokenizer()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32, pos_embed_max_size=16,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8),
        layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=16, shift_factor=0.0,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if name.endswith(("to_q.weight", "to_k.weight", "add_q_proj.weight", "add_k_proj.weight")):
                parameter.mul_(4)
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), tokenizer=tokenizer,
        tokenizer_2=other, tokenizer_3=t5, text_encoder=clip_encoder(tokenizer, True), text_encoder_2=clip_encoder(other, True),
        text_encoder_3=T5EncoderModel(T5Config(vocab_size=len(t5), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()  # T5 has dropout
    return pipeline


@contextmanager
def attention_in_float64(found: list[np.ndarray]) -> Iterator[None]:
    """Notes the probabilities (row, head, query, key) of every attention call, by the formula."""
    real = torch.nn.functional.scaled_dot_product_attention

    def noting(query: Any, key: Any, value: Any, attn_mask: Any = None, **more: Any) -> Any:
        scores = query.double() @ key.double().mT * query.shape[-1] ** -0.5
        if attn_mask is not None:
            scores = scores + attn_mask
        found.append(scores.softmax(-1).detach().numpy())
        return real(query, key, value, attn_mask=attn_mask, **more)

    torch.nn.functional.scaled_dot_product_attention = noting
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = real


def sample(pipeline: Any, prompts: list[str] | str = PROMPTS, **more: Any) -> None:
    options = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "latent", "height": 16, "width": 16} | more
    pipeline(prompts, generator=torch.Generator().manual_seed(0), **options)


def expected(calls: list[np.ndarray], tokens: list[int], length: int, row: int, joint: bool) -> np.ndarray:
    """The mean over passes, sites, heads and tokens of a word's map, every map brought to the finest grid."""
    maps, finest = [], max(math.isqrt(found.shape[2]) for found in calls if found.shape[2] in (16, 64)) if not joint else 4
    for found in calls:
        queries = found.shape[2] - length if joint else found.shape[2]
        if found.shape[3] != length + joint * queries or found.shape[2] in (77, 120, 256):
            continue  # a self-attention, or a text encoder
        side = math.isqrt(queries)
        picked = found[row, :, :queries, [joint * queries + token for token in tokens]]  # (token, head, place)
        one = picked.mean((0, 1)).reshape(side, side)
        maps.append(zoom(one, finest / side, order=1, mode="nearest", grid_mode=True))
    return np.mean(maps, 0)


@pytest.mark.parametrize("keep", [True, "mean"])
@pytest.mark.parametrize("family", ["sd1", "pixart", "sd3"])
def test_a_words_map_is_the_mean_of_float64_maps(fresh_pipeline: Callable[..., Any], family: str, keep: Any) -> None:
    joint = family == "sd3"
    pipeline = build_sd3() if joint else fresh_pipeline(family)
    more = {"use_resolution_binning": False} if family == "pixart" else {}
    calls: list[np.ndarray] = []
    with attention_in_float64(calls):  # a run of its own, without a recorder
        sample(pipeline, **more)
    with Recorder(pipeline, maps="joint" if joint else "cross", heads="all", keep_steps=keep) as recorder:
        sample(pipeline, **more)
    # "star" is two tokens: behind the start token of CLIP, and where T5 has none
    clip, t5 = {0: [3, 4], 1: [8, 9]}, {0: [2, 3], 1: [7, 8]}
    length = {"sd1": 77, "pixart": 120, "sd3": 77 + 256}[family]
    for occurrence in (0, 1):
        places = {
            "sd1": clip[occurrence],
            "pixart": t5[occurrence],
            "sd3": [*clip[occurrence], *(77 + p for p in t5[occurrence])],
        }
        truth = expected(calls, places[family], length, 2, joint)
        found = recorder.attention("star", occurrence=occurrence)
        assert found.attrs["tokens"] == places[family] and found.attrs["occurrence"] == f"{occurrence + 1} of 2"
        np.testing.assert_allclose(found.values, truth, atol=2e-6 if keep is True else 4e-6)
        assert found.dims == ("y", "x") and found.name == "star" and truth.std() > 1e-5
    truth = expected(calls, {"sd1": [2], "pixart": [1], "sd3": [2, 77 + 1]}[family], length, 3, joint)
    np.testing.assert_allclose(recorder.attention("circle", image=1).values, truth, atol=4e-6)
    with pytest.raises(ValueError, match=r"does not have the word 'starr'; it has a, red, star.* Did you mean 'star'"):
        recorder.attention("starr")
    with pytest.raises(ValueError, match="Image 2 was asked for, where there are 2"):
        recorder.attention("star", image=2)


def test_steps_can_be_one_several_or_all(fresh_pipeline: Callable[..., Any]) -> None:
    pipeline = fresh_pipeline("sd2")
    with Recorder(pipeline, maps="cross") as recorder:
        sample(pipeline, num_images_per_prompt=2)
    every = recorder.attention("circle", image=3, steps=range(len(recorder.steps)))  # the second image of the second prompt
    assert every.dims == ("step", "y", "x") and every["timestep"].values[0] > every["timestep"].values[-1]
    np.testing.assert_allclose(every.mean("step").values, recorder.attention("circle", image=3).values, atol=1e-7)
    np.testing.assert_array_equal(every.values[-1], recorder.attention("circle", image=3, steps=-1).values)
    assert recorder.attention("circle", image=3, size=(16, 12)).shape == (16, 12)
    with pytest.raises(ValueError, match=r"Steps 9 were asked for, where \d were kept"):
        recorder.attention("circle", image=3, steps=9)
    with pytest.raises(ValueError, match="does not have the word 'circle'"):
        recorder.attention("circle", image=1)
    one = recorder.attention("star", site="U-L1-R1-B0-Cross-Map")
    assert one.attrs["sites"] == "U-L1-R1-B0-Cross-Map" and one.shape == recorder["U-L1-R1-B0-Cross-Map"].shape[-2:]


def test_a_second_prompt_is_heard_anew_and_hooks_go(fresh_pipeline: Callable[..., Any]) -> None:
    pipeline = fresh_pipeline("sdxl")
    with Recorder(pipeline, maps="cross") as recorder:
        sample(pipeline, "a red circle")
        first = len(recorder.steps)
        sample(pipeline, "a blue star")
    assert recorder.attention("red", steps=0).attrs["prompt"].strip() == "a red circle"
    assert recorder.attention("blue", steps=first).attrs["prompt"].strip() == "a blue star"
    with pytest.raises(ValueError, match="does not have the word 'red'"):
        recorder.attention("red")
    for part in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.unet):
        assert not any(len(module._forward_pre_hooks) for module in part.modules())


def test_prompts_that_were_encoded_before(tiny: Callable[[str], DiffusionModel]) -> None:
    model = tiny("sd1")
    text = model.encode_text([None, "a red star"])
    noised = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with Recorder(model, maps="cross") as recorder:
        model.denoise(noised, torch.tensor([50, 50]), text)
    with pytest.raises(ValueError, match="not heard: let the pipeline encode its prompt inside"):
        recorder.attention("star", image=1)
    found = recorder.attention("star", image=1, text=text, site="U-L1-R1-B0-Cross-Map")
    np.testing.assert_allclose(found.values, recorder["U-L1-R1-B0-Cross-Map"][1, 0, [3, 4]].mean(0).numpy(), atol=1e-7)
    with pytest.raises(ValueError, match="does not have the word 'star'; it has no words"):
        recorder.attention("star", image=0, text=text)
    with Recorder(model, "M-Out") as other:
        model.denoise(noised, torch.tensor([50, 50]), text)
    with pytest.raises(ValueError, match="No maps of words were recorded"):
        other.attention("star")


def test_a_running_mean_takes_the_memory_of_one_pass(fresh_pipeline: Callable[..., Any]) -> None:
    means, steps = [], []
    for keep, out in ((True, steps), ("mean", means)):
        pipeline = fresh_pipeline("sd2")
        with Recorder(pipeline, "M-Out", maps="self", keep_steps=keep) as recorder:
            sample(pipeline)
        out.append(recorder)
    (mean,) = means[0].steps
    assert mean.passes == len(steps[0].steps) > 1 and mean.timesteps == ()
    for name, tensor in mean.tensors.items():
        truth = np.mean([step.tensors[name].double().numpy() for step in steps[0].steps], 0)
        np.testing.assert_allclose(tensor.numpy(), truth, rtol=1e-5, atol=1e-6)


def test_all_that_was_kept_as_xarray(fresh_pipeline: Callable[..., Any]) -> None:
    pipeline = fresh_pipeline("sd1")
    with Recorder(pipeline, ["M-Out", "M-R0-B0-Cross-K"], maps="M-*-Map") as recorder:
        sample(pipeline)
    tree = recorder.to_xarray()
    maps = tree["M-R0-B0-Cross-Map"]["maps"]
    assert (
        maps.dims == ("step", "row", "head", "token", "y", "x")
        and maps["row"].values.tolist() == ["negative"] * 2 + ["prompt"] * 2
    )
    assert tree["M-R0-B0-Cross-K"]["features"].dims == ("step", "row", "channel", "token")
    features = tree["M-Out"]["features"]
    assert features.dims == ("step", "row", "channel", "y", "x")
    for number, step in enumerate(recorder.steps):
        np.testing.assert_array_equal(features.values[number], step.tensors["M-Out"].numpy())
        assert features["timestep"].values[number] == step.timesteps[0]


def test_words_are_found_in_what_was_tokenised() -> None:
    tokenizer = clip_tokenizer("<|endoftext|>")
    text, spans = spelled(tokenizer, tokenizer("A red STAR, on a star")["input_ids"])
    assert find_word(text, "Star", spans, 0)[1] == 2
    first, second = (find_word(text, "star", spans, n)[0] for n in (0, 1))
    assert first == [3, 4] and len(second) == 2 and second > first
    with pytest.raises(ValueError, match=r"2 time\(s\); occurrence 2"):
        find_word(text, "star", spans, 2)


def test_an_overlay_and_an_animation(tmp_path: Path) -> None:
    image, heat = Image.new("RGB", (40, 20), (200, 0, 0)), np.zeros((2, 4))
    heat[0, 3] = 1
    laid = overlay(image, heat)
    pixels = np.asarray(laid, int)
    assert laid.size == (40, 20) and (pixels[-1, 0] == np.asarray(image.convert("L"))[0, 0]).all()
    assert np.abs(pixels[0, -1] - pixels[-1, 0]).max() > 50, "the highest place is coloured"
    path = save_gif(tmp_path / "a.gif", [laid, image, laid], seconds=0.5)
    with Image.open(path) as found:
        assert (found.format, found.n_frames, found.info["duration"]) == ("GIF", 3, 500)
    with pytest.raises(ValueError, match="at least one image"):
        save_gif(tmp_path / "b.gif", [])
