"""Recording changes nothing, records the truth, and leaves nothing behind.

The oracle of the maps is diffusers' own eager attention: its probabilities are caught where `get_attention_scores`
returns them.  The oracle of the features is an ordinary forward hook that clones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
)
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from torch import Tensor, nn

import diffprobe.tap
from diffprobe.models import DiffusionModel
from diffprobe.recorder import _ACTIVE, Recorder
from diffprobe.sites import Site
from diffprobe.tap import Call, Tap, probabilities

PROMPTS = ["a red star", None, "a blue circle on the left of a star"]
TIMESTEPS = torch.tensor([10, 500, 999])
QUERY, OUT = "U-L1-R1-B0-Cross-Q", "U-L1-R1-B0-Out"
LAST = {"sd": "up_blocks.3.resnets.2", "sdxl": "up_blocks.2.resnets.2", "pixart": "transformer_blocks.1"}
FIRST = {"sd": "down_blocks.0.resnets.0", "sdxl": "down_blocks.0.resnets.0", "pixart": "pos_embed"}


def noised(model: DiffusionModel, rows: int = 3, height: int = 8, width: int = 16) -> Tensor:
    return torch.randn(rows, 4, height, width, generator=torch.Generator().manual_seed(0))


def denoise(model: DiffusionModel) -> Tensor | None:
    return model.denoise(noised(model), TIMESTEPS, model.encode_text(PROMPTS))


def modes() -> int:
    """How many function modes are on."""
    return torch._C._len_torch_function_stack()


def hooks_of(network: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_with_kwargs) for m in network.modules())


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """Somebody else's hook."""
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def outputs(module: nn.Module, copies: list[Tensor]) -> Any:
    return hooked(module, lambda m, args, output: copies.append((output[0] if isinstance(output, tuple) else output).clone()))


@pytest.fixture(scope="module")
def sd2(tiny: Callable[[str], DiffusionModel]) -> DiffusionModel:
    return tiny("sd2")


@pytest.fixture(autouse=True)
def nothing_is_left(tiny: Callable[[str], DiffusionModel]) -> Iterator[None]:
    yield
    assert not any(_ACTIVE.values()) and not modes()
    assert all(hooks_of(tiny(family).network) == 0 for family in ("sd2", "sdxl", "pixart"))


# --- nothing changes ------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", ["mean", "all"])
def test_output_is_bit_identical(model: DiffusionModel, heads: Any) -> None:
    before = denoise(model)
    with Recorder(model, "*", maps="*", heads=heads) as recorder:
        during = denoise(model)
    after = denoise(model)
    assert before is not None and during is not None and after is not None
    assert torch.equal(before, during) and torch.equal(before, after)
    assert torch.equal(recorder["Noise"], before)
    assert recorder.steps[0].timesteps == (10.0, 500.0, 999.0) and recorder.steps[0].rows == ("prompt",) * 3


def test_processors_and_parameters_stay(model: DiffusionModel) -> None:
    before = dict(model.network.attn_processors)
    with Recorder(model, "*", maps="*"):
        assert all(model.network.attn_processors[name] is processor for name, processor in before.items())
        denoise(model)
    assert all(model.network.attn_processors[name] is processor for name, processor in before.items())


# --- features -------------------------------------------------------------------------------------


def test_features_are_the_modules_outputs(model: DiffusionModel) -> None:
    features = [site for site in model.sites if not site.is_map and site.path and site.kind != "modulated"]
    copies: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            copies[name] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    modules = dict(model.network.named_modules())
    handles = [modules[site.path].register_forward_hook(keep(site.name)) for site in features]
    with Recorder(model, [site.name for site in features]) as recorder:
        denoise(model)
    for handle in handles:
        handle.remove()
    assert set(recorder.last) == set(copies)
    for name, copy in copies.items():
        found = recorder.last[name]
        if copy.ndim == 3:  # (row, place, channel): place y * width + x is at (y, x)
            found = found.flatten(2).transpose(1, 2)
        assert torch.equal(found, copy), name


def test_places_run_row_by_row(sd2: DiffusionModel) -> None:
    """A transformer block's output, put back on its grid, projected out and added, is what its 2-D parent gives."""
    parent: list[Tensor] = []
    inputs: list[Tensor] = []
    transformer = sd2.network.up_blocks[1].attentions[1]
    with (
        outputs(transformer, parent),
        hooked(transformer, lambda m, args, output: inputs.append(args[0].clone())),
        Recorder(sd2, OUT) as recorder,
    ):
        denoise(sd2)
    block = recorder[OUT]
    assert block.shape[-2:] == parent[0].shape[-2:] == (2, 4)
    wanted = transformer.proj_out(block.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) + inputs[0]
    torch.testing.assert_close(parent[0], wanted)


