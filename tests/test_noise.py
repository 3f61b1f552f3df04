"""Noise belongs to the sample: the same whatever batch, order or process asks for it."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from diffprobe.noise import Levels, noise_seed, sample_noise

SHAPE = (4, 8, 16)


def alphas() -> torch.Tensor:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear").alphas_cumprod


def test_the_same_four_give_the_same_noise_in_any_order_and_state() -> None:
    keys = [(seed, name, timestep, draw) for seed in (0, 1) for name in ("a", "b") for timestep in (10, 500) for draw in (0, 1)]
    first = {key: sample_noise(*key, SHAPE) for key in keys}
    torch.manual_seed(123)
    torch.randn(7)
    state = torch.get_rng_state()
    for key in reversed(keys):
        assert torch.equal(sample_noise(*key, SHAPE), first[key])
    assert torch.equal(torch.get_rng_state(), state)  # the global stream is neither read nor moved
    assert len({tuple(noise.flatten()[:8].tolist()) for noise in first.values()}) == len(keys) == 16


def test_the_noise_of_an_extraction_is_the_same_for_ever() -> None:
    """A store that is resumed with another version must see these numbers."""
    assert noise_seed(0, "cat.png", 50, 0) == 2521424742443722509
    assert sample_noise(0, "cat.png", 50, 0, (1, 1, 3)).flatten().tolist() == pytest.approx(
        [-0.9346, -0.5014, -0.9298], abs=1e-4
    )


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(-5, 5), st.text(max_size=4), st.integers(0, 999), st.integers(0, 3)),
    st.tuples(st.integers(-5, 5), st.text(max_size=4), st.integers(0, 999), st.integers(0, 3)),
)
def test_seeds_are_63_bits_and_differ(one: tuple[int, str, int, int], other: tuple[int, str, int, int]) -> None:
    assert 0 <= noise_seed(*one) < 2**63
    assert (noise_seed(*one) == noise_seed(*other)) == (one == other)


def test_noise_is_standard_normal_float32_on_the_cpu() -> None:
    noise = torch.stack([sample_noise(0, f"{i}.png", 10, 0, SHAPE) for i in range(200)])
    assert noise.dtype == torch.float32 and noise.device.type == "cpu" and noise.shape == (200, *SHAPE)
    count = noise.numel()  # five standard errors
    assert abs(float(noise.mean())) < 5 / math.sqrt(count) and abs(float(noise.var()) - 1) < 5 * math.sqrt(2 / count)
    assert abs(float(torch.corrcoef(noise.flatten(1))[0, 1:].abs().max())) < 5 / math.sqrt(noise[0].numel())


def test_sigma_is_the_schedulers() -> None:
    euler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    for timestep in (0, 50, 999):
        # At full length Euler's sigmas run from the noisiest training step down.
        assert Levels.of_alphas(alphas()).sigma(timestep) == pytest.approx(float(euler.sigmas[999 - timestep]), rel=1e-4)
    assert Levels.of_alphas(alphas()).sigma(10) < Levels.of_alphas(alphas()).sigma(500) < Levels.of_alphas(alphas()).sigma(999)


def test_a_schedule_that_ends_in_pure_noise_has_infinite_sigma_there() -> None:
    schedule = DDPMScheduler(beta_schedule="scaled_linear", rescale_betas_zero_snr=True).alphas_cumprod
    assert schedule[-1] == 0 and Levels.of_alphas(schedule).sigma(999) == math.inf


def test_levels_are_named_by_sigma_or_by_log_snr() -> None:
    alpha = alphas().double()
    stable, flow = Levels.of_alphas(alphas()), Levels.of_flow()
    for timestep in (0, 50, 100, 250, 261, 500, 999):
        exact = float((alpha[timestep] / (1 - alpha[timestep])).log())
        assert stable.log_snr(timestep) == pytest.approx(exact, abs=1e-3)
        assert stable.nearest(log_snr=exact) == stable.nearest(sigma=math.exp(-exact / 2)) == timestep
    # A flow has the same noise at s = s_VP / (1 + s_VP); these pairs are the published ones.
    for timestep, share in ((50, 184), (100, 256), (250, 410), (261, 420), (500, 618)):
        assert abs(flow.nearest(log_snr=stable.log_snr(timestep)) - share) <= 1
    assert flow.nearest(sigma=1.0) == 1000 and flow.nearest(sigma=0.0) == flow.nearest(log_snr=math.inf) == 0
    for levels, asked in (
        (stable, {"sigma": 90.0}),
        (stable, {"log_snr": 20.0}),
        (stable, {"sigma": 0.0}),
        (flow, {"sigma": 1.2}),
    ):
        with pytest.raises(ValueError, match=r"No timestep of this model has the .* its noise levels reach from"):
            levels.nearest(**asked)


def test_a_flows_noise_is_the_schedulers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[0.618, 0.25])
    image, noise = torch.randn(2, 4, 2, 2), torch.randn(2, 4, 2, 2)
    levels = Levels.of_flow()
    steps = [levels.nearest(sigma=float(sigma)) for sigma in scheduler.sigmas[:2]]
    signal, spread = (level[steps].view(-1, 1, 1, 1) for level in (levels.signal, levels.spread))
    assert torch.equal(signal * image + spread * noise, scheduler.scale_noise(image, scheduler.timesteps, noise))
