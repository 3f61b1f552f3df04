"""Loading, encoding and one denoising step, each against the library's own pipeline, scheduler and tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from torch import Tensor, nn

import diffprobe.models
from diffprobe.conditioning import word_tokens
from diffprobe.families import FAMILIES, SUPPORTED
from diffprobe.models import (
    DiffusionModel,
    as_dtype,
    kept_name,
    load_model,
    load_network_config,
    predicted_noise,
    resolve,
)
from diffprobe.prompts import EncodedText

PROMPTS = ["a red star", "a blue circle on the left of a star", "Red, RED star!", ""]
LONG = "a red star on the left of " * 30
TIMESTEPS = torch.tensor([0, 10, 500, 999])


def images(count: int = 2, height: int = 16, width: int = 32) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def calls_of(module: nn.Module) -> tuple[list[dict[str, Any]], Any]:
    """Keyword arguments of every call from now on (positions as numbers), and the handle that ends it."""
    calls: list[dict[str, Any]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append({**kwargs, **{str(i): value for i, value in enumerate(args)}})

    return calls, module.register_forward_pre_hook(note, with_kwargs=True)


# --- loading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sd2", "sd2v", "sdxl", "pixart"])
def test_a_saved_folder_is_loaded_as_it_was(
    model_folder: Callable[[str], Path], tiny: Callable[[str], DiffusionModel], family: str
) -> None:
    folder = model_folder(family)
    loaded, built = load_model(folder, device="cpu"), tiny(family)
    assert loaded.family == {"sdxl": "sdxl", "pixart": "pixart"}.get(family, "sd")
    assert loaded.model_id == str(folder) and loaded.device.type == "cpu" and loaded.dtype == torch.float32
    assert loaded.weights_hash() == built.weights_hash() and loaded.resolution == 16
    assert not loaded.network.training
    text, noised = loaded.encode_text(PROMPTS), normal(4, 4, 8, 8)
    found = loaded.denoise(noised, TIMESTEPS, text)
    # Not bit for bit: weights read from a file are aligned differently, and kernels choose by alignment.
    torch.testing.assert_close(found, built.denoise(noised, TIMESTEPS, built.encode_text(PROMPTS)), atol=1e-4, rtol=1e-4)
    network, factor, tokens = load_network_config(folder)
    assert next(network.parameters()).is_meta and type(network) is type(built.network)
    assert (factor, tokens) == (built.vae_factor, built.prompt_tokens)


def test_weights_hash_sees_one_changed_parameter(fresh_pipeline: Callable[[str], Any]) -> None:
    model = DiffusionModel(fresh_pipeline("pixart"))
    before = model.weights_hash()
    assert before == DiffusionModel(fresh_pipeline("pixart")).weights_hash()
    model.network.proj_out.bias.add_(1e-3)
    assert model.weights_hash() != before


def test_half_precision_is_loaded_on_request(model_folder: Callable[[str], Path]) -> None:
    model = load_model(str(model_folder("sd2")), "cpu", "bfloat16")
    text = model.encode_text(["a red star"])
    assert model.dtype == text.embeddings.dtype == model.encode_image(images(1)).dtype == torch.bfloat16
    noise = model.denoise(model.encode_image(images(1)), torch.tensor([10]), text)
    assert noise is not None and noise.dtype == torch.bfloat16 and noise.isfinite().all()
    assert as_dtype("auto", torch.device("cpu")) == torch.float32
    assert as_dtype("auto", torch.device("cuda")) == torch.bfloat16
    with pytest.raises(ValueError, match="dtype 'float8' is not one of auto, bfloat16, float16, float32"):
        as_dtype("float8", torch.device("cpu"))


@pytest.mark.parametrize("kind", ["FluxFillPipeline", "DDPMPipeline", "StableDiffusionInpaintPipeline", "SanaSprintPipeline"])
def test_other_families_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind, "_diffusers_version": "0.35.0"}))
    for load in (load_model, load_network_config):
        with pytest.raises(ValueError, match=f"A {kind} is not supported") as error:
            load(tmp_path)
        for family in ("Stable Diffusion 1.x and 2.x", "Stable Diffusion XL", "PixArt-alpha and -sigma"):
            assert family in str(error.value)
    assert kind not in FAMILIES


def test_nothing_there_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text("{")
    for source in (
        tmp_path / "none",
        tmp_path / "empty",
        tmp_path / "broken",
        "nobody/no-such-model",
        "no-such-model",
        "a b:c",
    ):
        with pytest.raises(ValueError, match=r"No model at .*model_index\.json.*Embedded models"):
            load_model(source)


def test_embedded_names_are_folders_and_paths_stay_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("diffprobe.models.EMBEDDED", tmp_path)
    (tmp_path / "shapes-sd").mkdir()
    assert resolve("shapes-sd") == str(tmp_path / "shapes-sd")
    assert resolve("somebody/shapes-sd") == "somebody/shapes-sd" and resolve("") == "" and resolve(Path("x/y")) == "x/y"
    with pytest.raises(ValueError, match="Embedded models: shapes-sd"):
        load_model("shapes-sd")


def test_pickled_weights_are_refused_unless_asked(model_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(model_folder("sd2"), folder)
    unet = folder / "unet" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file

    torch.save(load_file(unet), unet.with_suffix(".bin"))
    unet.unlink()
    with pytest.raises(ValueError, match="could not be read"):
        load_model(folder, "cpu")
    loaded = load_model(folder, "cpu", use_safetensors=False)
    assert loaded.weights_hash() == load_model(model_folder("sd2"), "cpu").weights_hash()


def test_models_that_would_be_misread_are_refused(fresh_pipeline: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"tiny takes 9 latent channels where its VAE gives 4: an inpainting or editing model"):
        DiffusionModel(fresh_pipeline("sd2", in_channels=9), "tiny")
    pipeline = fresh_pipeline("sd2")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, prediction_type="sample")
    with pytest.raises(ValueError, match="predicts 'sample'; supported are epsilon and v_prediction"):
        DiffusionModel(pipeline)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler"):
        DiffusionModel(pipeline)
    refiner = fresh_pipeline("sdxl")
    refiner.register_to_config(requires_aesthetics_score=True)
    with pytest.raises(ValueError, match="refiner"):
        DiffusionModel(refiner)
    with pytest.raises(ValueError, match="Prediction type 'sample' is not one of"):
        predicted_noise(normal(1, 4, 2, 2), normal(1, 4, 2, 2), torch.tensor([0]), torch.tensor([0.5]), "sample")
    assert "Stable Diffusion XL" in SUPPORTED


def test_sizes(tiny: Callable[[str], DiffusionModel]) -> None:
    assert (tiny("sd2").granularity, tiny("sdxl").granularity, tiny("pixart").granularity) == (16, 8, 4)
    assert tiny("sd2").latent_size(16, 48) == (8, 24)
    for height, width in ((16, 40), (0, 16), (-16, 16)):
        with pytest.raises(
            ValueError, match=f"Resolution {height}x{width} does not fit tiny-sd2: sides must be multiples of 16; try"
        ):
            tiny("sd2").latent_size(height, width)


def test_timesteps_outside_the_training_range_are_refused(tiny: Callable[[str], DiffusionModel]) -> None:
    tiny("sd2").check_timestep(0)
    tiny("sd2").check_timestep(999)
    for timestep in (-1, 1000):
        with pytest.raises(ValueError, match=rf"Timestep {timestep} is outside 0\.\.999"):
            tiny("sd2").check_timestep(timestep)


# --- images ---------------------------------------------------------------------------------------


def test_latents_follow_the_config(fresh_pipeline: Callable[[str], Any]) -> None:
    pipeline = fresh_pipeline("sd2")
    model, posterior = DiffusionModel(pipeline), pipeline.vae.encode(images()).latent_dist
    assert torch.equal(model.encode_image(images()), posterior.mean * 0.18215)
    pipeline.vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    torch.testing.assert_close(model.encode_image(images()), (posterior.mean - 0.25) * 0.5)
    centre, spread = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    pipeline.vae.register_to_config(scaling_factor=0.5, shift_factor=None, latents_mean=centre, latents_std=spread)
    wanted = (posterior.mean - torch.tensor(centre).view(1, 4, 1, 1)) * 0.5 / torch.tensor(spread).view(1, 4, 1, 1)
    torch.testing.assert_close(model.encode_image(images()), wanted)


def test_latent_rules(model: DiffusionModel) -> None:
    vae = model.pipeline.vae
    posterior = vae.encode(images()).latent_dist
    assert torch.equal(model.encode_image(images(), "mean"), posterior.mean * vae.config.scaling_factor)
    assert torch.equal(model.encode_image(images(), "mode"), posterior.mode() * vae.config.scaling_factor)

    def sampled(*seeds: int) -> Tensor:
        return model.encode_image(images(len(seeds)), "sample", [torch.Generator().manual_seed(seed) for seed in seeds])

    noise = torch.stack([normal(4, 8, 16, seed=seed) for seed in (3, 4)])
    torch.testing.assert_close(sampled(3, 4), (posterior.mean + posterior.std * noise) * vae.config.scaling_factor)
    torch.testing.assert_close(sampled(3), sampled(3, 4)[:1])  # an image's draw is its own
    assert not torch.equal(sampled(3), sampled(5))


def test_latent_rules_that_cannot_be(tiny: Callable[[str], DiffusionModel]) -> None:
    with pytest.raises(ValueError, match="'sample' needs one generator for each image"):
        tiny("sd2").encode_image(images(), "sample")
    unknown: Any = "median"
    with pytest.raises(Exception, match="median"):
        tiny("sd2").encode_image(images(), unknown)


def test_a_float16_encoder_that_overflows_runs_in_float32(fresh_pipeline: Callable[[str], Any]) -> None:
    model = DiffusionModel(fresh_pipeline("sdxl"))
    wanted = model.encode_image(images())
    model.pipeline.vae.encoder.conv_in.weight.mul_(3e5)  # activations beyond float16's 65504, which the norms take out again
    exact = model.encode_image(images())
    model.pipeline.vae.to(torch.float16)
    assert model.pipeline.vae.config.force_upcast
    torch.testing.assert_close(model.encode_image(images()), exact, atol=2e-2, rtol=2e-2)
    assert model.pipeline.vae.dtype == torch.float16 and wanted.shape == exact.shape
    model.pipeline.vae.register_to_config(force_upcast=False)
    assert not model.encode_image(images()).isfinite().all()


# --- text -----------------------------------------------------------------------------------------


def library_tokens(model: DiffusionModel, prompts: list[str]) -> tuple[Tensor, Tensor]:
    if model.family == "pixart":
        prompts = [prompt.lower().strip() for prompt in prompts]
    options = {"padding": "max_length", "truncation": True, "max_length": model.prompt_tokens}
    found = model.pipeline.tokenizer(prompts, **options, return_offsets_mapping=True, return_tensors="pt")
    return found.input_ids, found.offset_mapping


def test_tokens_and_spans_are_the_tokenizers(model: DiffusionModel) -> None:
    prompts = [*PROMPTS, LONG, "a café, ⭐ star"]
    ids, spans, lengths = model.tokens(prompts)
    wanted_ids, wanted_spans = library_tokens(model, prompts)
    assert torch.equal(ids, wanted_ids) and torch.equal(spans, wanted_spans)
    assert lengths == [len(model.pipeline.tokenizer(prompt.lower(), verbose=False).input_ids) for prompt in prompts]
    assert model.prompt_tokens == {"pixart": 120}.get(model.family, 77) == ids.shape[1]


def test_spans_point_into_the_prompt_as_typed(model: DiffusionModel) -> None:
    prompt = "  A Red  star"
    _, spans, _ = model.tokens([prompt])
    words = {prompt[a:b].strip().lower() for a, b in spans[0].tolist() if b > a}
    assert words == {"a", "red", "st", "ar"}


def test_the_text_encoder_is_given_these_tokens(model: DiffusionModel) -> None:
    prompts = [*PROMPTS, LONG, "  A Red Star "]
    calls, handle = calls_of(model.pipeline.text_encoder)
    text = model.encode_text(prompts)
    handle.remove()
    assert torch.equal(calls[0]["0"], text.ids)
    assert text.truncated == (False, False, False, False, True, False)


def test_padding_is_the_familys(tiny: Callable[[str], DiffusionModel]) -> None:
    end, start = tiny("sd1").pipeline.tokenizer.eos_token_id, tiny("sd1").pipeline.tokenizer.bos_token_id
    padding = {"sd1": end, "sd2": 0, "sd2v": 0, "sdxl": end, "pixart": 0}
    for family, number in padding.items():
        ids, spans, lengths = tiny(family).tokens(["a red star"])
        assert set(ids[0, lengths[0] :].tolist()) == {number} and not spans[0, lengths[0] :].any()
        assert tiny(family).special_tokens()["padding"] == number
    assert tiny("sd2").special_tokens() == {"start": start, "end": end, "padding": 0}
    assert "start" not in tiny("pixart").special_tokens()


def test_prompts_at_the_limit_are_whole_and_beyond_it_are_cut(model: DiffusionModel) -> None:
    special = 1 if model.family == "pixart" else 2
    room = model.prompt_tokens - special
    prompts = [" ".join(["red"] * count) for count in (room, room + 1)]
    _, spans, lengths = model.tokens(prompts)
    assert lengths == [model.prompt_tokens, model.prompt_tokens + 1]
    assert model.encode_text(prompts).truncated == (False, True)
    assert spans[1].max() == len(prompts[0])  # the last word is gone
    end = model.pipeline.tokenizer.eos_token_id
    assert model.tokens(prompts)[0][:, -1].tolist() == [end, end]


def test_text_is_taken_and_concatenated_by_rows(model: DiffusionModel) -> None:
    whole = model.encode_text([*PROMPTS, None, LONG])
    parts = EncodedText.concatenate([model.encode_text([prompt]) for prompt in (*PROMPTS, None, LONG)])
    rows = [5, 0, 0, 4]
    for text in (parts, whole.take(rows)):
        order = list(range(6)) if text is parts else rows
        torch.testing.assert_close(text.embeddings, whole.embeddings[order])
        assert torch.equal(text.ids, whole.ids[order]) and torch.equal(text.spans, whole.spans[order])
        assert text.truncated == tuple(whole.truncated[row] for row in order)
        for name in ("mask", "pooled"):
            ours, theirs = getattr(text, name), getattr(whole, name)
            assert (ours is None) == (theirs is None) == (name != {"sdxl": "pooled", "pixart": "mask"}.get(model.family))
            if theirs is not None:
                torch.testing.assert_close(ours, theirs[order])


def test_null_is_zeros_only_where_the_config_asks(fresh_pipeline: Callable[[str], Any]) -> None:
    pipeline = fresh_pipeline("sdxl")
    model = DiffusionModel(pipeline)
    text = model.encode_text(["a red star", None, ""])
    assert text.pooled is not None
    assert not text.embeddings[1].any() and not text.pooled[1].any()
    assert text.embeddings[0].any() and text.embeddings[2].any() and text.pooled[2].any()
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    text = model.encode_text([None, ""])
    assert torch.equal(text.embeddings[0], text.embeddings[1]) and text.embeddings.any()


# --- what the network is given, against the pipeline itself ---------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sd2v", "sdxl", "pixart", "pixart-1024"])
def test_network_arguments_are_the_pipelines(fresh_pipeline: Callable[..., Any], family: str, guidance: float) -> None:
    options = {"sample_size": 128, "use_additional_conditions": True} if family == "pixart-1024" else {}
    pipeline = fresh_pipeline(family.partition("-")[0], **options)
    model = DiffusionModel(pipeline)
    extra = {"clean_caption": False, "use_resolution_binning": False} if model.family == "pixart" else {}
    calls, handle = calls_of(model.network)
    pipeline("a Red star", height=16, width=32, num_inference_steps=2, guidance_scale=guidance, output_type="latent", **extra)
    handle.remove()
    prompts = ["a Red star"] if guidance == 1 else [None, "a Red star"]
    ours = model.network_arguments(torch.zeros(len(prompts), 4, 8, 16), model.encode_text(prompts))
    theirs = calls[0]
    torch.testing.assert_close(ours["encoder_hidden_states"], theirs["encoder_hidden_states"])
    if model.family == "sd":
        assert set(ours) == {"encoder_hidden_states"}
        return
    for name, value in theirs["added_cond_kwargs"].items():
        found = ours["added_cond_kwargs"][name]
        assert (found is None) == (value is None)
        if value is not None:
            torch.testing.assert_close(found, value)
    if model.family == "pixart":
        assert torch.equal(ours["encoder_attention_mask"], theirs["encoder_attention_mask"])


def test_sdxl_time_ids_are_the_pipelines(tiny: Callable[[str], DiffusionModel]) -> None:
    model = tiny("sdxl")
    arguments = model.network_arguments(torch.zeros(2, 4, 8, 16), model.encode_text(["a red star", None]))
    wanted = model.pipeline._get_add_time_ids((16, 32), (0, 0), (16, 32), torch.float32, text_encoder_projection_dim=16)
    assert torch.equal(arguments["added_cond_kwargs"]["time_ids"], wanted.repeat(2, 1))


# --- one step -------------------------------------------------------------------------------------


def ddim(model: DiffusionModel) -> DDIMScheduler:
    return DDIMScheduler.from_config(model.pipeline.scheduler.config, clip_sample=False, thresholding=False)


def test_noise_is_added_as_the_scheduler_does(model: DiffusionModel) -> None:
    latents, noise = normal(4, 4, 8, 16), normal(4, 4, 8, 16, seed=1)
    found = model.add_noise(latents, noise, TIMESTEPS)
    torch.testing.assert_close(found, ddim(model).add_noise(latents, noise, TIMESTEPS))
    # The Euler scheduler's variance-exploding form, scaled as it scales what it gives the network.
    euler = EulerDiscreteScheduler.from_config(model.pipeline.scheduler.config)
    timestep = euler.timesteps[500:501]
    exploding = euler.scale_model_input(euler.add_noise(latents[:1], noise[:1], timestep), timestep[0])
    torch.testing.assert_close(model.add_noise(latents[:1], noise[:1], timestep.long()), exploding, atol=1e-5, rtol=1e-4)
    half = model.add_noise(latents.bfloat16(), noise.bfloat16(), TIMESTEPS)
    assert half.dtype == torch.bfloat16  # and rounded only once
    exact = ddim(model).add_noise(latents.bfloat16().float(), noise.bfloat16().float(), TIMESTEPS)
    torch.testing.assert_close(half.float(), exact, atol=0, rtol=2**-8)


def test_denoise_is_the_networks_prediction_as_noise(model: DiffusionModel) -> None:
    text, noised = model.encode_text(PROMPTS), normal(4, 4, 8, 16)
    found = model.denoise(noised, TIMESTEPS, text)
    assert found is not None and found.shape == noised.shape
    raw = model.network(noised, timestep=TIMESTEPS, **model.network_arguments(noised, text)).sample
    for row, timestep in enumerate(TIMESTEPS.tolist()):
        scheduler = ddim(model)
        scheduler.set_timesteps(1000)
        one, half = raw[row : row + 1, :4], noised[row : row + 1]
        # DDIM keeps x0 and noise apart only inside; its x0 says what noise it saw.
        clean = scheduler.step(one, timestep, half).pred_original_sample
        alpha = scheduler.alphas_cumprod[timestep]
        noise = (half - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        torch.testing.assert_close(found[row : row + 1], noise, atol=2e-3 if timestep == 0 else 1e-4, rtol=1e-3)
    if model.prediction_type == "epsilon":
        assert torch.equal(found, raw[:, :4])
    assert model.prediction_type == ("v_prediction" if model.model_id == "tiny-sd2v" else "epsilon")
    assert raw.shape[1] == (8 if model.family == "pixart" else 4)


def test_velocity_of_known_noise_gives_that_noise_back() -> None:
    alphas = torch.tensor([0.9, 0.5, 0.1])
    clean, noise, timesteps = normal(3, 4, 2, 2), normal(3, 4, 2, 2, seed=1), torch.tensor([2, 0, 1])
    alpha = alphas[timesteps].view(-1, 1, 1, 1)
    noised, velocity = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    torch.testing.assert_close(predicted_noise(velocity, noised, timesteps, alphas, "v_prediction"), noise)
    learned = torch.cat([noise, torch.full_like(noise, 9.0)], 1)
    assert torch.equal(predicted_noise(learned, noised, timesteps, alphas, "epsilon"), noise)


def test_a_rows_result_does_not_depend_on_its_batch(model: DiffusionModel) -> None:
    text, noised = model.encode_text(PROMPTS), normal(4, 4, 8, 8)
    whole = model.denoise(noised, TIMESTEPS, text)
    alone = model.denoise(noised[2:3], TIMESTEPS[2:3], text.take([2]))
    assert whole is not None and alone is not None
    torch.testing.assert_close(alone[0], whole[2], atol=1e-5, rtol=1e-4)


def test_the_pipeline_is_left_as_it_was(fresh_pipeline: Callable[[str], Any]) -> None:
    pipeline: DiffusionPipeline = fresh_pipeline("sdxl")
    before = {name: value.clone() for name, value in pipeline.unet.state_dict().items()}
    config, processors = dict(pipeline.config), {k: type(v) for k, v in pipeline.unet.attn_processors.items()}
    model = DiffusionModel(pipeline)
    model.denoise(model.encode_image(images(1)), torch.tensor([10]), model.encode_text([None]))
    assert dict(pipeline.config) == config and all(torch.equal(before[k], v) for k, v in pipeline.unet.state_dict().items())
    assert {k: type(v) for k, v in pipeline.unet.attn_processors.items()} == processors


# --- what is said of a prompt is what the encoder was given ---------------------------------------


def heard(model: DiffusionModel, prompts: list[str]) -> tuple[Tensor, EncodedText]:
    calls, handle = calls_of(model.pipeline.text_encoder)
    text = model.encode_text(prompts)
    handle.remove()
    ids, spans, _ = model.tokens(prompts)
    assert torch.equal(ids, text.ids) and torch.equal(spans, text.spans)
    assert "__call__" not in vars(type(model.pipeline.tokenizer)), "the tokenizer is of its own class again"
    return torch.cat([call["input_ids"] if "input_ids" in call else call["0"] for call in calls]), text


def spelled(text: EncodedText, prompts: list[str]) -> list[list[str]]:
    """What each prompt's tokens with a span spell."""
    return [[prompt[a:b] for a, b in row if b > a] for prompt, row in zip(prompts, text.spans.tolist(), strict=True)]


