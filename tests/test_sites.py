"""Names of places: paper names and paths, presets and globs, and that every listed place can be recorded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffprobe.knockout import cross_attentions
from diffprobe.models import DiffusionModel
from diffprobe.recorder import Recorder, site_shapes
from diffprobe.sites import PAPER_SITES, NotApplicableError, Site, describe, list_sites, select_sites

# The six sites of the paper, written out by hand.
PAPER_PATHS = {
    "D-L2-R0-B0-Cross-Q": "down_blocks.2.attentions.0.transformer_blocks.0.attn2.to_q",
    "U-L1-R1-B0-Cross-Q": "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q",
    "U-L1-R1-B0-Out": "up_blocks.1.attentions.1.transformer_blocks.0",
    "U-L1-R2-B0-Cross-Q": "up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_q",
    "U-L2-R1-B0-Cross-Q": "up_blocks.2.attentions.1.transformer_blocks.0.attn2.to_q",
    "U-L2-R2-Res-Out": "up_blocks.2.resnets.2",
}


def names(sites: list[Site]) -> list[str]:
    return [site.name for site in sites]


@pytest.fixture(scope="module")
def sd2_sites(tiny: Callable[[str], DiffusionModel]) -> list[Site]:
    return tiny("sd2").sites


def test_paper_names_are_these_paths(tiny: Callable[[str], DiffusionModel]) -> None:
    assert tuple(PAPER_PATHS) == PAPER_SITES
    for family in ("sd1", "sd2", "sd2v"):
        found = {site.name: site.path for site in tiny(family).sites}
        assert {name: found[name] for name in PAPER_PATHS} == PAPER_PATHS


def test_path_name_and_glob_find_the_same_site(sd2_sites: list[Site]) -> None:
    for name, path in PAPER_PATHS.items():
        assert select_sites(sd2_sites, name) == select_sites(sd2_sites, path) == select_sites(sd2_sites, [path, name])
        assert names(select_sites(sd2_sites, name)) == [name]
    assert sorted(names(select_sites(sd2_sites, "paper"))) == sorted(PAPER_PATHS)
    assert names(select_sites(sd2_sites, "U-L1-R?-B0-Cross-Q")) == [f"U-L1-R{r}-B0-Cross-Q" for r in range(3)]
    by_path = names(select_sites(sd2_sites, "up_blocks.1.*.attn2.to_q"))
    assert by_path == [f"U-L1-R{r}-B0-Cross-Q" for r in range(3)]
    # A module and its map share a path but for the ending.
    attention = PAPER_PATHS["U-L1-R1-B0-Cross-Q"].removesuffix(".to_q")
    assert names(select_sites(sd2_sites, attention)) == ["U-L1-R1-B0-Cross-Out"]
    assert names(select_sites(sd2_sites, f"{attention}.map")) == ["U-L1-R1-B0-Cross-Map"]


def test_selection_keeps_the_models_order_and_each_site_once(sd2_sites: list[Site]) -> None:
    forwards = select_sites(sd2_sites, ["*-Cross-Q", "U-L1-*"])
    assert forwards == select_sites(sd2_sites, ["U-L1-*", "*-Cross-Q", "U-L1-R1-B0-Cross-Q"])
    assert forwards == [site for site in sd2_sites if site in forwards] and len(set(forwards)) == len(forwards)
    assert select_sites(sd2_sites, []) == []


def test_presets(tiny: Callable[[str], DiffusionModel]) -> None:
    unet, transformer = tiny("sd2").sites, tiny("pixart").sites
    blocks = ["D-L0-Out", "D-L1-Out", "D-L2-Out", "D-L3-Out", "M-Out", "U-L0-Out", "U-L1-Out", "U-L2-Out", "U-L3-Out"]
    assert sorted(names(select_sites(unet, "blocks"))) == blocks
    assert names(select_sites(transformer, "blocks")) == ["T-B0-Out", "T-B1-Out"]
    assert {site.kind for site in select_sites(unet, "cross")} == {"cross_map"}
    assert {site.kind for site in select_sites(unet, "self")} == {"self_map"}
    # 6 down, 1 middle and 9 up blocks with attention.
    assert len(select_sites(unet, "cross")) == len(select_sites(unet, "self")) == 16
    with pytest.raises(ValueError, match="Site '\\*-Cross\\*-Map' of the preset 'cross' matches none"):
        select_sites([site for site in unet if not site.is_map], "cross")
    with pytest.raises(ValueError, match="preset 'blocks' matches none"):
        select_sites([site for site in unet if site.kind == "resnet"], "blocks")


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [
        ("U-L1-R1-B0-Cross-q", "U-L1-R1-B0-Cross-Q"),
        ("up_blocks.1.resnets.7", "up_blocks.1.resnets.1"),
        ("U-L9-Out", "U-L1-Out"),
    ],
)
def test_nothing_matched_names_the_nearest(sd2_sites: list[Site], asked: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"Site '{asked}' matches none of this model's {len(sd2_sites)} sites") as error:
        select_sites(sd2_sites, ["Noise", asked])
    assert nearest in str(error.value) and "diffprobe sites MODEL" in str(error.value)
    with pytest.raises(ValueError, match="Site '' matches none"):
        select_sites(sd2_sites, [""])


def test_the_papers_sites_are_missing_where_the_topology_differs(tiny: Callable[[str], DiffusionModel]) -> None:
    with pytest.raises(ValueError, match="'U-L2-R1-B0-Cross-Q' of the preset 'paper' matches none"):
        select_sites(tiny("sdxl").sites, "paper")


def test_a_unets_sites_are_not_applicable_to_a_transformer() -> None:
    blocks = [Site(f"T-B{n}-Out", f"blocks.{n}", "transformer_block", "") for n in range(18)]
    with pytest.raises(NotApplicableError, match=r"Site 'M-Out' is a place of a UNet.*by relative depth.*--sites T-B9-Out\."):
        select_sites(blocks, "M-Out")
    # Stages 2, 6 and 7 of the UNet's nine, down, middle and up, of 18 blocks.
    with pytest.raises(NotApplicableError, match=r"'paper' names places of a UNet.*--sites T-B5-Out,T-B13-Out,T-B15-Out\."):
        select_sites(blocks, "paper")
    with pytest.raises(ValueError, match="matches none of this model's 18 sites") as error:
        select_sites(blocks, "T-B99-Out")
    assert not isinstance(error.value, NotApplicableError)


def test_names_and_paths_are_unique(model: DiffusionModel) -> None:
    sites = model.sites
    inside = sites[1:-1]  # the latent that goes in and the noise that comes out belong to the whole network
    assert len({site.name for site in sites}) == len(sites) and len({site.path for site in inside}) == len(inside)
    assert sites[0] == Site("Noised-Latent", "", "input", "")
    modules = dict(model.network.named_modules())
    assert all(site.module_path in modules and site.anchor in modules for site in sites)
    assert sites[-1] == Site("Noise", "", "prediction", "")


def test_kinds_of_every_listed_part(model: DiffusionModel) -> None:
    attention = {f"{a}_{part}" for a in ("self", "cross") for part in ("query", "key", "value", "output", "map")}
    common = attention | {"input", "transformer_block", "prediction"}
    assert {site.kind for site in model.sites} == common | ({"modulated"} if model.family == "pixart" else {"block", "resnet"})


@pytest.mark.parametrize(
    "path",
    ["conv_in", "down_blocks", "down_blocks.0.downsamplers.0.conv", "up_blocks.1.attentions.1", "up_blocks.1.attentions",
     "up_blocks.1.attentions.1.transformer_blocks.0.ff", "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_out.0",
     "up_blocks.2.resnets.2.conv1", "transformer_blocks", "transformer_blocks.3.norm1", "proj_out"],
)  # fmt: skip
def test_other_modules_are_no_sites(path: str) -> None:
    assert describe(path) == []


def test_list_sites_of_bare_paths() -> None:
    found = list_sites(["", "mid_block", "mid_block.resnets.1", "mid_block.attentions.0.transformer_blocks.11.attn1.to_v"])
    assert names(found) == ["Noised-Latent", "M-Out", "M-R1-Res-Out", "M-R0-B11-Self-V", "Noise"]
    assert [site.anchor for site in found] == ["", "mid_block", "mid_block.resnets.1", "mid_block.attentions.0", ""]


def test_every_site_is_recorded_in_the_shape_that_was_foretold(model: DiffusionModel) -> None:
    latent_size = (8, 16)
    text = model.encode_text(["a red star", None])
    with Recorder(model, "*", maps="*", heads="all") as recorder:
        model.denoise(torch.randn(2, 4, *latent_size), torch.tensor([10, 500]), text)
    assert set(recorder.last) == {site.name for site in model.sites}
    recorded = {name: tuple(tensor.shape) for name, tensor in recorder.last.items()}
    foretold = site_shapes(model.network, latent_size, model.prompt_tokens)
    assert recorded == {name: (2, *shape) for name, shape in foretold.items()}
    assert foretold["Noise"] == (4, *latent_size)


def test_shapes_of_some_sites_written_out(tiny: Callable[[str], DiffusionModel]) -> None:
    shapes: dict[str, Any] = site_shapes(tiny("sd2").network, (8, 16), 77)
    assert shapes["D-L2-R0-B0-Cross-Q"] == (16, 2, 4)
    assert shapes["U-L2-R2-Res-Out"] == (16, 4, 8)
    assert shapes["U-L3-R0-B0-Cross-K"] == (8, 77)
    assert shapes["U-L1-R1-B0-Cross-Map"] == (2, 77, 2, 4)
    assert shapes["U-L1-R1-B0-Self-Map"] == (2, 8, 2, 4)
    assert site_shapes(tiny("pixart").network, (8, 16), 120)["T-B1-Cross-Map"] == (3, 120, 4, 8)


def test_several_patterns_in_one_text(tiny: Callable[[str], DiffusionModel]) -> None:
    sites = tiny("sd2").sites
    assert names(select_sites(sites, "M-Out, D-L0-Out")) == names(select_sites(sites, ["M-Out", "D-L0-Out"])) != []
    with pytest.raises(ValueError, match="Site 'nothing' matches none"):
        select_sites(sites, "M-Out,nothing")


def test_attentions_are_named_by_what_they_attend_to(fresh_pipeline: Callable[..., Any]) -> None:
    """With only_cross_attention the first attention of a block sees the prompt too, in some blocks."""
    model = DiffusionModel(fresh_pipeline("sd2", only_cross_attention=[True, False, False, False]))
    text = model.encode_text(["a red star"])
    with Recorder(model, "*", maps=["cross", "self"], heads="all", tokens=[0, 1]) as recorder:
        model.denoise(torch.zeros(1, 4, 8, 8), torch.tensor([10]), text)
    found = recorder.last
    kinds = {site.name: site.kind for site in recorder.sites}
    assert kinds["D-L0-R0-B0-Cross1-Map"] == kinds["D-L0-R0-B0-Cross-Map"] == "cross_map"
    assert kinds["D-L1-R0-B0-Self-Map"] == "self_map" and "D-L0-R0-B0-Self-Map" not in kinds
    assert found["D-L0-R0-B0-Cross1-K"].shape == (1, 8, 77) and found["D-L0-R0-B0-Cross1-Map"].shape[2] == 2
    assert found["D-L1-R0-B0-Self-Map"].shape[2] == 16
    foretold = site_shapes(model.network, (8, 8), 77)
    assert set(foretold) == set(found)
    assert all(foretold[name] == tuple(found[name].shape[1:]) for name in found if not name.endswith("-Map"))
    assert set(cross_attentions(model.network)) == {site.module_path for site in model.sites if site.kind == "cross_map"}, (
        "a knock-out cuts every way by which the prompt gets in"
    )


def test_shapes_of_a_network_with_one_text_width_a_block(fresh_pipeline: Callable[..., Any]) -> None:
    network = fresh_pipeline("sd2", cross_attention_dim=[16, 16, 16, 16]).unet
    assert site_shapes(network, (8, 16), 77) == site_shapes(fresh_pipeline("sd2").unet, (8, 16), 77)
