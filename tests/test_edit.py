"""Edits of what a network computes: what is named changes as asked, and nothing else does.

Families are the tiny ones of `conftest` and of `test_families`.  The oracles are the modules' own hooks, written out by hand, and attention
as a formula in float64.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from diffprobe import edit as edits
from diffprobe.edit import _EDITS, Edit
from diffprobe.models import DiffusionModel
from diffprobe.recorder import Recorder
from tests import test_families as families
from tests.conftest import FAMILIES as UNETS

PROMPT = "a red star on the left"
ROWS = ["a red star on the left", "a blue circle"]
# A block, a text stream or a cross-attention's keys, what an attention projects, and a map, where the family has them.
SITES = {
    "sd1": ("U-L1-Out", "M-R0-B0-Cross-K", "D-L0-R0-B0-Self-Q", "U-L1-R0-B0-Cross-Map", "D-L1-R0-B0-Self-Map"),
    "sd2": ("D-L1-Out", "U-L2-R1-B0-Cross-V", "U-L1-R1-Res-Out", "U-L3-R0-B0-Cross-Map"),
    "sdxl": ("M-Out", "U-L0-R1-B0-Cross-K", "D-L2-R0-B1-Out", "U-L0-R0-B1-Cross-Map"),
    "pixart": ("T-B0-Out", "T-B1-Cross-K", "T-B0-Mod", "T-B1-Cross-Map", "T-B0-Self-Map"),
    "sd3": ("T-B0-Out", "T-B1-Text-Out", "T-B1-Mod", "T-B1-Joint-Q", "T-B2-Joint-Map"),
    "flux": ("T-B0-Out", "T-B0-Text-Out", "S-B0-Out", "T-B1-Joint-V", "S-B1-Joint-Map"),
    "flux2": ("T-B0-Out", "S-B0-Out", "T-B0-Joint-Map"),
    "chroma": ("T-B0-Text-Out", "S-B0-Out", "S-B0-Joint-Map"),
    "qwen": ("T-B0-Out", "T-B0-Text-Out", "T-B1-Joint-Map"),
    "z_image": ("S-B0-Out", "S-B1-Joint-Map"),
    "lumina2": ("S-B0-Out", "S-B1-Joint-Map"),
    "sana": ("T-B0-Out", "T-B1-Cross-K", "T-B1-Cross-Map"),
    "hunyuan_dit": ("T-B0-Out", "T-B0-Cross-V", "T-B1-Cross-Map"),
    "cogview4": ("T-B0-Out", "T-B0-Text-Out", "T-B1-Joint-Map"),
    "aura_flow": ("T-B0-Out", "S-B0-Out", "S-B0-Joint-Map"),
    "wan": ("T-B0-Out", "T-B0-Cross-K", "T-B1-Cross-Map"),
}
Run = Callable[[], Tensor]


@pytest.fixture(params=SITES)
def family(request: pytest.FixtureRequest, tiny: Callable[[str], Any]) -> tuple[Any, Run, tuple[str, ...]]:
    """What is edited, a pass of two rows with different texts, and sites."""
    name = request.param
    if name in UNETS:
        model = tiny(name)
        return model, denoising(model), SITES[name]
    network, given = families.build(name)
    return network, lambda: families.run(network, given), SITES[name]


def denoising(model: DiffusionModel, prompts: list[str] = ROWS, timestep: int = 50) -> Run:
    noised = torch.randn(len(prompts), model.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    steps, text = torch.full((len(prompts),), timestep), model.encode_text(prompts)
    return lambda: model.denoise(noised, steps, text)


def hooks(model: Any) -> int:
    network = getattr(model, "network", model)
    return families.left_over(network) + sum(map(len, _EDITS.values()))


# --- the rules, in each family ----------------------------------------------------------------------


def test_patching_back_is_nothing_and_other_rows_keep_their_bits(family: tuple[Any, Run, tuple[str, ...]]) -> None:
    model, run, sites = family
    before = run()
    with Recorder(
        model, [s for s in sites if not s.endswith("Map")], maps=[s for s in sites if s.endswith("Map")], heads="all"
    ) as clean:
        run()
    with Edit(model, sites, edits.patch(clean)):
        assert torch.equal(before, run())
    for site in sites:
        change = edits.swap([1, 0]) if site.endswith("Map") else lambda x: x * -1.5
        with Edit(model, site, change, rows=[1]) as edit:
            after = run()
        assert edit.changed and torch.equal(after[0], before[0]), site
        assert not torch.equal(after[1], before[1]), site
    assert hooks(model) == 0


def test_a_recorder_sees_the_edited_value_whichever_was_entered_first(family: tuple[Any, Run, tuple[str, ...]]) -> None:
    model, run, sites = family
    for site in sites:
        kind: dict[str, Any] = {"maps": site} if site.endswith("Map") else {"sites": site}
        if site.endswith("Joint-Map"):
            kind = {"maps": [site, site.replace("-Map", "-Mass-Map")]}
        with Recorder(model, **kind, heads="all") as clean:
            run()
        wanted = clean[site].flip(0)
        if site.endswith(
            "Joint-Map"
        ):  # the words' share of a softmax, of which the rest stays and all is brought to the sum of 1
            wanted = wanted / (1 - clean[site.replace("-Map", "-Mass-Map")] + wanted.sum(2, keepdim=True))
        with (
            Recorder(model, **kind, heads="all") as first,
            Edit(model, site, edits.swap([1, 0])),
            Recorder(model, **kind, heads="all") as last,
        ):
            run()
        for recorder in (first, last):
            torch.testing.assert_close(
                recorder[site], wanted, atol=2e-5, rtol=1e-4, msg=lambda text, site=site: f"{site}: {text}"
            )
    assert hooks(model) == 0


def test_nothing_is_left_after_errors_interrupts_and_nesting(family: tuple[Any, Run, tuple[str, ...]]) -> None:
    model, run, sites = family
    before = run()

    def interrupt(_: Tensor) -> Tensor:
        raise KeyboardInterrupt

    for fault in (interrupt, lambda x: x[..., :1]):
        with (
            pytest.raises((KeyboardInterrupt, ValueError)),
            Edit(model, sites[0], lambda x: x + 1),
            Recorder(model, sites[0]),
            Edit(model, sites[-1], fault),
        ):
            run()
        assert hooks(model) == 0
    assert torch.equal(before, run())
    with Edit(model, sites[0], edits.add(1.0)), Edit(model, sites[0], lambda x: x - 1.0), Recorder(model, sites[0]) as recorder:
        run()
    with Recorder(model, sites[0]) as clean:
        run()
    torch.testing.assert_close(recorder[sites[0]], clean[sites[0]] + 1.0 - 1.0, atol=0, rtol=0)


# --- what each change does --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd(tiny: Callable[[str], Any]) -> DiffusionModel:
    return tiny("sd2")


def value_after(model: Any, run: Run, site: str, change: Any, **named: Any) -> tuple[Tensor, Tensor]:
    """A site before and after an edit."""
    kind = {"maps": site} if site.endswith("Map") else {"sites": site}
    with Recorder(model, **kind, heads="all") as clean:
        run()
    with Edit(model, site, change, **named), Recorder(model, **kind, heads="all") as recorder:
        run()
    return clean[site], recorder[site]


def test_changes_are_their_formulas(sd: DiffusionModel) -> None:
    run, site = denoising(sd), "U-L1-Out"
    old = value_after(sd, run, site, edits.zero())[0]
    vector, other = torch.randn(2, old.shape[1], generator=torch.Generator().manual_seed(3))
    whole = np.random.default_rng(0).normal(size=old.shape[1:])
    spread = vector.view(1, -1, 1, 1)
    unit = (vector / vector.norm()).view(1, -1, 1, 1)
    q, _ = np.linalg.qr(torch.stack([vector, other]).numpy().T.astype(np.float64))
    span = torch.from_numpy(q @ q.T).float()
    formulas: list[tuple[Any, Tensor]] = [
        (edits.zero(), old * 0), (edits.set_to(2.0), old * 0 + 2), (edits.set_to(vector), spread.expand_as(old)),
        (edits.patch(whole), torch.from_numpy(whole).float().expand_as(old)), (edits.add(vector, -3.0), old - 3 * spread),
        (edits.mean(), old.mean((2, 3), keepdim=True).expand_as(old)), (edits.mean(vector), spread.expand_as(old)),
        (edits.project_out(vector), old - unit * (old * unit).sum(1, keepdim=True)),
        (edits.project_out(np.stack([vector, other])), old - torch.einsum("cd,rdyx->rcyx", span, old)),
        (edits.swap([1, 1]), old[[1, 1]]),
    ]  # fmt: skip
    for change, wanted in formulas:
        found = value_after(sd, run, site, change)[1]
        torch.testing.assert_close(
            found, wanted, atol=1e-5, rtol=1e-5, msg=lambda text, change=change: f"{change.name}: {text}"
        )


def test_places_tokens_and_timesteps_are_the_only_ones(sd: DiffusionModel) -> None:
    run = denoising(sd)
    mask = np.zeros((4, 4), bool)
    mask[1, 2:] = True
    old, new = value_after(sd, run, "U-L2-R0-B0-Cross-Q", edits.zero(), places=mask, rows=[1])
    cells = torch.nn.functional.adaptive_max_pool2d(torch.from_numpy(mask)[None, None].float(), old.shape[-2:])[0, 0].bool()
    assert 0 < cells.sum() < cells.numel() and torch.equal(old[0], new[0]) and not new[1][:, cells].any()
    assert torch.equal(old[1][:, ~cells], new[1][:, ~cells])
    old, new = value_after(sd, run, "M-R0-B0-Cross-K", edits.zero(), tokens=[2, 3])
    assert not new[:, :, 2:4].any() and torch.equal(old[:, :, 4:], new[:, :, 4:]) and torch.equal(old[:, :, :2], new[:, :, :2])
    before = run()
    for when, hit in ((50, True), (range(40, 60), True), ({1, 2}, False), (lambda t: t > 60, False)):
        with warnings.catch_warnings(action="ignore"), Edit(sd, "M-Out", edits.zero(), timesteps=when) as edit:
            assert torch.equal(run(), before) != hit and bool(edit.changed) == hit
    said = "The edit zero at M-Out changed nothing: none of 1 passes was at its timesteps"
    with pytest.warns(UserWarning, match=said), Edit(sd, "M-Out", edits.zero(), timesteps=range(60, 70)):
        run()


def test_a_down_blocks_skip_connection_is_edited_too(sd: DiffusionModel) -> None:
    run = denoising(sd)
    block = sd.network.down_blocks[1]

    def by_hand(module: nn.Module, args: Any, output: Any) -> Any:
        hidden, skips = output
        assert skips[-1] is hidden
        return hidden * 2, (*skips[:-1], hidden * 2)

    handle = block.register_forward_hook(by_hand)
    wanted = run()
    handle.remove()
    with Edit(sd, "D-L1-Out", lambda x: x * 2):
        assert torch.equal(run(), wanted)


def test_an_edited_attention_input_reaches_query_key_and_value() -> None:
    network, given = families.build("sd3")
    attention = network.transformer_blocks[1].attn
    handle = attention.register_forward_pre_hook(
        lambda m, a, k: (a, {**k, "hidden_states": k["hidden_states"] * 2}), with_kwargs=True
    )
    wanted = families.run(network, given)
    handle.remove()
    with Edit(network, "T-B1-Mod", lambda x: x * 2):
        torch.testing.assert_close(families.run(network, given), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("factor", [0.0, 0.5, 6.0])
def test_scaling_a_words_attention_while_its_maps_are_recorded(
    fresh_pipeline: Callable[..., Any], factor: float, eager: bool
) -> None:
    model = DiffusionModel(fresh_pipeline("sd2"))
    if eager:
        model.network.set_attn_processor(AttnProcessor())
    run, site = denoising(model, [PROMPT]), "U-L1-R1-B0-Cross-Map"
    at = [
        i
        for i, (a, b) in enumerate(model.encode_text([PROMPT]).spans[0].tolist())
        if PROMPT[a:b] in ("st", "ar", "star") and b > a
    ]
    assert len(at) == 2  # "star" is two sub-tokens here
    old, new = value_after(model, run, site, edits.scale_token("star", factor), prompt=PROMPT)
    weights = torch.ones(77)
    weights[at] = factor
    wanted = old.double() * weights.view(1, 1, -1, 1, 1)
    torch.testing.assert_close(new.double(), wanted / wanted.sum(2, keepdim=True), atol=1e-6, rtol=1e-4)
    values = []
    attention = model.network.up_blocks[1].attentions[1].transformer_blocks[0].attn2
    handle = attention.to_out[0].register_forward_pre_hook(lambda m, a: values.append(a[0]))
    with Recorder(model, "U-L1-R1-B0-Cross-V") as recorder, Edit(model, site, edits.scale_token("star", factor), prompt=PROMPT):
        run()
    handle.remove()
    value = recorder["U-L1-R1-B0-Cross-V"].unflatten(1, (attention.heads, -1)).double()
    output = torch.einsum("rhtp,rhct->rphc", (wanted / wanted.sum(2, keepdim=True)).flatten(3), value).flatten(2)
    torch.testing.assert_close(values[0].double(), output, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["sd3", "flux", "lumina2"])
def test_scaling_a_token_of_a_joint_attention(name: str) -> None:
    """The words' whole row of a joint softmax is scaled; text tokens ask as before."""
    network, given = families.build(name)
    site = {"sd3": "T-B1-Joint", "flux": "S-B1-Joint", "lumina2": "S-B1-Joint"}[name]
    wanted = ["Map", "Mass-Map", "Back-Map"]
    with Recorder(network, maps=[f"{site}-{kind}" for kind in wanted], heads="all") as clean:
        families.run(network, given)
    change = edits.scale_token([2, 4], 3.0)
    with (
        Edit(network, f"{site}-Map", change, rows=[0]),
        Recorder(network, maps=[f"{site}-{kind}" for kind in wanted], heads="all") as recorder,
    ):
        families.run(network, given)
    old, mass = clean[f"{site}-Map"].double(), clean[f"{site}-Mass-Map"].double()
    scaled = old.clone()
    scaled[:, :, [2, 4]] *= 3
    total = 1 - mass + scaled.sum(2, keepdim=True)
    torch.testing.assert_close(recorder[f"{site}-Map"][0].double(), (scaled / total)[0], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(recorder[f"{site}-Map"][1], clean[f"{site}-Map"][1], atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(recorder[f"{site}-Back-Map"], clean[f"{site}-Back-Map"], atol=1e-7, rtol=1e-5)


def test_scaling_in_some_places_and_another_map(sd: DiffusionModel) -> None:
    run, site = denoising(sd), "U-L3-R0-B0-Cross-Map"
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:5, 1:4] = True
    old, new = value_after(sd, run, site, edits.scale_token([1], 5.0), places=mask)
    assert torch.equal(old[..., ~mask], new[..., ~mask]) and (new[:, :, 1, mask] > old[:, :, 1, mask]).all()
    even = torch.full_like(old, 2.0)
    torch.testing.assert_close(
        value_after(sd, run, site, edits.replace_map(even))[1], torch.full_like(old, 1 / 77), atol=1e-6, rtol=1e-4
    )
    with pytest.raises(ValueError, match="zero leaves places of site U-L3-R0-B0-Cross-Map without attention"):
        value_after(sd, run, site, edits.zero())


@pytest.mark.parametrize("name", ["sd2", "sdxl", "pixart"])
def test_another_texts_keys_and_values(tiny: Callable[[str], DiffusionModel], name: str) -> None:
    model = tiny(name)
    other = denoising(model, ["a blue circle"] * 2)
    with Edit(model, "*-Cross*-Map", edits.swap_prompt("a blue circle"), rows=[0]):
        found = denoising(model)()
    plain = denoising(model)()
    assert torch.equal(found[1], plain[1]) and not torch.allclose(found[0], plain[0], atol=1e-4)
    if name != "sdxl":  # whose pooled text goes in beside the timestep
        assert torch.equal(found[0], other()[0])


@pytest.mark.parametrize("name", ["sd2", "sd3", "flux", "flux2", "cogview4", "pixart", "z_image"])
def test_a_skipped_block_is_the_identity(tiny: Callable[[str], Any], name: str) -> None:
    if name in UNETS:
        model: Any = tiny(name)
        run, network = denoising(model), tiny(name).network
    else:
        model, given = families.build(name)
        run, network = lambda: families.run(model, given), model
    site, path = {
        "sd2": ("U-L1-R0-B0-Out", "up_blocks.1.attentions.0.transformer_blocks.0"),
        "z_image": ("S-B0-Out", "layers.0"),
    }.get(name, ("T-B0-Out", "transformer_blocks.0"))
    block = network.get_submodule(path)

    def identity(hidden_states: Tensor, encoder_hidden_states: Any = None, *args: Any, **kwargs: Any) -> Any:
        if name in ("sd3", "flux", "flux2"):
            return encoder_hidden_states, hidden_states
        return (hidden_states, encoder_hidden_states) if name == "cogview4" else hidden_states

    with Edit(model, site, edits.skip()):
        found = run()
    plain = run()
    with Edit(model, site, edits.skip(), rows=[1]):
        some = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "forward", identity)
        assert torch.equal(found, run())
    assert torch.equal(some[0], plain[0]) and torch.equal(some[1], found[1]) and not torch.equal(some[1], plain[1])


