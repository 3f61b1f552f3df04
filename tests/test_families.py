"""Every family's transformer through one recorder: tiny networks with random weights, built from config.

The oracle catches the arguments of `scaled_dot_product_attention` by itself and computes each map in float64.  Which tokens are image
and which are text is written out by hand for each class below, from reading it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn

from diffprobe.models import load_network_config, sites_of, stated_size
from diffprobe.recorder import _ACTIVE, Recorder, massive_channels, site_shapes
from diffprobe.sites import attentions_of
from diffprobe.tap import Call, Tap, output_products, probabilities

ROWS, GRID = 2, (2, 3)
PLACES = 6
TIMES, SHARES = torch.tensor([500, 900]), torch.tensor([0.5, 0.9])


def ids(frames: int = 3) -> Tensor:
    places = torch.zeros(PLACES, frames)
    places[:, 1], places[:, 2] = torch.arange(2).repeat_interleave(3), torch.arange(3).repeat(2)
    return places


def latents(*shape: int) -> Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(1))


def text(words: int, width: int) -> Tensor:
    return torch.randn(ROWS, words, width, generator=torch.Generator().manual_seed(2))


def sd3(words: int) -> tuple[nn.Module, dict[str, Any]]:
    network = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        caption_projection_dim=16, pooled_projection_dim=16, out_channels=4, pos_embed_max_size=8, dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )  # fmt: skip
    return network, {
        "hidden_states": latents(4, 4, 6), "encoder_hidden_states": text(words, 16), "pooled_projections": text(1, 16)[:, 0],
        "timestep": TIMES,
    }  # fmt: skip


def flux(words: int) -> tuple[nn.Module, dict[str, Any]]:
    network = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return network, {
        "hidden_states": latents(PLACES, 4), "encoder_hidden_states": text(words, 32), "pooled_projections": text(1, 32)[:, 0],
        "timestep": SHARES, "img_ids": ids(), "txt_ids": torch.zeros(words, 3),
    }  # fmt: skip


def flux2(words: int) -> tuple[nn.Module, dict[str, Any]]:
    network = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    return network, {
        "hidden_states": latents(PLACES, 4), "encoder_hidden_states": text(words, 32), "timestep": SHARES, "guidance": SHARES,
        "img_ids": ids(4).expand(ROWS, -1, -1), "txt_ids": torch.zeros(ROWS, words, 4),
    }  # fmt: skip


def chroma(words: int) -> tuple[nn.Module, dict[str, Any]]:
    network = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip
    return network, {
        "hidden_states": latents(PLACES, 4), "encoder_hidden_states": text(words, 32), "timestep": SHARES, "img_ids": ids(),
        "txt_ids": torch.zeros(words, 3),
    }  # fmt: skip


def qwen(words: int) -> tuple[nn.Module, dict[str, Any]]:
    network = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    mask = torch.ones(ROWS, words, dtype=torch.long)
    mask[1, -2:] = 0
    return network, {
        "hidden_states": latents(PLACES, 16), "encoder_hidden_states": text(words, 16), "encoder_hidden_states_mask": mask,
        "timestep": SHARES, "img_shapes": [[(1, *GRID)]] * ROWS,
    }  # fmt: skip


def z_image(words: int) -> tuple[nn.Module, dict[str, Any]]:
    network = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[64, 32, 32],
    )  # fmt: skip
    return network, {"x": list(latents(4, 1, 4, 6)), "t": SHARES, "cap_feats": list(text(words, 16))}


def lumina2(words: int) -> tuple[nn.Module, dict[str, Any]]:
    network = diffusers.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1, num_attention_heads=3,
        num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(32, 32, 32), cap_feat_dim=16,
    )  # fmt: skip
    return network, {
        "hidden_states": latents(4, 4, 6), "timestep": SHARES, "encoder_hidden_states": text(words, 16),
        "encoder_attention_mask": torch.ones(ROWS, words, dtype=torch.bool),
    }  # fmt: skip


def sana(words: int) -> tuple[nn.Module, dict[str, Any]]:
    network = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16, sample_size=8, patch_size=1,
    )  # fmt: skip
    return network, {"hidden_states": latents(4, *GRID), "encoder_hidden_states": text(words, 16), "timestep": TIMES}


def hunyuan_dit(words: int) -> tuple[nn.Module, dict[str, Any]]:
    network = diffusers.HunyuanDiT2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=3, cross_attention_dim=16,
        cross_attention_dim_t5=16, pooled_projection_dim=4, hidden_size=24, text_len=words - 3, text_len_t5=3,
    )  # fmt: skip
    angles = torch.randn(PLACES, 8, generator=torch.Generator().manual_seed(3))
    return network, {
        "hidden_states": latents(4, 4, 6), "timestep": TIMES.float(), "encoder_hidden_states": text(words - 3, 16),
        "text_embedding_mask": torch.ones(ROWS, words - 3), "encoder_hidden_states_t5": text(3, 16),
        "text_embedding_mask_t5": torch.ones(ROWS, 3), "image_meta_size": torch.ones(ROWS, 6),
        "style": torch.zeros(ROWS, dtype=torch.long), "image_rotary_emb": [angles.cos(), angles.sin()],
    }  # fmt: skip


def cogview4(words: int) -> tuple[nn.Module, dict[str, Any]]:
    network = diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, text_embed_dim=16,
        time_embed_dim=8, condition_dim=4, pos_embed_max_size=8, sample_size=8, rope_axes_dim=(8, 8),
    )  # fmt: skip
    size = torch.ones(ROWS, 2)
    return network, {
        "hidden_states": latents(4, 4, 6), "encoder_hidden_states": text(words, 16), "timestep": TIMES, "original_size": size,
        "target_size": size, "crop_coords": size,
    }  # fmt: skip


def aura_flow(words: int) -> tuple[nn.Module, dict[str, Any]]:
    network = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=3, joint_attention_dim=16, caption_projection_dim=24, out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip
    return network, {"hidden_states": latents(4, 4, 6), "encoder_hidden_states": text(words, 16), "timestep": SHARES}


def wan(words: int) -> tuple[nn.Module, dict[str, Any]]:
    network = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=32, num_layers=2,
    )  # fmt: skip
    return network, {"hidden_states": latents(4, 1, 4, 6), "timestep": TIMES, "encoder_hidden_states": text(words, 16)}


def pixart(words: int) -> tuple[nn.Module, dict[str, Any]]:
    network = diffusers.PixArtTransformer2DModel(
        num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8, cross_attention_dim=24, caption_channels=16,
        num_layers=2, sample_size=8, use_additional_conditions=False,
    )  # fmt: skip
    added = {"resolution": None, "aspect_ratio": None}
    mask = torch.ones(ROWS, words)
    mask[1, 3:] = 0
    return network, {
        "hidden_states": latents(4, 4, 6), "encoder_hidden_states": text(words, 16), "timestep": TIMES, "added_cond_kwargs": added,
        "encoder_attention_mask": mask,
    }  # fmt: skip


def prx(words: int) -> tuple[nn.Module, dict[str, Any]]:
    network = diffusers.PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=16, hidden_size=16, num_heads=2, depth=2, axes_dim=[4, 4]
    )
    mask = torch.ones(ROWS, words, dtype=torch.bool)
    mask[1, -2:] = False
    return network, {
        "hidden_states": latents(4, 4, 6), "timestep": SHARES, "encoder_hidden_states": text(words, 16), "attention_mask": mask,
    }  # fmt: skip


def nucleus(words: int) -> tuple[nn.Module, dict[str, Any]]:
    network = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=3, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4), dense_moe_strategy="leave_first_block_dense", num_experts=2,
        moe_intermediate_dim=8, capacity_factors=1.0, mlp_ratio=16.0,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "experts" in name:
                parameter.normal_(std=0.1)  # they are made without
    return network, {
        "hidden_states": latents(PLACES, 16), "img_shapes": [(1, *GRID)] * ROWS, "encoder_hidden_states": text(words, 16),
        "timestep": SHARES,
    }  # fmt: skip


# By hand: where image and text stand in a joint sequence of W words and 6 places; AuraFlow puts 8 registers before the words, Z-Image
# pads both parts to 32.  Then which output of a block is the image: a number, or "sequence".
JOINT: dict[str, tuple[Callable[[int], tuple[slice, slice]], dict[str, Any]]] = {
    "sd3": (lambda w: (slice(0, 6), slice(6, 6 + w)), {"T": 1}),
    "flux": (lambda w: (slice(w, w + 6), slice(0, w)), {"T": 1, "S": 1}),
    "flux2": (lambda w: (slice(w, w + 6), slice(0, w)), {"T": 1, "S": "sequence"}),
    "chroma": (lambda w: (slice(w, w + 6), slice(0, w)), {"T": 1, "S": "sequence"}),
    "qwen": (lambda w: (slice(w, w + 6), slice(0, w)), {"T": 1}),
    "z_image": (lambda w: (slice(0, 6), slice(32, 32 + w)), {"S": "sequence"}),
    "lumina2": (lambda w: (slice(w, w + 6), slice(0, w)), {"S": "sequence"}),
    "cogview4": (lambda w: (slice(w, w + 6), slice(0, w)), {"T": 0}),
    "prx": (lambda w: (slice(0, 6), slice(0, w)), {"T": "sequence"}),  # only the image asks, of keys that begin with the text
    "nucleus": (lambda w: (slice(0, 6), slice(6, 6 + w)), {"T": "sequence"}),
    "aura_flow": (lambda w: (slice(8 + w, 14 + w), slice(8, 8 + w)), {"T": 1, "S": "sequence"}),
}
BUILDERS = {f.__name__: f for f in (
    sd3, flux, flux2, chroma, qwen, z_image, lumina2, sana, hunyuan_dit, cogview4, aura_flow, wan, pixart, prx, nucleus
)}  # fmt: skip
FAMILIES = tuple(BUILDERS)


def build(family: str, words: int = 7) -> tuple[nn.Module, dict[str, Any]]:
    """A network whose attention is far from even, and one batch of inputs."""
    torch.manual_seed(0)
    network, given = BUILDERS[family](words)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.rpartition(".")[0].endswith(("to_q", "to_k", "add_q_proj", "add_k_proj", "img_qkv_proj")):
                parameter.mul_(4)
    return network.eval().requires_grad_(False), given


def run(network: nn.Module, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        found = network(**given, return_dict=False)[0]
    return torch.stack(found) if isinstance(found, list) else found


def left_over(network: nn.Module) -> int:
    hooks = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_always_called) for m in network.modules()
    )
    return hooks + torch._C._len_torch_function_stack() + sum(map(len, _ACTIVE.values()))


@contextmanager
def seen_calls(network: nn.Module) -> Iterator[dict[str, dict[str, Any]]]:
    """The arguments and the output of each attention's call, by module path, caught where the function is looked up."""
    calls: dict[str, dict[str, Any]] = {}
    running: list[str] = []  # HunyuanDiT pools its text with attention before any block runs
    real = F.scaled_dot_product_attention

    def caught(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        output = real(query, key, value, attn_mask, *args, **kwargs)
        calls[running[-1] if running else ""] = {
            "query": query,
            "key": key,
            "mask": attn_mask,
            "output": output,
            "scale": kwargs.get("scale"),
        }
        return output

    handles: list[Any] = []
    modules = dict(network.named_modules())
    for path in attentions_of(modules):
        handles.append(modules[path].register_forward_pre_hook(lambda m, args, path=path: running.append(path)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", caught)
        yield calls
    for handle in handles:
        handle.remove()


def exact(call: dict[str, Any], keys: slice | None = None) -> Tensor:
    """Softmax in float64, (row, head, query, key); over some keys only, if given."""
    query, key = call["query"].double(), call["key"].double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.mT * (call["scale"] or query.shape[-1] ** -0.5)
    mask = call["mask"]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    return (scores if keys is None else scores[..., keys]).softmax(-1)


@pytest.mark.parametrize("words", [7, 6])  # 6: as many as there are places, so counting cannot tell them apart
@pytest.mark.parametrize("family", FAMILIES)
def test_maps_are_those_of_the_formula_and_the_output_stays(family: str, words: int) -> None:
    network, given = build(family, words)
    with seen_calls(network) as calls:
        before = run(network, given)
    with Recorder(network, maps="*", heads="all") as recorder:
        during = run(network, given)
    assert torch.equal(before, during) and left_over(network) == 0
    spread = 0.0
    for site in recorder.sites:
        call, found = calls[site.module_path], recorder[site.name]
        assert found.shape[-2:] == GRID
        found = found.flatten(3).mT.double()  # (row, head, place, token)
        if not site.kind.startswith("joint"):
            wanted = exact(call)[:, :, :PLACES]  # of Z-Image's first blocks the image stands before its padding
            wanted = wanted[..., :PLACES] if site.kind == "self_map" else wanted
        else:
            image, text_places = JOINT[family][0](words)
            whole = exact(call)
            if site.kind == "joint_back_map":
                wanted = whole[:, :, text_places, image].mT
            elif site.kind == "joint_text_map":
                wanted = exact(call, text_places)[:, :, image]
            elif site.kind == "joint_mass_map":
                wanted = whole[:, :, image, text_places].sum(-1, keepdim=True)
            elif site.kind == "joint_output_map":
                wanted = call["output"][:, :, image].double() @ call["output"][:, :, text_places].double().mT
            else:
                wanted = whole[:, :, image, text_places]
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-4, msg=lambda text, name=site.name: f"{name}: {text}")
        spread = max(spread, float((found.amax(-2) - found.amin(-2)).max()))
    assert spread > 0.2, "maps that are nearly even would hide a swapped axis"


@pytest.mark.parametrize("family", ["sd3", "flux", "lumina2", "qwen"])
def test_head_means_and_words_are_those_of_all_heads_and_words(family: str) -> None:
    network, given = build(family)
    with Recorder(network, maps="*-Joint-*", heads="all") as whole:
        run(network, given)
    with Recorder(network, maps="*-Joint-*", tokens=[4, 1]) as some:
        run(network, given)
    for site in some.sites:
        maps = whole[site.name]
        kept = maps if site.kind == "joint_mass_map" else maps[:, :, [4, 1]]
        # ConceptAttention's product is over the concatenated heads.
        wanted = kept.sum(1, keepdim=True) if site.kind == "joint_output_map" else kept.mean(1, keepdim=True)
        torch.testing.assert_close(some[site.name], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("words", [7, 6])
@pytest.mark.parametrize("family", JOINT)
def test_features_are_the_image_and_never_the_text(family: str, words: int) -> None:
    network, given = build(family, words)
    image, text_places = JOINT[family][0](words)
    outputs = JOINT[family][1]
    copies: dict[str, Any] = {}
    inputs: dict[str, Tensor] = {}
    modules = dict(network.named_modules())
    projections = [] if family == "prx" else ["[TS]-B*-Joint-[QKV]"]  # which are one module there
    with Recorder(network, ["[TS]-B*-Out", "[TS]-B*-Mod", *projections]) as recorder:
        handles = []
        for site in recorder.sites:
            path = site.module_path
            handles.append(modules[path].register_forward_hook(lambda m, a, output, path=path: copies.update({path: output})))
            handles.append(
                modules[path].register_forward_pre_hook(
                    lambda m, args, path=path: inputs.update({path: args[0]}) if args else None
                )
            )
        run(network, given)
        for handle in handles:
            handle.remove()
    for site in recorder.sites:
        whole = (
            inputs[site.module_path] if site.kind == "modulated" and site.module_path in inputs else copies[site.module_path]
        )
        if site.kind == "modulated" and site.module_path not in inputs:
            continue  # an attention without to_q is given its input by name; Flux2's is compared below
        found, wanted_text = recorder[site.name], site.kind == "text_output"
        if site.kind in ("transformer_block", "text_output") and outputs[site.name[0]] != "sequence":
            whole = whole[outputs[site.name[0]] if not wanted_text else 1 - outputs[site.name[0]]]
            stream = whole[:, -words:] if wanted_text else whole  # AuraFlow's registers stand before its words
        else:
            parts = [whole] if isinstance(whole, Tensor) else [w for w in whole if w is not None]
            # Attention outputs of dual-stream blocks come image first; a module over one stream alone is all image.
            stream = (
                parts[0]
                if isinstance(whole, tuple) or parts[0].shape[1] == PLACES
                else parts[0][:, text_places if wanted_text else image]
            )
        torch.testing.assert_close(found.flatten(2).mT, stream, atol=0, rtol=0, msg=lambda m, n=site.name: f"{n}: {m}")
        assert found.shape[2:] == ((words,) if wanted_text else GRID)


def test_the_modulated_input_is_the_norms_output() -> None:
    network, given = build("flux")
    norms: dict[str, Tensor] = {}
    for name in ("transformer_blocks.1.norm1", "single_transformer_blocks.1.norm"):
        network.get_submodule(name).register_forward_hook(lambda m, a, output, name=name: norms.update({name: output[0]}))
    with Recorder(network, "[TS]-B1-Mod") as recorder:
        run(network, given)
    assert torch.equal(recorder["T-B1-Mod"].flatten(2).mT, norms["transformer_blocks.1.norm1"])
    assert torch.equal(recorder["S-B1-Mod"].flatten(2).mT, norms["single_transformer_blocks.1.norm"][:, 7:])
    flux2_network, flux2_given = build("flux2")
    fused = flux2_network.get_submodule("single_transformer_blocks.0.attn.to_qkv_mlp_proj")
    fused.register_forward_pre_hook(lambda m, args: norms.update({"flux2": args[0]}))
    with Recorder(flux2_network, "S-B0-Mod") as recorder:
        run(flux2_network, flux2_given)
    assert torch.equal(recorder["S-B0-Mod"].flatten(2).mT, norms["flux2"][:, 7:])


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_are_foretold_from_the_config(family: str) -> None:
    network, given = build(family)
    size = GRID if family == "sana" else (4, 6)
    with Recorder(network, "[!N]*,Noised-Latent", maps="*", heads="all") as recorder:
        run(network, given)
    foretold = site_shapes(network, size, 7)
    assert set(foretold) - {"Noise"} >= set(recorder.last) and len(recorder.last) > 10
    assert {name: foretold[name] for name in recorder.last} == {name: tuple(t.shape[1:]) for name, t in recorder.last.items()}
    assert {site.name for site in sites_of(network)} == set(foretold)


def test_a_linear_attention_has_no_map_and_says_so() -> None:
    network, _ = build("sana")
    assert not [site.name for site in sites_of(network) if site.kind == "self_map"]
    with pytest.raises(ValueError, match=r"T-B0-Self-Map' matches none.*SanaLinearAttnProcessor2_0.*have no softmax"):
        Recorder(network, maps="T-B0-Self-Map")


def test_a_videos_frames_have_an_axis() -> None:
    network, given = build("wan")
    given["hidden_states"] = latents(4, 3, 4, 6)
    with seen_calls(network) as calls:
        run(network, given)
    with Recorder(network, ["T-B1-Out", "Noised-Latent"], maps="T-B1-*", heads="all") as recorder:
        run(network, given)
    assert recorder["T-B1-Out"].shape == (ROWS, 24, 3, *GRID) and recorder["Noised-Latent"].shape == (ROWS, 4, 3, 4, 6)
    assert recorder["T-B1-Self-Map"].shape == (ROWS, 2, 18, 3, *GRID)
    torch.testing.assert_close(
        recorder["T-B1-Cross-Map"].flatten(3).mT.double(), exact(calls["blocks.1.attn2"]), atol=1e-6, rtol=1e-4
    )


def test_reference_images_follow_the_one_that_is_recorded() -> None:
    network, given = build("flux")
    beside = ids()
    beside[:, 0] = 1
    given["hidden_states"] = torch.cat([given["hidden_states"], latents(PLACES, 4).flip(1)], 1)
    given["img_ids"] = torch.cat([ids(), beside])
    with seen_calls(network) as calls:
        run(network, given)
    with Recorder(network, "T-B0-Out", maps="S-B1-Joint-Map", heads="all") as recorder:
        run(network, given)
    assert recorder["T-B0-Out"].shape[-2:] == GRID
    wanted = exact(calls["single_transformer_blocks.1.attn"])[:, :, 7:13, :7]
    torch.testing.assert_close(recorder["S-B1-Joint-Map"].flatten(3).mT.double(), wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("family", ["lumina2", "z_image"])
def test_prompts_of_different_lengths(family: str) -> None:
    """Each row's own words come first; a shorter row goes on with its padding."""
    network, given = build(family)
    if family == "lumina2":
        given["encoder_attention_mask"][1, 5:] = False
    else:
        given["cap_feats"] = [given["cap_feats"][0], given["cap_feats"][1][:5]]
    with seen_calls(network) as calls:
        run(network, given)
    with Recorder(network, "S-B1-Out", maps="S-B1-Joint-Map", heads="all") as recorder:
        run(network, given)
    whole = exact(calls[f"layers.1.{'attn' if family == 'lumina2' else 'attention'}"])[1]
    image, words = (slice(5, 11), slice(0, 5)) if family == "lumina2" else (slice(0, 6), slice(32, 37))
    torch.testing.assert_close(
        recorder["S-B1-Joint-Map"][1, :, :5].flatten(2).mT.double(), whole[:, image, words], atol=1e-6, rtol=1e-4
    )


def test_nothing_is_left_after_errors_and_nesting() -> None:
    network, given = build("flux")
    before = run(network, given)

    def fail(module: nn.Module, args: Any, output: Any) -> None:
        raise KeyboardInterrupt

    late = network.get_submodule("single_transformer_blocks.0.attn.to_v")
    handle = late.register_forward_hook(fail)
    hooks = left_over(network)
    with pytest.raises(KeyboardInterrupt), Recorder(network, "T-B0-Out", maps="S-B0-Joint-Map"):
        run(network, given)  # in the trace
    assert left_over(network) == hooks
    handle.remove()
    with Recorder(network, maps="joint") as outer, Recorder(network, "S-B1-Out", maps="*-Joint-Map", heads="all") as inner:
        assert torch.equal(before, run(network, given))
        handle = late.register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt):  # in the pass
            run(network, given)
        handle.remove()
        assert torch.equal(before, run(network, given))
    assert left_over(network) == 0 and len(outer.steps) == len(inner.steps) == 2
    torch.testing.assert_close(outer["T-B1-Joint-Map"], inner["T-B1-Joint-Map"].mean(1, keepdim=True))


def test_other_backends_are_seen_through_their_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that is not torch's own, as flash-attn would be; here it is the formula, with axes (row, place, head, width)."""

    def formula(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, scale: Any = None) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        scores = query @ key.mT * query.shape[-1] ** -0.5
        return (scores.softmax(-1) @ value).transpose(1, 2)

    network, given = build("flux")
    with Recorder(network, maps="joint", heads="all") as native:
        run(network, given)
    name = AttentionBackendName.FLASH
    monkeypatch.setitem(_AttentionBackendRegistry._backends, name, formula)
    monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, name, {"query", "key", "value", "attn_mask", "scale"})
    for module in network.modules():
        if hasattr(module, "processor"):
            module.processor._attention_backend = name
    before = run(network, given)
    with Recorder(network, maps="joint", heads="all") as recorder:
        assert torch.equal(before, run(network, given))
    assert _AttentionBackendRegistry._backends[name] is formula
    for site, maps in native.last.items():
        torch.testing.assert_close(recorder[site], maps, atol=1e-5, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")  # of the model's own
def test_an_attention_that_takes_row_by_row_is_refused_unless_there_is_one_row() -> None:
    torch.manual_seed(0)
    network = diffusers.MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=4, text_embed_dim=16,
        time_embed_dim=4, max_sequence_length=16,
    ).eval()  # fmt: skip
    mask = torch.ones(ROWS, 6, dtype=torch.bool)
    given = {
        "hidden_states": latents(4, 2, 4, 6), "encoder_hidden_states": text(6, 16), "timestep": TIMES, "encoder_attention_mask": mask,
    }  # fmt: skip
    with (
        Recorder(network, maps="joint"),
        pytest.raises(ValueError, match="T-B0-Joint-Map attends to 1 rows a call where the pass has 2"),
    ):
        run(network, given)
    with Recorder(network, maps="joint") as recorder:
        run(network, {name: value[:1] for name, value in given.items()})
    assert recorder["T-B0-Joint-Map"].shape == (1, 1, 6, 2, *GRID)


def test_caches_that_skip_blocks_are_refused() -> None:
    network, _ = build("flux")
    network._cache_config = object()
    with pytest.raises(ValueError, match="A cache skips blocks of this network; call its disable_cache"):
        Recorder(network, "T-B0-Out")


def test_a_folder_of_configs_is_enough_to_list_sites(tmp_path: Path) -> None:
    network, _ = build("flux")
    network.save_config(tmp_path / "transformer")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"block_out_channels": [8, 8, 8, 8]}))
    index = {
        "_class_name": "FluxPipeline",
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    found, factor, tokens = load_network_config(tmp_path)
    assert next(found.parameters()).is_meta and (factor, tokens) == (8, 512) and stated_size(found, "tiny") == (128, 128)
    shapes = site_shapes(found, (32, 48), tokens)
    assert shapes["T-B1-Out"] == (32, 16, 24) and shapes["S-B0-Joint-Map"] == (2, 512, 16, 24)
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"transformer": ["diffusers", "Flux9Model"]}))
    with pytest.raises(ValueError, match="is a Flux9Model of diffusers, which this version of diffusers does not have"):
        load_network_config(tmp_path)