def test_freeu_writes_into_its_input_but_not_into_the_record(fresh_pipeline: Callable[[str], Any]) -> None:
    pipeline = fresh_pipeline("sd2")
    pipeline.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    model = DiffusionModel(pipeline)
    copies: list[Tensor] = []
    with outputs(pipeline.unet.up_blocks[0].resnets[0], copies):
        with Recorder(model, "U-L0-R0-Res-Out") as safe:
            denoise(model)
        with Recorder(model, "U-L0-R0-Res-Out", reuse=True) as shared:
            denoise(model)
    assert torch.equal(safe["U-L0-R0-Res-Out"], copies[0])
    assert not torch.equal(shared["U-L0-R0-Res-Out"], copies[0])  # else this test shows nothing


def test_reduce_is_applied_to_every_tensor_at_once(sd2: DiffusionModel) -> None:
    seen: list[str] = []

    def mean(site: Site, tensor: Tensor) -> Tensor:
        seen.append(site.name)
        return tensor.mean((-2, -1)) if site.kind == "cross_query" else tensor

    with Recorder(sd2, [QUERY, OUT]) as whole:
        denoise(sd2)
    with Recorder(sd2, [QUERY, OUT], reduce=mean) as reduced:
        denoise(sd2)
    assert seen == [QUERY, OUT]
    torch.testing.assert_close(reduced[QUERY], whole[QUERY].mean((-2, -1)))
    assert torch.equal(reduced[OUT], whole[OUT])


def test_steps_are_kept_or_only_the_last(sd2: DiffusionModel) -> None:
    text = sd2.encode_text(["a red star"])
    for keep, count in ((True, 3), (False, 1)):
        with Recorder(sd2, QUERY, keep_steps=keep) as recorder:
            for timestep in (10, 20, 30):
                sd2.denoise(noised(sd2, 1), torch.tensor([timestep]), text)
        assert len(recorder.steps) == count and recorder.steps[-1].timesteps == (30.0,)
        assert recorder.last is recorder.steps[-1].tensors


# --- maps -----------------------------------------------------------------------------------------


@contextmanager
def eager_probabilities(model: DiffusionModel) -> Iterator[dict[str, Tensor]]:
    """diffusers' eager attention and the probabilities that it computes, (row, head, place, token) by module path."""
    paths = {module: path for path, module in model.network.named_modules() if isinstance(module, Attention)}
    caught: dict[str, Tensor] = {}
    original = Attention.get_attention_scores

    def caught_scores(self: Attention, *args: Any, **kwargs: Any) -> Tensor:
        found = original(self, *args, **kwargs)
        caught[paths[self]] = found.unflatten(0, (-1, self.heads)).clone()
        return found

    model.network.set_attn_processor(AttnProcessor())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Attention, "get_attention_scores", caught_scores)
        yield caught
    model.network.set_attn_processor(AttnProcessor2_0())