# --- pipelines --------------------------------------------------------------------------------------


@pytest.fixture
def sampling(fresh_pipeline: Callable[..., Any]) -> Iterator[tuple[Any, Run]]:
    pipeline = fresh_pipeline("sd2")

    def sample() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline(PROMPT, height=16, width=16, num_inference_steps=3, generator=generator, output_type="latent").images

    yield pipeline, sample


def test_while_a_pipeline_samples(sampling: tuple[Any, Run]) -> None:
    pipeline, sample = sampling
    before = sample()
    with Recorder(pipeline, "U-L1-Out", maps="U-L1-*-Cross-Map", heads="all") as clean:
        sample()
    times = [step.timesteps[0] for step in clean.steps]
    with Edit(pipeline, ["U-L1-Out", "U-L1-*-Cross-Map"], edits.patch(clean)) as edit:  # of each timestep its own
        assert torch.equal(before, sample()) and edit.passes == 3
    with (
        Edit(pipeline, "U-L1-Out", edits.add(1.0), rows="prompt", timesteps={times[1]}),
        Edit(pipeline, "*-Cross-Map", edits.scale_token("star", 8.0), prompt=PROMPT, timesteps=lambda t: t < times[1]),
        Recorder(pipeline, "U-L1-Out", maps="U-L1-R0-B0-Cross-Map", heads="all") as recorder,
    ):
        assert not torch.equal(before, sample())
    same = [torch.equal(a.tensors["U-L1-Out"], b.tensors["U-L1-Out"]) for a, b in zip(clean.steps, recorder.steps, strict=True)]
    assert same == [True, False, False]
    shift = recorder.steps[1].tensors["U-L1-Out"] - clean.steps[1].tensors["U-L1-Out"]
    assert not shift[0].any() and torch.allclose(shift[1], torch.ones(()), atol=1e-5)
    with (
        Edit(pipeline, "U-L1-Out", edits.zero(), rows="negative"),
        pytest.raises(ValueError, match="This pass has no rows 'negative'; it has prompt"),
    ):
        pipeline(PROMPT, height=16, width=16, num_inference_steps=1, guidance_scale=1.0)
    assert hooks(pipeline.unet) == 0