def vae(channels: int) -> Any:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8),
        layers_per_block=1, latent_channels=channels, norm_num_groups=4, sample_size=16, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def test_pipelines_are_recorded_while_they_sample() -> None:
    """Stable Diffusion 3 with guidance and Flux without, from embeddings; the latents are the same with and without a recorder."""
    nobody = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    network = build("sd3")[0]
    guided = diffusers.StableDiffusion3Pipeline(
        transformer=network, scheduler=scheduler, vae=vae(4), text_encoder_3=None, tokenizer_3=None, **nobody
    )
    plain = diffusers.FluxPipeline(transformer=build("flux")[0], scheduler=scheduler, vae=vae(1), **nobody)
    prompt = {"prompt_embeds": text(7, 16)[:1], "pooled_prompt_embeds": text(1, 16)[:1, 0]}
    negative = {"negative_prompt_embeds": text(7, 16)[1:], "negative_pooled_prompt_embeds": text(1, 16)[1:, 0]}
    asked = {
        guided: {**prompt, **negative, "height": 8, "width": 12},
        plain: {"prompt_embeds": text(7, 32)[:1], "pooled_prompt_embeds": text(1, 32)[:1, 0], "height": 8, "width": 12},
    }
    for pipeline, request in asked.items():
        pipeline.set_progress_bar_config(disable=True)

        def sample(pipeline: Any = pipeline, request: dict[str, Any] = request) -> Tensor:
            generator = torch.Generator().manual_seed(0)
            return pipeline(**request, num_inference_steps=2, output_type="latent", generator=generator).images

        before = sample()
        with Recorder(pipeline, "T-B1-Out", maps="joint", tokens=[3]) as recorder:
            assert torch.equal(before, sample())
        assert len(recorder.steps) == 2 and left_over(pipeline.transformer) == 0
        rows = ("negative", "prompt") if pipeline is guided else ("prompt",)
        for step in recorder.steps:
            assert step.rows == rows and step.timesteps[0] > 0
            assert step.tensors["T-B1-Out"].shape[2:] == GRID and step.tensors["T-B1-Joint-Map"].shape == (
                len(rows),
                1,
                1,
                *GRID,
            )
    with pytest.raises(ValueError, match=r"Site Noise needs a noise schedule .* FlowMatchEulerDiscreteScheduler does not have"):
        Recorder(plain, "Noise")


