"""What recording costs in transformers with joint attention, at the token counts of real images; random weights.

python -m benchmarks.transformers word | bare     the peak memory in bytes of one pass at the tokens of a 1024 px Flux, with one word's map
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
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
    peaks = []
    for _ in range(1 if setting.smoke else 3):
        calls = ([sys.executable, "-m", "benchmarks.transformers", mode] for mode in ("bare", "word"))
        found = [
            subprocess.run(call, cwd=FOLDER.parent, stdout=subprocess.PIPE, text=True, check=True).stdout for call in calls
        ]
        peaks.append((float(found[0].split()[-1]) / 1e6, float(found[1].split()[-1]) / 1e6))
    above = [word - bare for bare, word in peaks]
    what = "peak memory that one word's maps add to a pass at the tokens of a 1024 px Flux, MB"
    yield row_of("transformers", what, above, "<= 100", detail_of(peaks, unit="MB"))


def main(mode: str) -> None:
    """One pass of 4096 image and 512 text tokens in 24 heads."""
    torch.set_num_threads(1)
    network, given = flux(1024, heads=24, width=32)
    with torch.no_grad():
        if mode == "word":
            with Recorder(network, maps="joint", tokens=[5]):
                network(**given)
        else:
            network(**given)
    print(peak_bytes())


if __name__ == "__main__":
    main(sys.argv[1])
