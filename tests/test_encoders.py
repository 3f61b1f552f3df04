"""Vision encoders and baselines through `extract`: against the library's own forward pass and processors."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffprobe.data import ShapesDataset
from diffprobe.encoders import VisionEncoder, load_encoder, load_extractor
from diffprobe.extraction import extract, repair
from diffprobe.models import DiffusionModel, load_model
from diffprobe.probes.linear import fit_probe
from diffprobe.recorder import Recorder
from diffprobe.store import features, open_store, provenance, store_info, verify_store

TOWER: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28, "patch_size": 7}
KINDS = ("clip", "siglip", "dinov2", "dinov2_with_registers")


def build(kind: str) -> tuple[Any, Any]:
    """A tiny model with random weights and the image processor that goes with it."""
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    torch.manual_seed(KINDS.index(kind))
    side = {"height": 28, "width": 28}
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50_000}
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config={**TOWER, "intermediate_size": 32}, projection_dim=8)
        return transformers.CLIPModel(config), CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=side)
    if kind == "siglip":
        config = transformers.SiglipConfig(text_config=text, vision_config={**TOWER, "intermediate_size": 32})
        return transformers.SiglipModel(config), SiglipImageProcessorPil(size=side)
    name = {"dinov2": "Dinov2", "dinov2_with_registers": "Dinov2WithRegisters"}[kind]
    config = getattr(transformers, f"{name}Config")(**TOWER)
    return getattr(transformers, f"{name}Model")(config), CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=side)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("encoders") / kind
            for part in build(kind):
                part.save_pretrained(made[kind])
        return made[kind]

    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_the_librarys_own(kind: str, encoder_folder: Callable[[str], Path], tmp_path: Path) -> None:
    dataset = ShapesDataset(5)
    out = tmp_path / "s.zarr"
    summary = extract(str(encoder_folder(kind)), dataset, out, sites="*", store_dtype="float32", unit_samples=2, progress=False)
    assert summary.complete == 5
    tree = open_store(out)
    model, processor = build(kind)
    # The same geometry as the processor's, on images that have its size already: the rest is its mean and spread.
    images = [sample.load().resize((28, 28), Image.Resampling.LANCZOS) for sample in (dataset[i] for i in range(5))]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    tower = getattr(model, "vision_model", model).eval()
    with torch.no_grad():
        truth = tower(pixel_values=pixels, output_hidden_states=True)
        for layer in (1, 2, 3):
            got = features(tree, f"L{layer}", timestep=0, conditioning="null")
            assert got.dims == ("sample", "channel", "y", "x")
            np.testing.assert_allclose(got.values.reshape(5, 16, 16), truth.hidden_states[layer][:, -16:].mT, atol=1e-4)
        last = tower.post_layernorm(truth.last_hidden_state) if kind == "clip" else truth.last_hidden_state
    np.testing.assert_allclose(features(tree, "last").values.reshape(5, 16, 16), last[:, -16:].mT, atol=1e-4)
    request = provenance(tree)["request"]
    assert (request["timesteps"], request["conditionings"]) == ([0], ["null"])
    assert store_info(out)["pipeline"] == type(model).__name__


def test_a_store_of_an_encoder_is_like_any_other(encoder_folder: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "s.zarr"
    encoder = load_encoder(encoder_folder("clip"))
    extract(encoder, ShapesDataset(24, n_objects=1), out, unit_samples=5, progress=False)
    tree = open_store(out)
    assert [n for n in tree.children if n != "prompts"] == ["L2", "last"], "the second-to-last layer, as the paper's CLIP"
    before = features(tree, "L2").values
    shard = next(p for p in (out / "L2/features/c").rglob("*") if p.is_file())
    raw = bytearray(shard.read_bytes())
    raw[50] ^= 1
    shard.write_bytes(bytes(raw))
    faults, _ = repair(out, progress=False)
    assert len(faults) == 1 and verify_store(out) == []
    np.testing.assert_array_equal(features(open_store(out), "L2").values, before)
    frame = fit_probe(features(tree, "L2", pool="mean"), "size", n_jobs=1)
    assert frame[["timestep", "conditioning"]].to_numpy().tolist() == [[0, "null"]]
    assert not any(module._forward_hooks for module in encoder.network.modules()), "hooks are gone"


def test_other_sizes_and_reductions(encoder_folder: Callable[[str], Path], tmp_path: Path) -> None:
    for kind in ("clip", "dinov2"):
        out = tmp_path / f"{kind}.zarr"
        extract(
            str(encoder_folder(kind)),
            ShapesDataset(2),
            out,
            resolution=(28, 42),
            sites="last",
            reduce="grid:2x3",
            progress=False,
        )
        assert features(open_store(out), "last").shape == (2, 1, 1, 16, 2, 3)
    with pytest.raises(ValueError, match="sides must be multiples of 7, or its own 28x28"):
        extract(str(encoder_folder("clip")), ShapesDataset(2), tmp_path / "x.zarr", resolution=30, progress=False)


def test_refusals(encoder_folder: Callable[[str], Path], tmp_path: Path) -> None:
    encoder = load_encoder(encoder_folder("clip"))
    for wrong in ({"maps": "cross"}, {"guidance": (4.0,)}, {"noise_draws": 2}):
        with pytest.raises(ValueError, match="no guidance, attention maps or noise draws"):
            extract(encoder, ShapesDataset(2), tmp_path / "x.zarr", progress=False, **wrong)
    with pytest.raises(ValueError, match="Site 'L9' matches none of this model's 4 sites"):
        extract(encoder, ShapesDataset(2), tmp_path / "x.zarr", sites="L9", progress=False)
    with pytest.raises(ValueError, match="No model at"):
        load_extractor(tmp_path)
    bare = tmp_path / "bare"
    build("clip")[0].save_pretrained(bare)
    with pytest.raises(ValueError, match="could not be read"):
        load_extractor(bare)
    with pytest.raises(ValueError, match="takes no images"):
        VisionEncoder(build("clip")[0].text_model, {})
    with pytest.raises(ValueError, match="only timestep is 0; got 5"):
        encoder.check_timestep(5)


def test_random_weights_are_the_seeds(tiny_folder: Path, encoder_folder: Callable[[str], Path], tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    trained, drawn, again, other = (load_model(tiny_folder, "cpu", random_weights=s) for s in (None, 3, 3, 4))
    assert torch.equal(state, torch.random.get_rng_state()), "the caller's random numbers are not touched"
    hashes = [m.weights_hash() for m in (trained, drawn, again, other)]
    assert hashes[1] == hashes[2] and len(set(hashes)) == 3
    assert not drawn.network.training and drawn.network is drawn.pipeline.unet
    for part in ("vae", "text_encoder"):
        for a, b in zip(getattr(trained.pipeline, part).parameters(), getattr(drawn.pipeline, part).parameters(), strict=True):
            assert torch.equal(a, b)
    towers = [load_encoder(encoder_folder("clip"), random_weights=s).weights_hash() for s in (None, 3, 3)]
    assert towers[1] == towers[2] != towers[0]
    out = tmp_path / "s.zarr"
    options: dict[str, Any] = {"sites": "U-L2-R2-Res-Out", "timesteps": (50,), "progress": False}
    extract(drawn, ShapesDataset(3), out, **options)
    assert store_info(out)["random_weights"] == 3 and store_info(out)["request"]["weights"] == hashes[1]
    with pytest.raises(ValueError, match="weights: the store has"):
        extract(trained, ShapesDataset(3), out, **options)


def test_noised_latent_is_what_the_network_is_given(tiny_model: DiffusionModel, tmp_path: Path) -> None:
    noised = torch.randn(2, 4, *tiny_model.latent_size(64, 64))
    text = tiny_model.encode_text(["a red star", None])
    with Recorder(tiny_model, ["Noised-Latent", "U-L2-R2-Res-Out"]) as recorder:
        output = tiny_model.denoise(noised, torch.tensor([10, 500]), text)
    assert torch.equal(recorder["Noised-Latent"], noised) and recorder["Noised-Latent"].data_ptr() != noised.data_ptr()
    with Recorder(tiny_model, "Noised-Latent", stop_early=True) as recorder:
        assert tiny_model.denoise(noised, torch.tensor([10, 500]), text) is None, "nothing of the network has to run"
    assert torch.equal(recorder["Noised-Latent"], noised)
    assert torch.equal(tiny_model.denoise(noised, torch.tensor([10, 500]), text), output)
    extract(
        tiny_model, ShapesDataset(3), tmp_path / "s.zarr", sites=["Noised-Latent", "paper"], timesteps=(10, 900), progress=False
    )
    stored = features(open_store(tmp_path / "s.zarr"), "Noised-Latent")
    assert np.array_equal(stored.sel(conditioning="null").values, stored.sel(conditioning="caption").values)
    assert not np.allclose(stored.sel(timestep=10).values, stored.sel(timestep=900).values, atol=0.1)


# --- encoders that are no plain ViT ---------------------------------------------------------------


def plain(kind: str, **options: Any) -> Any:
    """A tiny tower of random weights."""
    import transformers

    torch.manual_seed(0)
    tower: dict[str, Any] = {} if "depths" in options else {**TOWER, "intermediate_size": 32}
    tower |= {"image_size": [28, 28]} if kind == "Yolos" else {}
    config = getattr(transformers, f"{kind}Config")(**tower, **options)
    return getattr(transformers, f"{kind}Model")(config).eval()


SQUARE: dict[str, Any] = {"size": 28, "do_normalize": False}


@pytest.mark.parametrize(
    ("kind", "options", "first"),
    [
        ("Aimv2Vision", {}, 0),
        ("ViT", {}, 1),
        ("DeiT", {}, 2),
        ("DINOv3ViT", {"num_register_tokens": 2}, 3),
        ("Yolos", {"num_detection_tokens": 5}, 1),  # whose last five tokens are no patches
    ],
)
def test_the_last_site_is_the_models_own_output(kind: str, options: dict[str, Any], first: int) -> None:
    model = plain(kind, **options)
    for parameter in model.parameters():  # a norm of fresh weights changes too little to be missed
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 2)
    encoder = VisionEncoder(model, SQUARE, kind)
    pixels = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    with encoder.recorder(["last"]) as recorder, torch.no_grad():
        encoder.denoise(encoder.encode_image(pixels * 2 - 1), torch.zeros(2), None)
        wanted = model(pixel_values=pixels).last_hidden_state[:, first : first + 16]
    torch.testing.assert_close(recorder.last["last"].flatten(2).mT, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ViTMAE", {}),
        ("ViTMAE", {"mask_ratio": 0.0}),  # all patches, shuffled
        ("Swin", {"image_size": 28, "patch_size": 7, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 2}),
        ("Swin", {"image_size": 28, "patch_size": 7, "embed_dim": 8, "depths": [1, 3], "num_heads": [2, 2], "window_size": 2}),
        ("ConvNext", {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2}),
        ("ResNet", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]}),
        ("Siglip2Vision", {"num_patches": 16}),
    ],
)
def test_towers_without_one_token_a_patch_are_refused_by_name(kind: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"tiny is a {kind}Model, which cannot be recorded"):
        VisionEncoder(plain(kind, **options), SQUARE, "tiny")


def test_pixels_are_what_the_processor_says(encoder_folder: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    model, array = plain("ViT"), np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8)
    ours = torch.from_numpy(array.transpose(2, 0, 1)[None] / np.float32(127.5) - np.float32(1))
    for options in (
        {"do_normalize": False},
        {"image_mean": [0.1, 0.2, 0.3]},
        {"rescale_factor": 1 / 127.5},
        {"do_rescale": False},
    ):
        processor = ViTImageProcessorPil(size={"height": 28, "width": 28}, **options)
        wanted = torch.as_tensor(processor(Image.fromarray(array), return_tensors="pt")["pixel_values"])
        encoder = VisionEncoder(model, processor.to_dict(), "tiny")
        torch.testing.assert_close(encoder.encode_image(ours), wanted, atol=1e-4, rtol=1e-5)
    assert VisionEncoder(model, {"size": {"longest_edge": 28}, "do_normalize": False}).size == (28, 28)
    for lacking in ("size", "image_mean", "image_std"):
        settings = {
            name: value for name, value in {"size": 28, "image_mean": [0.5], "image_std": [0.5]}.items() if name != lacking
        }
        with pytest.raises(ValueError, match=f"The image processor of tiny states no {lacking}"):
            VisionEncoder(model, settings, "tiny")
    folder = tmp_path / "sparse"  # a file may leave out what its class has by default
    shutil.copytree(encoder_folder("siglip"), folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_processor_type": "SiglipImageProcessor", "size": {"height": 28, "width": 28}}'
    )
    assert torch.equal(load_encoder(folder).encode_image(ours), load_encoder(encoder_folder("siglip")).encode_image(ours))


def test_an_encoders_hash_covers_what_it_does_to_pixels() -> None:
    model = plain("ViT")
    assert VisionEncoder(model, SQUARE).weights_hash() == VisionEncoder(model, SQUARE).weights_hash()
    other = VisionEncoder(model, {"size": 28, "image_mean": [0.5], "image_std": [0.5]})
    assert other.weights_hash() != VisionEncoder(model, SQUARE).weights_hash()


def test_an_encoders_folder_is_kept_by_its_whole_path(
    encoder_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = encoder_folder("siglip")
    monkeypatch.chdir(folder.parent)
    assert load_encoder(folder.name).model_id == str(folder)
