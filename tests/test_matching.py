"""Scores of a diffusion model against plain float64 recomputation, and the run that keeps them.

The oracle of the attention scores hooks `to_q` and `to_k` itself and loops over heads, places and tokens; that of the
denoising loss calls the network by hand.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from diffusers.models.attention_processor import AttnProcessor2_0
from PIL import Image

import diffprobe.matching
from diffprobe import alignment_score
from diffprobe.data.benchmarks import Benchmark, Item
from diffprobe.extraction import NotFiniteError
from diffprobe.models import DiffusionModel
from diffprobe.noise import sample_noise
from diffprobe.probes.alignment import CLIP, DISCFFUSION, LOSS, NORMALISED, PAPER, POOLED, alignment_table

TIMESTEPS = (100, 700)
TEXTS = ("a red circle", "a blue star on the left of a circle")


def picture(seed: int, side: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8))


def benchmark(count: int = 2, images: int = 2, texts: Sequence[str] = TEXTS, protocol: str = "winoground") -> Benchmark:
    items = tuple(
        Item(f"i{n}", tuple(partial(picture, 10 * n + k) for k in range(images)), tuple(texts), "ab"[n % 2])
        for n in range(count)
    )
    return Benchmark("pictures", protocol, f"pictures:{count}", items)


def score(model: Any, data: Benchmark, **options: Any) -> xr.Dataset:
    return alignment_score(model, data, **({"timesteps": TIMESTEPS, "draws": 2, "progress": False} | options))


def latent_of(model: DiffusionModel, image: Image.Image) -> torch.Tensor:
    pixels = torch.tensor(np.asarray(image), dtype=torch.float32).permute(2, 0, 1)[None] / 127.5 - 1
    return model.encode_image(pixels)


def network_output(model: DiffusionModel, noised: torch.Tensor, timestep: int, text: str | None) -> torch.Tensor:
    encoded = model.encode_text([text])
    with torch.no_grad():
        return model.network(noised, timestep, return_dict=False, **model.network_arguments(noised, encoded))[0]


def naive_pass(
    model: DiffusionModel, image: Image.Image, text: str | None, item: str, timestep: int, draw: int
) -> dict[str, Any]:
    """One pass with one row: squared error of the noise, and the q and k of every cross-attention by module path."""
    latent = latent_of(model, image)
    noise = sample_noise(0, item, timestep, draw, latent.shape[1:])[None]
    alpha = float(model.alphas_cumprod[timestep])
    noised = math.sqrt(alpha) * latent + math.sqrt(1 - alpha) * noise
    held: dict[str, dict[str, np.ndarray]] = {}
    handles = []
    for path, module in model.network.named_modules():
        if path.endswith("attn2"):
            for part in ("to_q", "to_k"):
                save = lambda m, a, out, path=path, part=part: held.setdefault(path, {}).update({part: out[0].double().numpy()})  # noqa: E731
                handles.append(getattr(module, part).register_forward_hook(save))
    try:
        output = network_output(model, noised, timestep, text)[:, :4]
    finally:
        for handle in handles:
            handle.remove()
    if model.prediction_type == "v_prediction":
        output = math.sqrt(alpha) * output + math.sqrt(1 - alpha) * noised
    return {"error": float(((output - noise).double() ** 2).mean()), "attention": held, "numbers": noise.numel()}


def scaled_scores(model: DiffusionModel, path: str, held: dict[str, np.ndarray]) -> np.ndarray:
    """(head, place, token) in float64."""
    heads = dict(model.network.named_modules())[path].heads
    q, k = held["to_q"], held["to_k"]
    width = q.shape[1] // heads
    return np.stack(
        [q[:, h * width : (h + 1) * width] @ k[:, h * width : (h + 1) * width].T / math.sqrt(width) for h in range(heads)]
    )


def paper_oracle(model: DiffusionModel, attention: dict[str, dict[str, np.ndarray]]) -> float:
    layers = []
    for path, held in attention.items():
        heads = []
        for scores in scaled_scores(model, path, held):
            maps = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
            heads.append(math.log(np.exp(maps).sum()))
        layers.append(np.mean(heads))
    return float(np.mean(layers))


def lse_oracle(model: DiffusionModel, attention: dict[str, dict[str, np.ndarray]], paths: Sequence[str]) -> float:
    return float(np.mean([np.log(np.exp(scaled_scores(model, path, attention[path])).sum(2)).mean() for path in paths]))


# The last block with cross-attention on each side, all its attentions, the last transformer block of each: of the tiny
# SDXL's two in down block 2 and in the middle, of its one in up block 1.
DISCFFUSION_PATHS = {
    "sd2v": [f"{path}.transformer_blocks.0.attn2" for path in (
        "down_blocks.2.attentions.0", "down_blocks.2.attentions.1", "mid_block.attentions.0",
        "up_blocks.3.attentions.0", "up_blocks.3.attentions.1", "up_blocks.3.attentions.2",
    )],
    "sdxl": [f"{path}.attn2" for path in (
        "down_blocks.2.attentions.0.transformer_blocks.1", "down_blocks.2.attentions.1.transformer_blocks.1",
        "mid_block.attentions.0.transformer_blocks.1", "up_blocks.1.attentions.0.transformer_blocks.0",
        "up_blocks.1.attentions.1.transformer_blocks.0", "up_blocks.1.attentions.2.transformer_blocks.0",
    )],
}  # fmt: skip


@pytest.mark.parametrize("family", ["sd2v", "sdxl"])
def test_all_scores_against_float64(family: str, tiny: Callable[[str], DiffusionModel]) -> None:
    model = tiny(family)
    data = benchmark(1)
    found = score(model, data, scores=(PAPER, DISCFFUSION, LOSS, NORMALISED), batch_rows=7)
    paths = DISCFFUSION_PATHS[family]
    for image, (t, timestep), draw in ((0, (0, 100), 0), (1, (0, 100), 1), (1, (1, 700), 0)):
        once = partial(naive_pass, model, picture(image), item="i0", timestep=timestep, draw=draw)
        null = once(text=None)
        for text, words in enumerate(TEXTS):
            own = once(text=words)
            here = found.isel(item=0, image=image, text=text, timestep=t, draw=draw)
            assert float(here[LOSS]) == pytest.approx(-own["error"], rel=1e-4)
            assert float(here[NORMALISED]) == pytest.approx(null["error"] - own["error"], abs=1e-4 * own["error"])
            assert float(here[PAPER]) == pytest.approx(paper_oracle(model, own["attention"]), abs=2e-7)
            lse = (lse_oracle(model, own["attention"], paths) + lse_oracle(model, null["attention"], paths)) / 2
            bias = math.sqrt(own["numbers"]) * (math.sqrt(null["error"]) - math.sqrt(own["error"]))
            assert float(here[DISCFFUSION]) == pytest.approx(lse + bias, abs=1e-4)
    spread = found[PAPER].std(("image", "text")).max()
    assert spread > 1e-5, "scores that hardly differ would not show a wrong one"


def test_masked_tokens_count_nothing(tiny: Callable[[str], DiffusionModel]) -> None:
    """PixArt's padding has probability 0, so only exp(0) of it is in the sum, whatever its keys are."""
    model = tiny("pixart")
    found = score(model, benchmark(1), scores=(PAPER, LOSS))
    assert np.isfinite(found[PAPER]).all() and found[PAPER].std() > 0
    with pytest.raises(ValueError, match=r"defined on the down, mid and up part of a UNet, .* in none of them"):
        score(model, benchmark(1), scores=(DISCFFUSION,))


