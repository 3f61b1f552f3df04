"""Checkpoints of one's own: adapters, variants, single files and pickle files, through `load_model` and `extract`."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffprobe.checkpoints import adapters_of, parse_lora
from diffprobe.encoders import load_extractor
from diffprobe.extraction import extract, repair
from diffprobe.layout import store_info
from diffprobe.models import DiffusionModel, load_model
from diffprobe.recorder import Recorder
from diffprobe.store import StoreWriter, open_store, provenance

Folder = Callable[[str], Path]
QUERY = "U-L1-R1-B0-Cross-Q"
TARGET = "up_blocks.1.attentions.1.transformer_blocks.0.attn2"


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two adapters of rank 2 of a Stable Diffusion's queries and keys at one attention; the name of one has a colon."""
    folder, found = tmp_path_factory.mktemp("loras"), []
    for number, name in enumerate(("style.safetensors", "a:b.safetensors")):
        torch.manual_seed(number)
        tensors = {}
        for part, width in (("to_q", 16), ("to_k", 16)):
            tensors[f"unet.{TARGET}.{part}.lora_A.weight"] = torch.randn(2, width)
            tensors[f"unet.{TARGET}.{part}.lora_B.weight"] = torch.randn(16, 2)
        save_file(tensors, folder / name)
        found.append(folder / name)
    return found[0], found[1]


def denoised(model: DiffusionModel) -> dict[str, Tensor]:
    """The feature that an adapter changes, and the predicted noise."""
    noised = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with Recorder(model, QUERY) as recorder:
        noise = model.denoise(noised, torch.tensor([50]), model.encode_text(["a red star"]))
    assert noise is not None
    return {"query": recorder[QUERY], "noise": noise}


@pytest.mark.parametrize("scales", [("",), (":0.5",), (":-1.25", ":2")])
def test_a_lora_is_the_merged_weights(model_folder: Folder, loras: tuple[Path, Path], scales: tuple[str, ...]) -> None:
    """The oracle adds scale * B A to the weights in float64."""
    from safetensors.torch import load_file

    given = [f"{path}{scale}" for path, scale in zip(loras, scales, strict=False)]
    model = load_model(model_folder("sd1"), "cpu", loras=given)
    merged = load_model(model_folder("sd1"), "cpu")
    plain = denoised(merged)
    for path, scale in zip(loras, scales, strict=False):
        tensors = load_file(path)
        for part in ("to_q", "to_k"):
            low, high = (tensors[f"unet.{TARGET}.{part}.lora_{letter}.weight"].double() for letter in "AB")
            weight = merged.network.get_submodule(f"{TARGET}.{part}").weight
            weight.data = (weight.double() + float(scale[1:] or 1) * high @ low).float()
    found, truth = denoised(model), denoised(merged)
    for name in truth:
        torch.testing.assert_close(found[name], truth[name], rtol=1e-4, atol=1e-5)
        assert (truth[name] - plain[name]).abs().max() > 1e-3
    assert next(adapters for path, adapters in adapters_of(model.network) if path == f"{TARGET}.to_q") == {
        f"lora{n}": float(scale[1:] or 1) for n, scale in enumerate(scales)
    }


def test_adapters_and_scales_are_in_the_hash(model_folder: Folder, loras: tuple[Path, Path]) -> None:
    folder, (one, other) = model_folder("sd1"), loras

    def load(*names: str) -> DiffusionModel:
        return load_model(folder, "cpu", loras=names)

    plain, half = load().weights_hash(), load(f"{one}:0.5")
    hashes = [
        plain,
        half.weights_hash(),
        load(f"{one}").weights_hash(),
        load(f"{other}:0.5").weights_hash(),
        load(f"{one}:0.5", f"{other}:1").weights_hash(),
    ]
    assert len(set(hashes)) == 5 and load(f"{one}:0.5").weights_hash() == hashes[1]
    half.pipeline.set_adapters(["lora0"], [1.0])
    assert half.weights_hash() == hashes[2], "a scale that is set later counts"
    half.pipeline.disable_lora()
    assert half.weights_hash() not in hashes[1:]