def test_an_inversion_of_several_vectors_is_one_word(fresh_pipeline: Callable[[str], Any]) -> None:
    pipeline = fresh_pipeline("sd1")
    pipeline.tokenizer.add_tokens(["<cat>", "<cat>_1", "<cat>_2"])
    pipeline.text_encoder.resize_token_embeddings(len(pipeline.tokenizer))
    model, prompts = DiffusionModel(pipeline), ["a <cat> on the star", "<cat>", "a red star"]
    given, text = heard(model, prompts)
    assert torch.equal(text.ids, given)
    words = [["a", "<cat>", "<cat>", "<cat>", "on", "the", "st", "ar"], ["<cat>"] * 3, ["a", "red", "st", "ar"]]
    assert spelled(text, prompts) == words
    assert word_tokens(prompts[0], "<cat>", text.spans[0].tolist()) == [2, 3, 4]
    assert model.tokens(prompts)[2] == [10, 5, 6]
    room = " ".join(["red"] * 73)
    assert model.encode_text([f"<cat> {room}", room]).truncated == (True, False)  # 1 + 3 + 73 + 1 are one too many


class Templated(StableDiffusionPipeline):
    """A user's pipeline that writes words around every prompt."""

    def encode_prompt(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        return super().encode_prompt([f"the left of {text}, blue" for text in prompt], *args, **kwargs)


class Scrambled(StableDiffusionPipeline):
    """A user's pipeline that gives the encoder tokens of its own."""

    def encode_prompt(self, prompt: Any, device: Any, *args: Any, **kwargs: Any) -> Any:
        return self.text_encoder(torch.full((len(prompt), 77), 5))[0], None


def derived(cls: type, pipeline: Any) -> Any:
    return cls(**pipeline.components, requires_safety_checker=False)


def test_a_template_moves_no_word(fresh_pipeline: Callable[[str], Any]) -> None:
    model, prompts = DiffusionModel(derived(Templated, fresh_pipeline("sd1"))), ["a Red star", "on the circle", ""]
    assert model.family == "sd"
    given, text = heard(model, prompts)
    assert torch.equal(text.ids, given)
    assert spelled(text, prompts) == [["a", "Red", "st", "ar"], ["on", "the", "circle"], []]
    assert text.spans[0, 1:4].tolist() == [[0, 0]] * 3, "the template's own words are nowhere in the prompt"


def test_tokens_from_elsewhere_are_refused(fresh_pipeline: Callable[[str], Any]) -> None:
    model = DiffusionModel(derived(Scrambled, fresh_pipeline("sd1")), "odd")
    with pytest.raises(
        ValueError, match="text encoder of odd is given 2 rows for 2 prompts, of which 0 come from its tokenizer"
    ):
        model.encode_text(["a", "red"])


def test_letters_that_grow_when_lowered_move_no_word(tiny: Callable[[str], DiffusionModel]) -> None:
    prompts = ["  \u0130\u0130 a Red STAR "]
    _, text = heard(tiny("pixart"), prompts)
    assert [word.strip() for word in spelled(text, prompts)[0]][-4:] == ["a", "Red", "ST", "AR"]


def test_pipelines_that_lack_a_part_are_refused_by_name(fresh_pipeline: Callable[[str], Any]) -> None:
    for family, part in (("sd1", "text_encoder"), ("sdxl", "tokenizer_2"), ("pixart", "vae")):
        pipeline = fresh_pipeline(family)
        setattr(pipeline, part, None)
        with pytest.raises(ValueError, match=f"tiny has no {part}; load the pipeline with all its parts"):
            DiffusionModel(pipeline, "tiny")


def test_a_tokenizer_without_a_length_or_an_end(fresh_pipeline: Callable[[str], Any]) -> None:
    pipeline = fresh_pipeline("sd2")
    pipeline.tokenizer.model_max_length = int(1e30)
    with pytest.raises(ValueError, match="The tokenizer of tiny states no prompt length"):
        DiffusionModel(pipeline, "tiny").encode_text(["a star"])
    pipeline = fresh_pipeline("sd2")
    pipeline.tokenizer.eos_token = None
    model = DiffusionModel(pipeline)
    given, text = heard(model, ["a red star"])
    assert torch.equal(text.ids, given) and spelled(text, ["a red star"]) == [["a", "red", "st", "ar"]]
    assert "end" not in model.special_tokens()


# --- networks that want more, or are kept otherwise -----------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"time_cond_proj_dim": 8}, "time_cond_proj_dim"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"num_class_embeds": 3}, "num_class_embeds"),
        ({"addition_embed_type": "image", "encoder_hid_dim": 16}, "addition_embed_type image"),
    ],
)
def test_inputs_that_are_not_passed_are_refused_by_name(
    fresh_pipeline: Callable[..., Any], tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    pipeline = fresh_pipeline("sd2", **options)
    with pytest.raises(ValueError, match=rf"The network of tiny also takes .*{named}"):
        DiffusionModel(pipeline, "tiny")
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=named):
        load_network_config(tmp_path)


