"""Write the golden store of format version 1, once and for all; `tests/test_store_format.py` reads it for ever.

python tests/golden/make.py

What lies here was written by diffprobe 0.1.0.  A later version writes another one beside it, and this one stays.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from diffprobe import store
from diffprobe.store import ArraySpec

HERE = Path(__file__).parent
CONDITIONINGS, TIMESTEPS = ("null", "caption"), (10, 500)
TEXTS = ["a red star", "un étoile", "赤い星", "نجمة حمراء", "a 🌟", "", "a star"]
SPECS = [
    ArraySpec("U-L1-Out", "up_blocks.1", "block", "features", ("channel", "y", "x"), (3, 2, 4), (*CONDITIONINGS, "caption@4")),
    ArraySpec("D-L0-Out", "down_blocks.0", "block", "features", ("channel",), (5,), CONDITIONINGS, "mean"),
    ArraySpec(
        "U-L1-Cross-Map", "up_blocks.1.map", "cross_map", "maps", ("head", "token", "y", "x"), (2, 4, 2, 4), CONDITIONINGS
    ),
]


def main() -> None:
    """Seven samples in units of two: the third is not finite, the last unit was never written."""
    rng = np.random.default_rng(20261127)
    count = len(TEXTS)
    arrays: dict[str, Any] = {
        s.site: rng.normal(size=(count, len(s.conditionings), 2, *s.shape)).astype(np.float16) for s in SPECS
    }
    spans = np.tile(np.array([(0, 0), (0, 1), (2, 5), (6, 10)], np.int32), (count, 2, 1, 1))
    token_id = rng.integers(0, 99, (count, 2, 4)).astype(np.int32)
    colour = np.array(["red", "", "rouge", "أحمر", "red", "blue", "red"], object)
    store.create_store(
        HERE / "v1.zarr",
        attributes={
            "request": {
                "model": "golden", "revision": None, "weights": "0" * 16, "dataset": "golden", "fingerprint": "0" * 16, "samples": count,
                "sites": [s.site for s in SPECS[:2]], "maps": [SPECS[2].site], "heads": "all", "map_tokens": [0, 1, 2, 3],
                "timesteps": list(TIMESTEPS), "conditionings": list(CONDITIONINGS), "guidance": [4.0], "noise_draws": 1,
                "reduce": {"U-L1-Out": "none", "D-L0-Out": "mean"}, "seed": 0, "resolution": [64, 64], "fit": "crop", "latent_rule": "mean",
                "compute_dtype": "float32", "store_dtype": "float16",
            },
            "data": "shapes:7", "map_tokens_rule": "prompt", "batch_rows": 1, "processes": 1, "pipeline": "GoldenPipeline",
            "random_weights": None, "prediction_type": "epsilon", "special_tokens": {"start": 0, "end": 1}, "versions": {"diffprobe": "0.1.0"},
            "commit": None,
        },
        sample_ids=[f"photos/{number}é.png" for number in range(count)],
        labels={"colour": colour, "size": np.array([0.5, np.nan, 2, 3, 4, 5, 6]), "count": np.arange(count)},
        timesteps=TIMESTEPS,
        prompts={"text": np.array([["", text] for text in TEXTS], object), "token_id": token_id, "token_start": spans[..., 0],
                 "token_end": spans[..., 1]},
        conditionings=CONDITIONINGS,
        tokens=range(4),
        specs=SPECS,
        unit_samples=2,
        dtype="float16",
    )  # fmt: skip
    writer = store.StoreWriter(HERE / "v1.zarr")
    for unit in (0, 1, 2):
        first, last = writer.bounds(unit)
        status = np.array([store.NOT_FINITE if row == 2 else store.COMPLETE for row in range(first, last)], np.uint8)
        writer.write_unit(unit, {name: values[first:last] for name, values in arrays.items()}, status)
    np.savez_compressed(HERE / "v1.npz", token_id=token_id, **arrays)
    (HERE / "v1.json").write_text(
        json.dumps({"texts": TEXTS, "colour": colour.tolist()}, ensure_ascii=False) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