# --- what would not reach is refused by name --------------------------------------------------------


def test_edits_that_would_not_reach_are_refused_at_once(fresh_pipeline: Callable[..., Any], sd: DiffusionModel) -> None:
    refused: list[tuple[str, Any, dict[str, Any], str]] = [
        ("M-Out", edits.scale_token("star", 2.0), {}, "Which tokens spell 'star' is not known without a prompt"),
        ("*-Cross-Map", edits.scale_token("green", 2.0), {"prompt": PROMPT}, "'green' is not a word of the prompt 'a red star on the left'"),
        ("M-Out", edits.scale_token([1], 2.0), {}, "scale_token does not reach site M-Out: it has no attention on tokens"),
        ("M-Out", edits.zero(), {"tokens": [1]}, "zero does not reach site M-Out: it has no prompt tokens"),
        ("M-R0-B0-Cross-K", edits.zero(), {"places": np.ones((2, 2))}, "it has no places in the image"),
        ("M-R0-B0-Self-Map", edits.swap_prompt("a"), {}, "it is no cross-attention"),
        ("M-Out", edits.replace_map(1.0), {}, "it is no attention map; use patch"),
        ("M-R0-B0-Cross-Out", edits.skip(), {}, "it is no block"),
        ("U-L1-R0-Res-Out", edits.skip(), {}, "it takes and gives 32 and 16 channels, so it cannot be the identity"),
        ("Noise", edits.zero(), {}, "it goes in or comes out of the whole network"),
        ("M-Ot", edits.zero(), {}, "Site 'M-Ot' matches none"),
    ]  # fmt: skip
    for site, change, named, why in refused:
        with pytest.raises(ValueError, match=why):
            Edit(sd, site, change, **named)
    with pytest.raises(ValueError, match="its factor is from 0 on and finite, not -1"):
        edits.scale_token([1], -1.0)
    network, _ = families.build("flux")
    with pytest.raises(
        ValueError, match="Back-Map: it is computed beside the attention; T-B0-Joint-Map is what the network uses"
    ):
        Edit(network, "T-B0-Joint-Back-Map", edits.zero())
    with pytest.raises(ValueError, match=r"it is no cross-attention.* swap rows of -Text-Out"):
        Edit(network, "T-B0-Joint-Map", edits.swap_prompt("a"))
    model = DiffusionModel(fresh_pipeline("sd2"))
    model.network.fuse_qkv_projections()
    with pytest.raises(ValueError, match="M-R0-B0-Cross-K has fused projections"):
        Edit(model, "M-R0-B0-Cross-K", edits.zero())
    model = DiffusionModel(fresh_pipeline("sd2"))
    model.network.mid_block.compile()
    with pytest.raises(ValueError, match="'mid_block' is compiled, and hooks added after"):
        Edit(model, "M-Out", edits.zero())
    assert hooks(model) == 0