def test_a_store_knows_its_adapters_and_is_repaired_with_them(
    model_folder: Folder, tmp_path: Path, loras: tuple[Path, Path]
) -> None:
    options: dict[str, Any] = {
        "sites": QUERY,
        "timesteps": [50],
        "conditionings": ["null"],
        "progress": False,
        "unit_samples": 2,
    }
    lora = f"{loras[0]}:0.5"
    out, again = tmp_path / "a.zarr", tmp_path / "b.zarr"
    model = load_extractor(str(model_folder("sd1")), "cpu", loras=[lora])
    for place in (out, again):
        extract(model, "shapes:4", place, **options)
    assert provenance(open_store(out))["loading"] == {"loras": [lora]} and store_info(out)["loading"] == {"loras": [lora]}
    with pytest.raises(ValueError, match="weights: the store has"):
        extract(load_extractor(str(model_folder("sd1")), "cpu"), "shapes:4", out, **options)
    StoreWriter(out).forget_unit(1)
    _, summary = repair(out, device="cpu", progress=False)
    assert summary is not None and summary.complete == 4
    np.testing.assert_array_equal(open_store(out)[QUERY]["features"].values, open_store(again)[QUERY]["features"].values)


def test_adapters_that_cannot_be_loaded_are_refused(model_folder: Folder, tmp_path: Path, loras: tuple[Path, Path]) -> None:
    folder = model_folder("sd1")
    with pytest.raises(ValueError, match=r"no LoRA file 'nowhere\.safetensors'; give FILE or FILE:SCALE"):
        load_model(folder, "cpu", loras=["nowhere.safetensors"])
    assert parse_lora(f"{loras[1]}") == (loras[1], 1.0) and parse_lora(f"{loras[1]}:0.5") == (loras[1], 0.5)
    with pytest.raises(ValueError, match="is nan; it must be a finite number"):
        parse_lora(f"{loras[0]}:nan")
    save_file({"unrelated.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match=r"The LoRA '.*other\.safetensors' (does not fit|has no weights for) a StableDiffusionPipeline"
    ):
        load_model(folder, "cpu", loras=[str(tmp_path / "other.safetensors")])
    torch.save({}, tmp_path / "style.bin")
    with pytest.raises(ValueError, match=r"style\.bin' is a pickle file, which can run code .*--allow-pickle"):
        load_model(folder, "cpu", loras=[str(tmp_path / "style.bin")])
    with pytest.raises(ValueError, match="A LoRA belongs to trained weights"):
        load_model(folder, "cpu", loras=[str(loras[0])], random_weights=1)
    with pytest.raises(ValueError, match="is a vision encoder, which is not loaded with loras"):
        load_extractor("shapes-clip", "cpu", loras=[str(loras[0])])


def test_a_variant_is_another_file_of_weights(model_folder: Folder, tmp_path: Path) -> None:
    plain = load_model(model_folder("sd1"), "cpu")
    plain.pipeline.save_pretrained(tmp_path / "m")
    other = load_model(model_folder("sd1"), "cpu", random_weights=3)
    other.pipeline.save_pretrained(tmp_path / "m", variant="ema")
    found = load_model(tmp_path / "m", "cpu", variant="ema")
    assert (
        found.weights_hash() == other.weights_hash() != load_model(tmp_path / "m", "cpu").weights_hash() == plain.weights_hash()
    )
    assert found.loading == {"variant": "ema"}
    with pytest.raises(ValueError, match=r"could not be read: .*fp8"):
        load_model(tmp_path / "m", "cpu", variant="fp8")


def test_pickle_files_are_read_only_when_asked_for(model_folder: Folder, tmp_path: Path) -> None:
    plain = load_model(model_folder("sd1"), "cpu")
    plain.pipeline.save_pretrained(tmp_path / "m", safe_serialization=False)
    shutil.copytree(model_folder("sd1") / "text_encoder", tmp_path / "m" / "text_encoder", dirs_exist_ok=True)
    assert list((tmp_path / "m" / "unet").glob("*.bin"))
    with pytest.raises(
        ValueError, match=r"There are weights in a pickle file, which can run code .*: if you trust it, --allow-pickle"
    ):
        load_model(tmp_path / "m", "cpu")
    assert load_model(tmp_path / "m", "cpu", use_safetensors=False).weights_hash() == plain.weights_hash()
    torch.save({}, tmp_path / "m.ckpt")
    with pytest.raises(ValueError, match=r"m\.ckpt' is a pickle file, which can run code"):
        load_model(tmp_path / "m.ckpt", "cpu", config=str(tmp_path / "m"))


# --- a single file --------------------------------------------------------------------------------


def original_names(pipeline: Any) -> dict[str, Tensor]:
    """The weights of a Stable Diffusion 1 under the names of the original layout, from reading how it counts blocks."""
    layers = pipeline.unet.config.layers_per_block + 1
    resnet = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    top = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    found = {}
    for name, tensor in pipeline.unet.state_dict().items():
        place, _, last = name.rpartition(".")
        if place in top:
            new = f"{top[place]}.{last}"
        elif match := re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", name):
            side, block, kind, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
            row = block * layers + number + (side == "down")
            attends = hasattr(getattr(pipeline.unet, f"{side}_blocks")[block], "attentions")
            part = {"resnets": "0", "attentions": "1"}.get(kind, "")
            if kind == "downsamplers":
                row, rest = (block + 1) * layers, rest.replace("conv", "0.op")
            elif kind == "upsamplers":
                row, part = (block + 1) * layers - 1, "2" if attends else "1"
            for old, other in resnet.items() if kind == "resnets" else ():
                rest = re.sub(rf"^{old}\.", f"{other}.", rest)
            new = ".".join([f"{'input' if side == 'down' else 'output'}_blocks", str(row), *([part] if part else []), rest])
        else:
            kind, number, rest = re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)", name).groups()  # type: ignore[union-attr]
            for old, other in resnet.items() if kind == "resnets" else ():
                rest = re.sub(rf"^{old}\.", f"{other}.", rest)
            new = f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}.{rest}"
        found[f"model.diffusion_model.{new}"] = tensor
    blocks = len(pipeline.vae.config.block_out_channels)
    for name, tensor in pipeline.vae.state_dict().items():
        new = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", name)
        new = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{blocks - 1 - int(m[1])}.block.{m[2]}", new)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", new).replace(
            "mid_block.attentions.0", "mid.attn_1"
        )
        for old, other in {
            "conv_shortcut": "nin_shortcut",
            "group_norm": "norm",
            "to_q": "q",
            "to_k": "k",
            "to_v": "v",
            "to_out.0": "proj_out",
            "conv_norm_out": "norm_out",
        }.items():
            new = new.replace(f".{old}.", f".{other}.")
        if re.search(r"attn_1\.(q|k|v|proj_out)\.weight", new):
            tensor = tensor[:, :, None, None]
        found[f"first_stage_model.{new}"] = tensor
    for name, tensor in pipeline.text_encoder.state_dict().items():
        found[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = tensor
    return {name: tensor.contiguous() for name, tensor in found.items()}


def test_a_single_file_is_the_folder(model_folder: Folder, tmp_path: Path) -> None:
    whole = load_model(model_folder("sd1"), "cpu")
    file, configs = tmp_path / "mine.safetensors", tmp_path / "configs"
    save_file(original_names(whole.pipeline), file)
    shutil.copytree(model_folder("sd1"), configs, ignore=shutil.ignore_patterns("*.safetensors"))
    found = load_model(file, "cpu", config=configs)
    torch.testing.assert_close(denoised(found)["noise"], denoised(whole)["noise"], rtol=1e-5, atol=1e-6)
    assert found.weights_hash() == whole.weights_hash() and found.model_id == str(file)
    assert found.loading == {"config": str(configs)} and load_extractor(str(file), "cpu", config=str(configs)).family == "sd"
    with pytest.raises(
        ValueError, match=r"holds weights alone, and the configs of .* cannot be had here: give --config FOLDER"
    ):
        load_model(file, "cpu")
    shutil.copytree(model_folder("pixart"), tmp_path / "pixart", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ValueError, match="could not be read: a PixArtAlphaPipeline cannot be loaded from a single file"):
        load_model(file, "cpu", config=tmp_path / "pixart")