# --- one call -------------------------------------------------------------------------------------


@contextmanager
def caught(attention: nn.Module, calls: list[Call], normaliser: bool = False) -> Iterator[None]:
    def attend(call: Call, made: Callable[[], Tensor]) -> Tensor:
        calls.append(call)
        return made()

    tap = Tap(attention, attend, normaliser)
    handles = tap.attach()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Twice(nn.Module):
    """Attends to its input with a mask, grouped keys and a scale, then causally."""

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        first = F.scaled_dot_product_attention(
            query, key, key, scale=0.3, enable_gqa=True, attn_mask=key.new_ones(5, 9).tril(3).bool()
        )
        return first + F.scaled_dot_product_attention(query, key=key, value=key, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("inference", [False, True])
def test_calls_are_numbered_and_carry_mask_scale_and_groups(inference: bool) -> None:
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8)
    calls: list[Call] = []
    module = Twice()
    with torch.inference_mode() if inference else torch.no_grad():
        before = module(query, key)
        with caught(module, calls, normaliser=True):
            assert torch.equal(before, module(query, key))
    assert [call.index for call in calls] == [0, 1]
    for call in calls:
        maps = probabilities(call, heads="all").mT
        torch.testing.assert_close(maps @ key.repeat_interleave(2, 1), call.output)
        if call.normaliser is not None:
            some = probabilities(call, slice(1, 4), slice(2, 6), heads="all", tokens=[3, 0])
            torch.testing.assert_close(some, maps.mT[:, :, [5, 2], 1:4])