def test_maps_alone_give_the_same_as_with_the_loss(tiny: Callable[[str], DiffusionModel]) -> None:
    """Without the loss the pass ends early, after the last attention."""
    both = score(tiny("sd2"), benchmark(1), scores=(PAPER, LOSS))
    np.testing.assert_array_equal(score(tiny("sd2"), benchmark(1), scores=(PAPER,))[PAPER], both[PAPER])


def test_the_model_is_left_as_it_was(tiny: Callable[[str], DiffusionModel]) -> None:
    model = tiny("sd1")
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.network.modules())  # noqa: E731
    before = hooks()
    score(model, benchmark(1), scores=(PAPER, DISCFFUSION))
    assert hooks() == before
    assert all(type(m.processor) is AttnProcessor2_0 for m in model.network.modules() if hasattr(m, "processor"))


def test_noise_is_shared_within_an_item_and_nowhere_else(tiny: Callable[[str], DiffusionModel]) -> None:
    same = Item("i0", (partial(picture, 1), partial(picture, 1)), (TEXTS[0], TEXTS[0]), "a")
    other = Item("i1", same.images, same.captions, "a")
    found = score(tiny("sd1"), Benchmark("same", "winoground", "same", (same, other)), scores=(LOSS, PAPER))
    for name in (LOSS, PAPER):
        values = found[name].to_numpy()
        np.testing.assert_allclose(values, np.broadcast_to(values[:, :1, :1], values.shape), rtol=1e-5)
        assert not np.isclose(values[0], values[1], rtol=1e-5).any()
        assert len(np.unique(values[0, 0, 0].round(9))) == 4  # two timesteps, two draws