def test_what_only_a_pass_shows_ends_it_before_its_first_block(sd: DiffusionModel) -> None:
    run, ran = denoising(sd), []
    handle = sd.network.conv_in.register_forward_hook(lambda *_: ran.append(1))
    with Recorder(sd, "U-L1-Out") as other:
        run()
    ran.clear()
    refused: list[tuple[str, Any, dict[str, Any], str]] = [
        ("M-Out", edits.add(torch.ones(5)), {}, r"add brings a value of shape \(5,\) to site M-Out, which is \(2, 16, 1, 1\) here"),
        ("M-Out", edits.patch(torch.zeros(16, 3, 3)), {}, r"patch brings a value of shape \(16, 3, 3\)"),
        ("M-Out", edits.project_out(torch.ones(5)), {}, r"project_out brings a value of shape \(5,\)"),
        ("M-Out", edits.patch(other), {}, "takes its value from a recorder that has not site M-Out"),
        ("M-Out", edits.swap([0]), {}, "swap names 1 rows where the pass has 2"),
        ("M-Out", edits.zero(), {"rows": [2]}, "Row 2 was to be edited, and the pass has 2"),
        ("M-Out", edits.zero(), {"places": np.ones((3, 2, 2))}, "masks for 3 rows where the pass has 2"),
        ("*-Cross-Map", edits.scale_token("star", 2.0), {"prompt": [PROMPT] * 3}, "Tokens were named for 3 prompts, and this pass has 2"),
        ("*-Cross-Map", edits.scale_token("star", 2.0), {"prompt": "the star"}, "This pass is not given the prompt 'the star'"),
    ]  # fmt: skip
    for site, change, named, why in refused:
        with pytest.raises(ValueError, match=why), Edit(sd, site, change, **named):
            run()
    assert not ran
    handle.remove()
    for token, why in (
        ([80], "Token 80 was to be edited, and site D-L0-R0-B0-Cross-Map has 77"),
        (list(range(77)), "without any token"),
    ):
        with pytest.raises(ValueError, match=why), Edit(sd, "*-Cross-Map", edits.scale_token(token, 0.0)):
            run()
    with (
        pytest.raises(
            ValueError, match=r"The edit function made of site M-Out, which is \(2, 16, 1, 1\), a tensor of shape \(2, 16\)"
        ),
        Edit(sd, "M-Out", lambda x: x[..., 0, 0]),
    ):
        run()
    assert hooks(sd) == 0