def test_the_kernels_normaliser_gives_the_same_map_without_all_scores() -> None:
    query, key = torch.randn(2, 3, 40, 16) * 2, torch.randn(2, 3, 40, 16)
    calls: list[Call] = []

    class Plain(nn.Module):
        def forward(self, query: Tensor, key: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(query, key, key)

    module = Plain()
    with torch.no_grad(), caught(module, calls, normaliser=True):
        module(query, key)
    call = calls[0]
    assert call.normaliser is not None, "torch's CPU kernel no longer gives its normaliser; maps of a word are slow without it"
    whole = probabilities(call, heads="all")
    some = probabilities(call, slice(4, 30), slice(30, 40), heads="all", tokens=[2])
    torch.testing.assert_close(some, whole[:, :, [32], 4:30], atol=1e-6, rtol=1e-5)
    mass = probabilities(call, slice(4, 30), slice(30, 40), sum_tokens=True)
    torch.testing.assert_close(mass, whole[:, :, 30:40, 4:30].mean(1, keepdim=True).sum(2, keepdim=True), atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="Token 10 was asked for, where there are 10"):
        probabilities(call, slice(4, 30), slice(30, 40), tokens=[10])


def test_output_products_are_conceptattentions() -> None:
    output = torch.randn(1, 4, 12, 8)
    call = Call(output, output, output, None, 1.0, output=output)
    found = output_products(call, slice(3, 12), slice(0, 3))
    vectors = output.transpose(1, 2).flatten(2)  # concatenated heads
    torch.testing.assert_close(found[0, 0], torch.einsum("cd,pd->cp", vectors[0, :3], vectors[0, 3:]))


def test_a_second_call_is_recorded_when_asked_for(fresh_pipeline: Callable[[str], Any]) -> None:
    """As an IP-Adapter makes it: once more, with image prompts as keys."""
    pipeline = fresh_pipeline("sd2")
    attention = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    plain = attention.processor
    prompts = torch.randn(1, 2, 4, 8)

    class Adapter:
        def __call__(self, attn: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            output = plain(attn, hidden, *args, **kwargs)
            query = attn.to_q(hidden).unflatten(-1, (2, 8)).transpose(1, 2)
            return output + F.scaled_dot_product_attention(query, prompts, prompts).transpose(1, 2).flatten(2)

    attention.set_processor(Adapter())
    name = "M-R0-B0-Cross-Map"
    arguments = (torch.randn(1, 4, 8, 8), 10, torch.randn(1, 77, 16))
    with (
        torch.no_grad(),
        Recorder(pipeline, maps=name, heads="all") as own,
        Recorder(pipeline, maps=name, heads="all", call=1) as second,
    ):
        pipeline.unet(*arguments)
    assert own[name].shape[2] == 77 and second[name].shape[2] == 4
    with Recorder(pipeline, maps=name, call=2), pytest.raises(ValueError, match=r"Adapter made 2 calls .* call 2"):
        pipeline.unet(*arguments)


# --- massive channels -----------------------------------------------------------------------------


def test_massive_channels_are_named_and_zeroed_in_each_row() -> None:
    network, given = build("flux")
    with Recorder(network, "T-B1-*Out") as whole:
        run(network, given)
    with Recorder(network, "T-B1-*Out", zero_massive=2) as zeroed:
        run(network, given)
    feature, cut = whole["T-B1-Out"], zeroed["T-B1-Out"]
    channels, means = massive_channels(feature, 2)
    for row in range(ROWS):
        by_size = sorted(range(feature.shape[1]), key=lambda c, row=row: -abs(float(feature[row, c].mean())))[:2]
        assert channels[row].tolist() == by_size
        assert means[row].tolist() == pytest.approx([float(feature[row, c].mean()) for c in by_size])
        rest = [c for c in range(feature.shape[1]) if c not in by_size]
        assert not cut[row, by_size].any() and torch.equal(cut[row, rest], feature[row, rest])
    assert torch.equal(whole["T-B1-Text-Out"], zeroed["T-B1-Text-Out"])