def test_batch_size_changes_nothing(tiny: Callable[[str], DiffusionModel]) -> None:
    one, many = (score(tiny("sd2v"), benchmark(1), batch_rows=rows, timesteps=(700,)) for rows in (1, 64))
    for name in (PAPER, DISCFFUSION, LOSS, NORMALISED):
        np.testing.assert_allclose(one[name], many[name], rtol=1e-4, atol=1e-6)


def test_empty_and_long_texts(tiny: Callable[[str], DiffusionModel]) -> None:
    long = " ".join(["circle"] * 90)
    data = benchmark(1, images=1, texts=("", long), protocol="sugarcrepe")
    found = score(tiny("sd2"), data, scores=(NORMALISED, DISCFFUSION))
    np.testing.assert_allclose(found[NORMALISED].isel(text=0), 0, atol=1e-6)  # the empty text is this family's null text
    assert found.attrs["truncated_captions"] == 1
    assert np.isfinite(found[DISCFFUSION]).all()


def test_a_value_that_is_not_finite_is_named(fresh_pipeline: Callable[..., Any]) -> None:
    model = DiffusionModel(fresh_pipeline("sd1"), "broken")
    model.network.conv_out.weight.fill_(float("nan"))
    with pytest.raises(
        NotFiniteError, match=r"Item 'i0', image 0, 'a red circle', timestep 100: error is not finite in float32"
    ):
        score(model, benchmark(1), scores=(LOSS,))


# --- keeping and resuming -------------------------------------------------------------------------