def test_an_adapter_for_images_is_seen_at_the_pass(fresh_pipeline: Callable[..., Any]) -> None:
    model = DiffusionModel(fresh_pipeline("sd2"), "tiny")
    text = model.encode_text(["a red star"])
    model.network.register_to_config(encoder_hid_dim_type="ip_image_proj")  # as load_ip_adapter does
    with pytest.raises(ValueError, match=r"also takes images .* IP-Adapter does; unload_ip_adapter\(\) removes it"):
        model.denoise(normal(1, 4, 8, 8), torch.tensor([10]), text)


def test_compute_dtype_is_the_networks(fresh_pipeline: Callable[..., Any]) -> None:
    for family in ("sd2", "sdxl", "pixart"):
        pipeline = fresh_pipeline(family)
        (pipeline.transformer if family == "pixart" else pipeline.unet).to(torch.bfloat16)  # its text encoder stays in float32
        model = DiffusionModel(pipeline)
        text = model.encode_text(["a red star"])
        assert text.embeddings.dtype == torch.bfloat16
        noise = model.denoise(model.encode_image(images(1)), torch.tensor([10]), text)
        assert noise is not None and noise.dtype == torch.bfloat16 and noise.isfinite().all()
    pipeline = fresh_pipeline("sd2")
    pipeline.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    model = DiffusionModel(pipeline)
    assert model.dtype == model.encode_image(images(1)).dtype == torch.bfloat16
    noise = model.denoise(model.encode_image(images(1)), torch.tensor([10]), model.encode_text(["a red star"]))
    assert noise is not None and noise.isfinite().all() and len(model.weights_hash()) == 16