def test_maps_are_the_librarys_own(model: DiffusionModel) -> None:
    with Recorder(model, maps="*", heads="all") as fused:
        denoise(model)
    with eager_probabilities(model) as caught, Recorder(model, maps="*", heads="all") as eager:
        denoise(model)
    sites = {site.name: site for site in eager.sites}
    assert {sites[name].module_path for name in eager.last} == set(caught)
    spread = 0.0
    for name, maps in eager.last.items():
        wanted = caught[sites[name].module_path].transpose(-1, -2).unflatten(-1, maps.shape[-2:])
        torch.testing.assert_close(maps, wanted, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(fused.last[name], wanted, atol=1e-4, rtol=1e-3)
        spread = max(spread, float((maps.amax(2) - maps.amin(2)).max()))
    assert spread > 0.3  # the tiny model's maps are far from even, or a swapped axis could pass


def test_each_place_spreads_one_over_the_tokens(model: DiffusionModel) -> None:
    for heads in ("mean", "all"):
        with Recorder(model, maps="*", heads=heads) as recorder:
            denoise(model)
        for site in recorder.sites:
            maps = recorder.last[site.name]
            assert maps.dtype == torch.float32 and maps.min() >= 0
            torch.testing.assert_close(maps.sum(2), torch.ones_like(maps.sum(2)))
            assert maps.shape[1] == (1 if heads == "mean" else model.network.get_submodule(site.module_path).heads)


def test_probabilities_times_values_are_the_fused_output(model: DiffusionModel) -> None:
    modules = dict(model.network.named_modules())
    with Recorder(model, ["*-Cross-V", "*-Cross-Out", "*-Self-V", "*-Self-Out"], maps="*", heads="all") as recorder:
        denoise(model)
    maps = [site for site in recorder.sites if site.is_map]
    assert maps
    for site in maps:
        attention: Any = modules[site.module_path]
        stem = site.name.removesuffix("-Map")
        values = recorder[f"{stem}-V"].flatten(2).unflatten(1, (attention.heads, -1))  # (row, head, width, token)
        mixed = torch.einsum("rhtp,rhwt->rphw", recorder[site.name].flatten(3), values).flatten(2)
        output = attention.to_out[0](mixed).transpose(1, 2)
        torch.testing.assert_close(output, recorder[f"{stem}-Out"].flatten(2), atol=1e-5, rtol=1e-4)


def test_masked_tokens_get_nothing(tiny: Callable[[str], DiffusionModel]) -> None:
    model = tiny("pixart")
    text = model.encode_text(PROMPTS)
    with Recorder(model, maps="cross", heads="all") as recorder:
        denoise(model)
    assert text.mask is not None and not text.mask.all()
    for maps in recorder.last.values():
        masked = (text.mask == 0)[:, None, :, None, None].expand_as(maps)
        assert maps[masked].max() == 0
        torch.testing.assert_close(maps.sum(2), torch.ones_like(maps.sum(2)))
        assert (maps[1, :, 0] == 1).all()  # the empty prompt has one token


def test_heads_and_tokens(sd2: DiffusionModel) -> None:
    kept = {}
    for heads in ("mean", "all"):
        for tokens in (None, [3, 1]):
            with Recorder(sd2, maps="cross", heads=heads, tokens=tokens) as recorder:
                denoise(sd2)
            kept[heads, tokens is None] = recorder.last
    for name, maps in kept["all", True].items():
        torch.testing.assert_close(kept["mean", True][name], maps.mean(1, keepdim=True))
        assert torch.equal(kept["all", False][name], maps[:, :, [3, 1]])  # in the order asked, not made to sum to one
        assert torch.equal(kept["mean", False][name], kept["mean", True][name][:, :, [3, 1]])
    assert kept["all", True]["U-L1-R1-B0-Cross-Map"].shape == (3, 2, 77, 2, 4)


@pytest.mark.parametrize("chunk_bytes", [1, 5_000, 200_000])
def test_chunks_change_nothing(model: DiffusionModel, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    with Recorder(model, maps="*") as whole:
        denoise(model)
    monkeypatch.setattr(diffprobe.tap, "_CHUNK_BYTES", chunk_bytes)
    with Recorder(model, maps="*") as pieces:
        denoise(model)
    for name, maps in whole.last.items():
        torch.testing.assert_close(pieces.last[name], maps, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("processor", [AttnProcessor(), AttnProcessor2_0()])
def test_norms_and_scales_are_the_processors_own(processor: Any) -> None:
    """The fused processor normalises query and key and takes the default scale; the eager one does neither."""
    torch.manual_seed(0)
    attention = Attention(query_dim=8, heads=2, dim_head=4, qk_norm="layer_norm", scale_qk=False, processor=processor).eval()
    places = torch.randn(2, 5, 8) * 2
    found: list[Tensor] = []

    def attend(call: Call, run: Callable[[], Tensor]) -> Tensor:
        found.append(probabilities(call, heads="all"))
        return run()

    tap = Tap(attention, attend)
    with torch.no_grad():
        handles = tap.attach()
        attention(places)
        for handle in handles:
            handle.remove()
        mixed = torch.einsum("rhtp,rthw->rphw", found[0], attention.to_v(places).unflatten(-1, (2, 4))).flatten(2)
        torch.testing.assert_close(attention.to_out[0](mixed), attention(places))


def test_softmax_is_in_float32_whatever_the_model_is(fresh_pipeline: Callable[[str], Any]) -> None:
    model = DiffusionModel(fresh_pipeline("sd2").to(torch.bfloat16))
    with Recorder(model, QUERY, maps="U-L1-R1-B0-Cross-Map", heads="all") as recorder:
        model.denoise(noised(model).bfloat16(), TIMESTEPS, model.encode_text(PROMPTS))
    maps = recorder["U-L1-R1-B0-Cross-Map"]
    assert maps.dtype == torch.float32 and recorder[QUERY].dtype == torch.bfloat16
    torch.testing.assert_close(maps.sum(2), torch.ones(3, 2, 2, 4), atol=1e-6, rtol=0)


# --- hooks come and go ----------------------------------------------------------------------------


def test_hooks_are_gone_after_any_exit(model: DiffusionModel) -> None:
    modules = dict(model.network.named_modules())
    fired: list[str] = []

    def foreign(module: nn.Module, args: Any, output: Any) -> None:
        fired.append("foreign")

    def interrupt(module: nn.Module, args: Any, output: Any) -> None:
        raise KeyboardInterrupt

    assert hooks_of(model.network) == 0
    with hooked(modules[FIRST[model.family]], foreign):
        count = hooks_of(model.network)
        with Recorder(model, "*", maps="*") as recorder:
            assert hooks_of(model.network) > count
            denoise(model)
        assert hooks_of(model.network) == count and len(fired) == 1

        with pytest.raises(RuntimeError, match="mine"), Recorder(model, "*"):
            raise RuntimeError("mine")
        assert hooks_of(model.network) == count

        with hooked(modules[LAST[model.family]], interrupt), pytest.raises(KeyboardInterrupt), recorder:
            denoise(model)
        assert hooks_of(model.network) == count and len(recorder.steps) == 1 and not modes()

        with Recorder(model, "*-Cross-Q") as outer, Recorder(model, maps="cross") as inner:
            denoise(model)
        assert hooks_of(model.network) == count and outer.last and inner.last
        denoise(model)
        assert len(fired) == 4 and len(outer.steps) == len(inner.steps) == 1


def test_a_failed_pass_leaves_no_half_step(sd2: DiffusionModel) -> None:
    def fail(module: nn.Module, args: Any, output: Any) -> None:
        raise RuntimeError("lost device")

    with Recorder(sd2, ["D-L0-Out", "U-L3-Out"], maps="cross") as recorder:
        with hooked(sd2.network.mid_block, fail), pytest.raises(RuntimeError, match="lost device"):
            denoise(sd2)
        with pytest.raises(ValueError, match="Nothing was recorded"):
            recorder.last  # noqa: B018
        denoise(sd2)
    assert len(recorder.steps) == 1 and len(recorder.last) == 18


def test_a_recorder_is_entered_once_at_a_time(sd2: DiffusionModel) -> None:
    with Recorder(sd2, QUERY) as recorder:
        with pytest.raises(RuntimeError, match="already recording"):
            recorder.__enter__()
        denoise(sd2)
    with recorder:
        denoise(sd2)
    assert len(recorder.steps) == 2


def test_attaching_that_fails_half_way_detaches(sd2: DiffusionModel) -> None:
    recorder = Recorder(sd2, [QUERY, OUT])
    late = sd2.network.get_submodule(recorder.sites[1].path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(late, "register_forward_hook", None)
        recorder.__enter__()
    assert hooks_of(sd2.network) == 0


# --- stopping early -------------------------------------------------------------------------------


def test_stop_early_runs_nothing_after_the_last_site(model: DiffusionModel) -> None:
    modules = dict(model.network.named_modules())
    wanted = (
        "T-B0-Cross-Q" if model.family == "pixart" else "U-L1-R1-B0-Cross-Q" if model.family == "sd" else "U-L0-R1-B0-Cross-Q"
    )
    maps = wanted.replace("-Q", "-Map")
    ran: list[str] = []
    with Recorder(model, wanted, maps=maps) as full:
        assert denoise(model) is not None
    with (
        hooked(modules[FIRST[model.family]], lambda *_: ran.append("first")),
        hooked(modules[LAST[model.family]], lambda *_: ran.append("last")),
        hooked(model.network, lambda *_: ran.append("network")),
        Recorder(model, wanted, maps=maps, stop_early=True) as stopped,
    ):
        assert denoise(model) is None and denoise(model) is None
    assert ran == ["first", "first"] and len(stopped.steps) == 2
    for step in stopped.steps:
        assert set(step.tensors) == set(full.last)
        assert all(torch.equal(step.tensors[name], full.last[name]) for name in full.last)
    assert stopped.steps[0].timesteps == (10.0, 500.0, 999.0)


def test_stop_early_with_the_noise_is_a_whole_pass(sd2: DiffusionModel) -> None:
    with Recorder(sd2, ["Noise", QUERY], stop_early=True) as recorder:
        found = denoise(sd2)
    assert found is not None and torch.equal(found, recorder["Noise"])


@pytest.mark.parametrize("stopping_is_outer", [True, False])
def test_nested_recorders_both_get_everything(sd2: DiffusionModel, stopping_is_outer: bool) -> None:
    early = Recorder(sd2, "D-L0-Out", stop_early=True)
    late = Recorder(sd2, ["D-L1-Out", "U-L3-Out"])
    outer, inner = (early, late) if stopping_is_outer else (late, early)
    with outer, inner:
        assert denoise(sd2) is not None  # one of them wants the whole pass
    assert set(early.last) == {"D-L0-Out"} and set(late.last) == {"D-L1-Out", "U-L3-Out"}
    also = Recorder(sd2, "U-L0-Out", stop_early=True)
    ran: list[int] = []
    with hooked(sd2.network.up_blocks[1], lambda *_: ran.append(1)), early, also:
        assert denoise(sd2) is None
    assert len(early.steps) == 2 and set(also.last) == {"U-L0-Out"} and not ran


def test_a_pipeline_is_not_stopped(sd2: DiffusionModel) -> None:
    for target in (sd2.pipeline, sd2.network):
        with pytest.raises(ValueError, match="stop_early needs a DiffusionModel"):
            Recorder(target, QUERY, stop_early=True)


# --- refusals -------------------------------------------------------------------------------------


def test_unknown_processors_are_refused_by_name(fresh_pipeline: Callable[[str], Any]) -> None:
    class MyProcessor(AttnProcessor2_0):
        pass

    pipeline = fresh_pipeline("sd2")
    model = DiffusionModel(pipeline)
    with Recorder(model, maps="M-R0-B0-Cross-Map") as plain:
        denoise(model)
    middle = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    middle.set_processor(MyProcessor())  # calls the same function, so it is seen
    with Recorder(model, maps="M-R0-B0-Cross-Map") as own:
        denoise(model)
    assert torch.equal(plain["M-R0-B0-Cross-Map"], own["M-R0-B0-Cross-Map"])
    middle.set_processor(SlicedAttnProcessor(1))
    with pytest.raises(ValueError, match="Site M-R0-B0-Cross-Map uses the attention processor SlicedAttnProcessor"):
        Recorder(pipeline, maps="cross")
    with Recorder(pipeline, "*", maps=["self", "U-*-Cross-Map"]):  # features and other maps are unharmed
        pass


def test_an_attention_that_calls_nothing_is_refused_by_name_in_the_pass(fresh_pipeline: Callable[[str], Any]) -> None:
    class Silent:
        def __call__(self, attn: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return hidden * 0

    pipeline = fresh_pipeline("sd2")
    pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(Silent())
    with Recorder(pipeline, maps="cross"):
        with pytest.raises(ValueError, match="Site M-R0-B0-Cross-Map has no map: Silent made 0 calls"):
            alone(pipeline)
        assert hooks_of(pipeline.unet) == 0 and not modes()


def test_fused_projections_are_refused_until_unfused(fresh_pipeline: Callable[[str], Any]) -> None:
    pipeline = fresh_pipeline("sd2")
    model = DiffusionModel(pipeline)
    pipeline.fuse_qkv_projections()
    for sites in (QUERY, "*-Self-V"):
        with pytest.raises(
            ValueError, match=r"Site .* has fused projections \(FusedAttnProcessor2_0\).*unfuse_qkv_projections"
        ):
            Recorder(model, sites)
    with Recorder(
        model, ["U-L1-Out", "*-Cross-Out"], maps="*"
    ) as fused:  # the call that the softmax is in is seen all the same
        denoise(model)
    pipeline.unfuse_qkv_projections()
    with Recorder(model, QUERY, maps="*") as recorder:
        denoise(model)
    assert recorder[QUERY].any()
    for site in fused.sites:
        if not site.is_map:
            continue
        torch.testing.assert_close(fused[site.name], recorder[site.name], atol=1e-5, rtol=1e-4)


def test_compiled_modules_are_refused_by_name(fresh_pipeline: Callable[[str], Any]) -> None:
    pipeline = fresh_pipeline("sd2")
    plain = pipeline.unet
    pipeline.unet = torch.compile(plain, backend="eager")
    for target in (pipeline, pipeline.unet):
        with pytest.raises(ValueError, match="Module 'network' is compiled"):
            Recorder(target, QUERY)
    plain.up_blocks[1].compile(backend="eager")
    with pytest.raises(ValueError, match=r"Module 'up_blocks\.1' is compiled"):
        Recorder(plain, QUERY)
    with Recorder(plain, "D-L0-Out"):
        pass


def test_what_is_no_supported_network_is_refused_by_name(sd2: DiffusionModel) -> None:
    for target in (object(), sd2.pipeline.vae, nn.DataParallel(sd2.network)):
        with pytest.raises(
            ValueError, match=f"A {type(target).__name__} cannot be recorded.*a UNet or transformer of diffusers"
        ):
            Recorder(target, QUERY)


def test_arguments_that_ask_for_nothing_or_nonsense(sd2: DiffusionModel) -> None:
    for sites, maps in (((), ()), ("", ""), ([], "")):
        with pytest.raises(ValueError, match="Nothing to record"):
            Recorder(sd2, sites, maps=maps)
    median: Any = "median"
    with pytest.raises(Exception, match="median"):
        Recorder(sd2, maps="cross", heads=median)
    for tokens in ([], [-1, 2]):
        with pytest.raises(ValueError, match="positions from 0 on"):
            Recorder(sd2, maps="cross", tokens=tokens)
    with pytest.raises(ValueError, match="Site 'U-L1-R1-B0-Cross-q' matches none"):
        Recorder(sd2, "U-L1-R1-B0-Cross-q")
    with Recorder(sd2, QUERY) as recorder, pytest.raises(ValueError, match="Nothing was recorded"):
        recorder[QUERY]
    denoise(sd2)
    with recorder:
        denoise(sd2)
    with pytest.raises(ValueError, match="matches none of this model's 1 sites"):
        recorder[OUT]


# --- other things than a DiffusionModel -----------------------------------------------------------


def test_a_bare_network_is_recorded_however_it_is_called(model: DiffusionModel) -> None:
    text, latents = model.encode_text(PROMPTS), noised(model)
    sites = "T-B1-Cross-Q" if model.family == "pixart" else "U-L0-Out"
    arguments = model.network_arguments(latents, text)
    with Recorder(model, sites, maps="cross") as wanted:
        denoise(model)
    with Recorder(model.network, sites, maps="cross") as bare:
        model.network(latents, timestep=TIMESTEPS, **arguments)
        hidden = arguments.pop("encoder_hidden_states")
        positions = (hidden, TIMESTEPS) if model.family == "pixart" else (TIMESTEPS, hidden)
        model.network(latents, *positions, **arguments)
        first = "hidden_states" if model.family == "pixart" else "sample"
        model.network(**{first: latents}, timestep=TIMESTEPS, encoder_hidden_states=hidden, return_dict=False, **arguments)
    assert len(bare.steps) == 3
    for step in bare.steps:
        assert step.timesteps == (10.0, 500.0, 999.0) and step.rows == ("prompt",) * 3
        assert all(torch.equal(step.tensors[name], tensor) for name, tensor in wanted.last.items())
    with pytest.raises(ValueError, match=r"Site Noise needs a noise schedule .* which a bare network does not have"):
        Recorder(model.network, "Noise")


def test_one_timestep_for_all_rows_is_noted_for_each(sd2: DiffusionModel) -> None:
    text = sd2.encode_text(PROMPTS).embeddings
    with Recorder(sd2.network, QUERY) as recorder:
        for timestep in (7, torch.tensor(7), torch.tensor([7])):
            sd2.network(noised(sd2), timestep, text)
    assert [step.timesteps for step in recorder.steps] == [(7.0, 7.0, 7.0)] * 3


def keep_both(inputs: list[Tensor], raw: list[Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        inputs.append(args[0])
        raw.append(output[0])

    return hook


def sample(model: DiffusionModel, guidance: float, prompts: list[str]) -> Any:
    pipeline = model.pipeline
    extra = {"clean_caption": False, "use_resolution_binning": False} if model.family == "pixart" else {}
    return pipeline(
        prompts, height=16, width=32, num_inference_steps=3, guidance_scale=guidance, output_type="np",
        generator=torch.Generator().manual_seed(0), **extra,
    ).images  # fmt: skip


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_plain_pipeline_is_recorded_while_it_samples(model: DiffusionModel, guidance: float) -> None:
    prompts = ["a red star", "a blue circle"]
    sites = ["Noise", "T-B1-Cross-K" if model.family == "pixart" else "M-R0-B0-Cross-K"]
    before = sample(model, guidance, prompts)
    raw: list[Tensor] = []
    inputs: list[Tensor] = []
    with hooked(model.network, keep_both(inputs, raw)), Recorder(model.pipeline, sites, maps="cross") as recorder:
        during = sample(model, guidance, prompts)
    assert np.array_equal(before, during)
    rows = ("negative",) * 2 * (guidance > 1) + ("prompt",) * 2
    timesteps = model.pipeline.scheduler.timesteps.tolist()
    assert len(timesteps) == len(raw) == len(recorder.steps) >= 3
    keys = []
    for step, timestep, output, given in zip(recorder.steps, timesteps, raw, inputs, strict=True):
        assert step.rows == rows and step.timesteps == (float(timestep),) * len(rows)
        assert step.tensors["Noise"].shape == (len(rows), 4, 8, 16)
        if model.prediction_type == "epsilon":
            assert torch.equal(step.tensors["Noise"], output[:, :4])
        else:
            alpha = model.alphas_cumprod[int(timestep)]
            torch.testing.assert_close(step.tensors["Noise"], alpha.sqrt() * output + (1 - alpha).sqrt() * given)
        keys.append(step.tensors[sites[1]])
    # Rows are what they are called: the keys of the prompts are the prompts' own, of the negatives the pipeline's null.
    with Recorder(model, sites[1]) as single:
        text = model.encode_text([*([None, None] if guidance > 1 else []), *prompts])
        model.denoise(noised(model, len(rows)), torch.full((len(rows),), 10), text)
    for key in keys:
        torch.testing.assert_close(key, single[sites[1]], atol=1e-5, rtol=1e-4)


def test_a_network_called_by_hand_after_guided_sampling_is_not_called_negative(sd2: DiffusionModel) -> None:
    sample(sd2, 5.0, ["a red star"])
    assert sd2.pipeline.do_classifier_free_guidance
    with Recorder(sd2.pipeline, QUERY) as recorder:
        sd2.network(noised(sd2, 2), 10, sd2.encode_text(["a red star", "a blue circle"]).embeddings)
    assert recorder.steps[0].rows == ("prompt", "prompt")


def test_noise_of_a_pipeline_without_known_levels_is_refused_before_it_runs(fresh_pipeline: Callable[[str], Any]) -> None:
    pipeline = fresh_pipeline("sd2")
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="which a pipeline with a FlowMatchEulerDiscreteScheduler does not have"):
        Recorder(pipeline, "Noise")
    with Recorder(pipeline, QUERY):
        pass


def test_noise_from_velocity_holds_for_the_exploding_form_too(fresh_pipeline: Callable[[str], Any]) -> None:
    """Euler keeps x = x0 + sigma e and gives the network x / sqrt(sigma^2 + 1); its own formula for x0 says the same e."""
    pipeline = fresh_pipeline("sd2v")
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, timestep_spacing="leading")
    velocities: list[Tensor] = []
    inputs: list[Tensor] = []
    with hooked(pipeline.unet, keep_both(inputs, velocities)), Recorder(pipeline, "Noise") as recorder:
        pipeline("a red star", height=16, width=16, num_inference_steps=2, guidance_scale=1.0, output_type="latent")
    for step, given, velocity, sigma in zip(recorder.steps, inputs, velocities, pipeline.scheduler.sigmas, strict=False):
        exploding = given * (sigma**2 + 1).sqrt()
        clean = velocity * (-sigma / (sigma**2 + 1).sqrt()) + exploding / (sigma**2 + 1)
        torch.testing.assert_close(step.tensors["Noise"], (exploding - clean) / sigma, atol=1e-4, rtol=1e-4)
    assert [step.timesteps for step in recorder.steps] == [(501.0,), (1.0,)]


# --- what changes after the recorder was made -----------------------------------------------------


def alone(pipeline: Any, rows: int = 1, channels: int = 4) -> None:
    """One call of the pipeline's network by hand."""
    with torch.no_grad():
        pipeline.unet(torch.randn(rows, channels, 8, 8), 10, torch.randn(rows, 77, 16))


def test_three_rows_of_guidance_are_refused_in_the_pass(fresh_pipeline: Callable[..., Any]) -> None:
    parts = fresh_pipeline("sd1", in_channels=8).components
    pipeline = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 16, 16)
    options: dict[str, Any] = {"num_inference_steps": 1, "output_type": "latent", "guidance_scale": 5.0}
    for prompts in (["a red star"], ["a red star", "a blue circle"]):
        with Recorder(pipeline, QUERY) as recorder:
            with pytest.raises(ValueError, match=r"InstructPix2PixPipeline gives the network (3|6) rows with the same latents"):
                pipeline(prompts, image=image.expand(len(prompts), -1, -1, -1), **options)
            assert hooks_of(pipeline.unet) == 0 and not recorder.steps
    with Recorder(pipeline.unet, QUERY) as recorder:
        pipeline("a red star", image=image, **options)
    assert recorder.last[QUERY].shape[0] == 3 and recorder.steps[0].rows == ("prompt",) * 3


def test_rows_of_two_guided_prompts_with_one_noise_are_named(sd2: DiffusionModel) -> None:
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    with Recorder(sd2.pipeline, QUERY) as recorder:
        sd2.pipeline(
            ["a red star", "a circle"], height=16, width=16, num_inference_steps=1, guidance_scale=5.0, output_type="latent",
            generator=generators,
        )  # fmt: skip
    assert recorder.steps[0].rows == ("negative",) * 2 + ("prompt",) * 2


def test_rows_that_do_not_belong_together_are_refused(sd2: DiffusionModel) -> None:
    text = sd2.encode_text(["a red star"]).embeddings
    for texts, timesteps in ((text, 10), (text.expand(3, -1, -1), torch.tensor([10, 20]))):
        with Recorder(sd2.network, QUERY), pytest.raises(ValueError, match=r"A pass with 3 latents, .* cannot be recorded"):
            sd2.network(noised(sd2), timesteps, texts)


def test_processors_swapped_on_the_way_are_refused_in_the_pass(fresh_pipeline: Callable[[str], Any]) -> None:
    pipeline = fresh_pipeline("sd2")
    with Recorder(pipeline, maps="cross"):
        alone(pipeline)
        pipeline.unet.set_attn_processor(SlicedAttnProcessor(1))
        with pytest.raises(ValueError, match="uses the attention processor SlicedAttnProcessor, whose maps are not known"):
            alone(pipeline)
        assert hooks_of(pipeline.unet) == 0
    pipeline.unet.set_attn_processor(AttnProcessor2_0())
    middle = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    swap = pipeline.unet.conv_in.register_forward_hook(lambda *_: middle.set_processor(SlicedAttnProcessor(1)))
    with Recorder(pipeline, maps="M-R0-B0-Cross-Map"), pytest.raises(ValueError, match="SlicedAttnProcessor"):
        alone(pipeline)
    swap.remove()
    middle.set_processor(AttnProcessor2_0())
    with Recorder(pipeline, QUERY):
        pipeline.fuse_qkv_projections()
        with pytest.raises(ValueError, match="has fused projections"):
            alone(pipeline)


def test_modules_are_those_of_the_pass(fresh_pipeline: Callable[[str], Any]) -> None:
    """An adapter puts a module of its own in the place of a projection."""
    pipeline = fresh_pipeline("sd2")
    attention = pipeline.unet.up_blocks[1].attentions[1].transformer_blocks[0].attn2
    plain, recorder = attention.to_q, Recorder(pipeline, QUERY)
    attention.to_q = nn.Sequential(plain, nn.Linear(16, 16))
    copies: list[Tensor] = []
    with outputs(attention.to_q, copies), recorder:
        alone(pipeline)
    assert torch.equal(recorder[QUERY].flatten(2).mT, copies[0])
    with recorder:
        attention.to_q = plain
        with pytest.raises(ValueError, match=r"Module 'up_blocks\.1.*to_q' was replaced while it was recorded"):
            alone(pipeline)
        assert hooks_of(pipeline.unet) == 0


def test_a_site_that_takes_no_part_is_an_error(fresh_pipeline: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = fresh_pipeline("sd2")
    monkeypatch.setattr(pipeline.unet.mid_block, "forward", lambda hidden, *args, **kwargs: hidden)
    with Recorder(pipeline, ["D-L0-Out", "M-R0-Res-Out", "M-R1-Res-Out"]) as recorder:
        with pytest.raises(ValueError, match=r"Site M-R0-Res-Out had no part in this pass \(2 in all\)"):
            alone(pipeline)
        assert hooks_of(pipeline.unet) == 0 and not recorder.steps


@pytest.mark.parametrize("channels", [7, 9])
def test_noise_from_velocity_where_more_than_latents_goes_in(fresh_pipeline: Callable[..., Any], channels: int) -> None:
    parts = fresh_pipeline("sd2v", in_channels=channels).components
    pipeline = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    inputs: list[Tensor] = []
    raw: list[Tensor] = []
    with hooked(pipeline.unet, keep_both(inputs, raw)), Recorder(pipeline, "Noise") as recorder:
        alone(pipeline, 2, channels)
    alpha = pipeline.scheduler.alphas_cumprod[10]
    torch.testing.assert_close(recorder["Noise"], alpha.sqrt() * raw[0] + (1 - alpha).sqrt() * inputs[0][:, :4])
    with pytest.raises(ValueError, match=f"which of the {channels} channels that a SimpleNamespace gives .* is not known"):
        Recorder(SimpleNamespace(unet=pipeline.unet, scheduler=pipeline.scheduler), "Noise")