def test_an_interrupted_run_goes_on(
    tmp_path: Path, tiny: Callable[[str], DiffusionModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data, out = tiny("sd1"), benchmark(4), tmp_path / "new" / "scores.nc"
    run = partial(score, model, data, timesteps=(300,), draws=1)
    whole = run()
    calls: list[str] = []
    original = diffprobe.matching._Denoising.__call__

    def watched(self: Any, item: Item) -> Any:
        calls.append(item.id)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, item)

    monkeypatch.setattr(diffprobe.matching._Denoising, "__call__", watched)
    with pytest.raises(KeyboardInterrupt):
        run(out=out)
    assert xr.load_dataset(out, engine="scipy")["done"].values.tolist() == [1, 1, 0, 0]
    found = run(out=out)
    assert calls == ["i0", "i1", "i2", "i2", "i3"]
    assert run(out=out).equals(found) and len(calls) == 5  # nothing is left to do
    for name in (PAPER, DISCFFUSION, LOSS, NORMALISED):
        np.testing.assert_array_equal(found[name], whole[name])
    assert found.attrs["passes"] == whole.attrs["passes"] == 4 * 2 * 3
    assert [path.name for path in out.parent.iterdir()] == ["scores.nc"]
    kept = xr.load_dataset(out, engine="scipy")
    assert kept[LOSS].dims == ("item", "image", "text", "timestep", "draw")
    assert kept["pattern"].values.tolist() == ["a", "b", "a", "b"] and kept["timestep"].values.tolist() == [300]
    assert alignment_table(kept, kept.attrs["protocol"]).equals(alignment_table(found, "winoground"))


def test_another_request_is_refused(tmp_path: Path, tiny: Callable[[str], DiffusionModel]) -> None:
    out = tmp_path / "scores.nc"
    score(tiny("sd1"), benchmark(1), out=out, scores=(LOSS,))
    with pytest.raises(ValueError, match=r"holds another request.*seed: the store has 0, you ask for 1"):
        score(tiny("sd1"), benchmark(1), out=out, scores=(LOSS,), seed=1)
    out.write_bytes(b"something else")
    with pytest.raises(ValueError, match="exists and holds no alignment scores"):
        score(tiny("sd1"), benchmark(1), out=out, scores=(LOSS,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": ("loss",)}, "Score 'loss' is not one of attention_lse_paper"),
        ({"scores": ()}, "Scores must be given, each once; got none"),
        ({"timesteps": (10, 10)}, "Timesteps must be given, each once"),
        ({"timesteps": (1000,)}, r"Timestep 1000 is outside 0\.\.999"),
        ({"draws": 0}, "at least one draw"),
        ({"resolution": 17}, "Resolution 17x17 does not fit"),
        ({"scores": (POOLED,), "site": "U-L9"}, "Site 'U-L9' matches none"),
        ({"scores": (CLIP,), "clip": "/nowhere"}, "No CLIP model at '/nowhere'"),
    ],
)
def test_requests_that_make_no_sense(options: dict[str, Any], message: str, tiny: Callable[[str], DiffusionModel]) -> None:
    with pytest.raises(ValueError, match=message):
        score(tiny("sd1"), benchmark(1), **options)


def test_items_must_be_alike(tiny: Callable[[str], DiffusionModel]) -> None:
    data = Benchmark("mixed", "winoground", "mixed", (*benchmark(1).items, Item("x", (partial(picture, 0),), TEXTS, "a")))
    with pytest.raises(ValueError, match=r"same numbers of images and captions; found \[\(1, 2\), \(2, 2\)\]"):
        score(tiny("sd1"), data)


def test_many_texts_are_all_scored(tiny: Callable[[str], DiffusionModel]) -> None:
    data = benchmark(1, images=1, texts=(*TEXTS, "a square"), protocol="sugarcrepe")
    found = score(tiny("sd1"), data, scores=(LOSS, NORMALISED), batch_rows=5)
    assert np.isfinite(found[LOSS]).all() and found.sizes["text"] == 3 and found.attrs["passes"] == 4 * 4


def test_a_file_with_the_former_option_prune_is_gone_on_with(tmp_path: Path, tiny: Callable[[str], DiffusionModel]) -> None:
    out = tmp_path / "scores.nc"
    found = score(tiny("sd1"), benchmark(1), out=out, scores=(LOSS,))
    old = xr.load_dataset(out, engine="scipy")
    old.attrs["request"] = json.dumps({**json.loads(old.attrs["request"]), "prune": True})
    old.to_netcdf(out, engine="scipy")
    np.testing.assert_array_equal(score(tiny("sd1"), benchmark(1), out=out, scores=(LOSS,))[LOSS], found[LOSS])


# --- embeddings -----------------------------------------------------------------------------------


def test_pooled_cosine_is_a_ridge_of_recorded_features(tiny_model: DiffusionModel) -> None:
    """On the drawn world with a random network: the numbers are those of the recorder and of `fit_text_map`."""
    from diffprobe.data import load_dataset
    from diffprobe.data.images import fit_image
    from diffprobe.probes.alignment import fit_text_map
    from diffprobe.recorder import Recorder

    site, timestep = "U-L1-R1-B0-Out", 50
    found = alignment_score(
        tiny_model, "shapes-winoground:2", scores=(POOLED,), site=site, site_timestep=timestep, train="shapes:12", batch_rows=5, progress=False
    )  # fmt: skip
    assert found[POOLED].dims == ("item", "image", "text") and found.attrs["passes"] == 0

    def feature(image: Image.Image, name: str) -> np.ndarray:
        latent = latent_of(tiny_model, fit_image(image, (64, 64)))
        noise = sample_noise(0, name, timestep, 0, latent.shape[1:])[None]
        with Recorder(tiny_model, site) as recorder:
            tiny_model.denoise(tiny_model.add_noise(latent, noise, torch.tensor([timestep])), torch.tensor([timestep]), null)
        return recorder[site][0].double().mean((1, 2)).numpy()

    def embedding(text: str) -> np.ndarray:
        encoded = tiny_model.encode_text([text])
        end = int((encoded.ids[0] == tiny_model.special_tokens()["end"]).nonzero()[0])
        return encoded.embeddings[0, 1 : end + 1].double().mean(0).numpy()

    null = tiny_model.encode_text([None])
    train = [load_dataset("shapes:12")[n] for n in range(12)]
    fitted = fit_text_map(
        np.stack([feature(sample.load(), sample.id) for sample in train]),
        np.stack([np.mean([embedding(caption.text) for caption in sample.captions], axis=0) for sample in train]),
    )
    twins = load_dataset("shapes-winoground:2")
    for item in range(2):
        name = f"shapes-winoground-0-{item:06d}"
        images = np.stack([feature(twins[2 * item + side].load(), name) for side in range(2)])
        texts = np.stack([embedding(twins[2 * item + side].captions[0].text) for side in range(2)])
        np.testing.assert_allclose(found[POOLED][item], fitted.cosine(images, texts), atol=1e-4)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[[str], DiffusionModel]) -> Path:
    """A tiny CLIPModel with its processor, as transformers saves them."""
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

    tokenizer = tiny("sd1").pipeline.tokenizer
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**tower, **ids, "vocab_size": len(tokenizer)},
        vision_config={**tower, "image_size": 8, "patch_size": 4},
        projection_dim=6,
    )
    folder = tmp_path_factory.mktemp("clip") / "tiny-clip"
    model = CLIPModel(config)
    for parameter in model.parameters():
        parameter.data.mul_(4)  # fresh embeddings all point one way
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    CLIPProcessor(CLIPImageProcessorPil(**size), tokenizer).save_pretrained(folder)
    return folder