def test_dropout_is_off_whatever_mode_the_pipeline_was_left_in(fresh_pipeline: Callable[..., Any]) -> None:
    model = DiffusionModel(fresh_pipeline("sd2", dropout=0.5))
    text, noised = model.encode_text(["a red star"]), normal(1, 4, 8, 8)
    wanted = model.denoise(noised, torch.tensor([10]), text)
    model.network.train()
    model.network.mid_block.eval()
    found = model.denoise(noised, torch.tensor([10]), text)
    assert found is not None and wanted is not None and torch.equal(found, wanted)
    assert model.network.training and not model.network.mid_block.training


def test_stated_sizes(fresh_pipeline: Callable[..., Any]) -> None:
    assert DiffusionModel(fresh_pipeline("sd2", sample_size=[8, 16])).resolution == (16, 32)
    assert DiffusionModel(fresh_pipeline("sd2", sample_size=[8, 8])).resolution == 16
    model = DiffusionModel(fresh_pipeline("sd2", sample_size=None), "tiny")
    assert model.latent_size(16, 32) == (8, 16)
    with pytest.raises(ValueError, match="The config of tiny states no sample_size; give the resolution"):
        model.resolution  # noqa: B018


def test_an_encoder_without_a_distribution(fresh_pipeline: Callable[[str], Any]) -> None:
    pipeline = fresh_pipeline("sd2")
    pipeline.vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()
    model = DiffusionModel(pipeline, "tiny")
    wanted = pipeline.vae.encode(images()).latents * pipeline.vae.config.scaling_factor
    assert model.resolution == 16 and torch.equal(model.encode_image(images()), wanted)
    assert torch.equal(model.encode_image(images(), "mode"), wanted)
    with pytest.raises(ValueError, match="AutoencoderTiny of tiny gives no distribution to sample from; take 'mean'"):
        model.encode_image(images(1), "sample", [torch.Generator()])


