"""What recording costs in transformers with joint attention, at the token counts of real images; random weights.

python -m benchmarks.transformers MODE     the peak memory in bytes of one pass at the tokens of a 1024 px Flux: bare, with one word's map
                                           (word), with all words' maps (maps), or with those of attention-map-diffusers (fast, exact)
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import nn

from benchmarks.measure import FOLDER, Row, alternate, detail_of, peak_bytes, row_of
from diffprobe.recorder import Recorder


def flux(side: int, heads: int = 12, width: int = 64) -> tuple[nn.Module, dict[str, Any]]:
    """One dual and one single block, 512 text tokens; the side in pixels."""
    y = side // 16
    network = FluxTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=width, num_attention_heads=heads,
        joint_attention_dim=256, pooled_projection_dim=64, axes_dims_rope=(width // 8, width * 7 // 16, width * 7 // 16),
    )  # fmt: skip
    ids = torch.stack([torch.zeros(y * y), torch.arange(y * y) // y, torch.arange(y * y) % y], 1)
    return network.eval(), {
        "hidden_states": torch.randn(1, y * y, 64), "encoder_hidden_states": torch.randn(1, 512, 256), "timestep": torch.ones(1) / 2,
        "pooled_projections": torch.randn(1, 64), "img_ids": ids, "txt_ids": torch.zeros(512, 3), "return_dict": False,
    }  # fmt: skip


def sd3(side: int, heads: int = 12) -> tuple[nn.Module, dict[str, Any]]:
    """Two dual blocks, 333 text tokens."""
    network = SD3Transformer2DModel(
        sample_size=side // 8, num_layers=2, attention_head_dim=64, num_attention_heads=heads, joint_attention_dim=256,
        caption_projection_dim=64 * heads, pooled_projection_dim=64, pos_embed_max_size=side // 16,
    )  # fmt: skip
    return network.eval(), {
        "hidden_states": torch.randn(1, 16, side // 8, side // 8), "encoder_hidden_states": torch.randn(1, 333, 256),
        "pooled_projections": torch.randn(1, 64), "timestep": torch.full((1,), 500), "return_dict": False,
    }  # fmt: skip


def transformers(setting: Any) -> Iterator[Row]:
    """A bare pass against the same pass recorded, then the memory that one word's map takes."""
    for name, build in (("Flux", flux), ("SD3", sd3)):
        network, given = build(128 if setting.smoke else 512)
        requests = [
            ("one site", {"sites": "T-B0-Out"}, "<= 1.03"),
            ("maps of all blocks, head mean", {"maps": "joint"}, "<= 1.10"),
            ("one word's maps of all blocks", {"maps": "joint", "tokens": [5]}, ""),
        ]
        for what, request, target in requests:
            hooks = Recorder(network, **request, keep_steps=False)

            def bare(network: nn.Module = network, given: dict[str, Any] = given) -> None:
                network(**given)

            def recorded(hooks: Recorder = hooks, bare: Callable[[], None] = bare) -> None:
                with hooks:
                    bare()

            # a crowded machine lengthens the clock's time more than the process's own
            times = alternate(bare, recorded, 2 * setting.repeats, clock=time.process_time)
            yield row_of("transformers", f"{name}, {what}", [b / a for a, b in times], target, detail_of(times))
    peaks = [(peak_of("bare"), peak_of("word")) for _ in range(1 if setting.smoke else 3)]
    above = [word - bare for bare, word in peaks]
    what = "peak memory that one word's maps add to a pass at the tokens of a 1024 px Flux, MB"
    yield row_of("transformers", what, above, "<= 100", detail_of(peaks, unit="MB"))


def peak_of(mode: str) -> float:
    """The peak memory of a process of its own, in MB."""
    call = [sys.executable, "-m", "benchmarks.transformers", mode]
    done = subprocess.run(call, cwd=FOLDER.parent, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1]) / 1e6


def captured(network: nn.Module, mode: str) -> Any:
    """attention-map-diffusers: "exact" computes maps in the pass, "fast" (its default) keeps queries and keys and computes after it."""
    capture = importlib.import_module("attention_map_diffusers").AttentionCapture
    return capture(SimpleNamespace(transformer=network), relations=("image->text",), timesteps="all", heads="mean", mode=mode)


def joint_peers(setting: Any) -> Iterator[Row]:
    """Head-mean maps of all words against attention-map-diffusers, which has none of single-stream blocks; they must agree."""
    if importlib.util.find_spec("attention_map_diffusers") is None:
        yield Row(
            "joint_peers", "joint maps / attention-map-diffusers", detail="not installed: pip install attention-map-diffusers"
        )
        return
    for name, build in (("Flux", flux), ("SD3", sd3)):
        network, given = build(128 if setting.smoke else 512)
        hooks = Recorder(network, maps="T-*-Joint-Map", keep_steps=False)

        def ours(hooks: Recorder = hooks, network: nn.Module = network, given: dict[str, Any] = given) -> None:
            with hooks, torch.no_grad():
                network(**given)

        for mode in ("fast", "exact"):

            def theirs(
                mode: str = mode, network: nn.Module = network, given: dict[str, Any] = given
            ) -> dict[str, torch.Tensor]:
                with captured(network, mode) as capture, torch.no_grad():
                    network(**given)
                return {record.layer_id.removeprefix("transformer."): record.data[:, 0] for record in capture.compute().records}

            ours()
            maps = theirs()
            apart = [
                float((maps[site.module_path].float() - hooks.last[site.name].flatten(3)[:, 0].mT).abs().max())
                for site in hooks.sites
            ]
            times = alternate(theirs, ours, setting.repeats, clock=time.process_time)
            what = f"{name}, maps of all words / attention-map-diffusers, mode {mode}, seconds"
            yield row_of(
                "joint_peers", what, [b / a for a, b in times], "<= 1.0", f"{detail_of(times)}; apart by {max(apart):.0e}"
            )
    bare, own = peak_of("bare"), peak_of("maps")
    for mode in ("fast", "exact"):
        other = peak_of(mode)
        what = f"peak memory above the pass, maps of all words at the tokens of a 1024 px Flux / attention-map-diffusers, mode {mode}"
        detail = f"{own - bare:.0f} MB, {other - bare:.0f} MB above {bare:.0f} MB"
        yield row_of("joint_peers", what, [(own - bare) / (other - bare)], "<= 0.25", detail)


def main(mode: str) -> None:
    """One pass of 4096 image and 512 text tokens in 24 heads."""
    torch.set_num_threads(1)
    network, given = flux(1024, heads=24, width=32)
    with torch.no_grad():
        if mode in ("word", "maps"):
            with Recorder(network, maps="joint" if mode == "word" else "T-*-Joint-Map", tokens=[5] if mode == "word" else None):
                network(**given)
        elif mode == "bare":
            network(**given)
        else:
            with captured(network, mode) as capture:
                network(**given)
            capture.compute()
    print(peak_bytes())


if __name__ == "__main__":
    main(sys.argv[1])