def test_clip_cosine_is_the_models_own(clip_folder: Path, tiny: Callable[[str], DiffusionModel]) -> None:
    from transformers import CLIPModel, CLIPProcessor

    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    data = benchmark(1, texts=("a red circle", " ".join(["circle"] * 90)))
    found = score(tiny("sd1"), data, scores=(CLIP,), clip=str(clip_folder))
    assert found[CLIP].dims == ("item", "image", "text") and "timestep" not in found.dims
    for image in range(2):
        for text, words in enumerate(data.items[0].captions):
            inputs = processor(text=[words], images=[picture(image)], return_tensors="pt", truncation=True, max_length=77)
            with torch.no_grad():
                expected = float(model(**inputs).logits_per_image) / math.exp(float(model.logit_scale))
            assert float(found[CLIP][0, image, text]) == pytest.approx(expected, abs=1e-5)
    assert found[CLIP].std() > 1e-3
    request = json.loads(found.attrs["request"])
    assert request["clip"] == str(clip_folder) and len(request["clip_weights"]) == 16 and request["timesteps"] == []


def test_command_line(tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffprobe import cli
    from diffprobe.plotting import read_rows

    out = tmp_path / "scores.nc"
    arguments = ["probe", "alignment", "--model", str(tiny_folder), "--data", "shapes-winoground:3", "--timesteps", "300"]
    arguments += ["--draws", "1", "--scores", f"{LOSS},{NORMALISED}", "--baseline", LOSS, "--out", str(out)]
    cli.app(arguments, standalone_mode=False)
    printed = capsys.readouterr().out
    assert "share right" in printed and f"{NORMALISED} - {LOSS}, group:" in printed
    rows = read_rows(out.with_suffix(".csv"))
    assert set(rows["metric"]) == {"text", "image", "group"} and set(rows["n"]) == {1, 2, 3}
    with pytest.raises(ValueError, match="--baseline 'clip' is not one of the scores"):
        cli.app([*arguments, "--baseline", "clip"], standalone_mode=False)