# --- identity -------------------------------------------------------------------------------------


def test_weights_hash_sees_every_value_of_every_part(fresh_pipeline: Callable[[str], Any]) -> None:
    pipeline = fresh_pipeline("sdxl")
    model = DiffusionModel(pipeline)
    hashes = [model.weights_hash()]
    assert hashes[0] == DiffusionModel(fresh_pipeline("sdxl")).weights_hash() == model.weights_hash()
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        weight = max(getattr(pipeline, part).parameters(), key=torch.numel)
        assert weight.numel() > 128
        weight.view(-1)[1] += 1e-3  # not one of 64 evenly spread values
        hashes.append(model.weights_hash())
    weight.data.mul_(2)  # a write that torch does not count
    hashes.append(model.weights_hash())
    pipeline.tokenizer.add_tokens(["<cat>"])
    hashes.append(model.weights_hash())
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, beta_end=0.02)
    hashes.append(model.weights_hash())
    assert len(set(hashes)) == len(hashes) == 8


def test_weights_hash_is_kept_until_a_value_changes(
    fresh_pipeline: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = DiffusionModel(fresh_pipeline("sd2"))
    before = model.weights_hash()
    read: list[int] = []
    whole = diffprobe.checkpoints._bytes

    def counted(flat: Tensor, portable: bool) -> bytes:
        read.append(flat.numel())
        return whole(flat, portable)

    monkeypatch.setattr(diffprobe.checkpoints, "_bytes", counted)
    assert model.weights_hash() == before and max(read) < 128, "of each tensor some values are read again"
    half = DiffusionModel(fresh_pipeline("sd2").to(torch.bfloat16))
    assert half.weights_hash() != before and half.weights_hash(portable=True) == model.weights_hash(portable=True)


def test_a_folder_is_kept_by_its_whole_path_and_an_embedded_model_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shapes-sd").mkdir()
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert kept_name("shapes-sd") == "shapes-sd", "the embedded model is what is loaded by this name"
    assert kept_name("mine") == kept_name("./mine") == str(tmp_path / "mine") and kept_name("some/hub-id") == "some/hub-id"
    assert kept_name("./shapes-sd") == str(tmp_path / "shapes-sd")
