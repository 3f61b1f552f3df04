"""Write six real photographs with captions into a folder, from what scikit-image and scikit-learn carry.

    python -m experiments.photographs runs/photographs

The embedded model was trained on drawn shapes and has never seen a photograph; it shows that the path works, not
what Stable Diffusion would see there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import skimage
from PIL import Image
from sklearn.datasets import load_sample_images

CAPTIONS = {
    "astronaut": "a photo of a woman in an orange suit and a white circle behind her",
    "coffee": "a photo of a white cup on a brown circle and a small spoon",
    "chelsea": "a photo of an orange cat with green eyes",
    "rocket": "a photo of a white rocket above a dark background",
    "china": "a photo of a red temple below a blue sky",
    "flower": "a photo of a large orange flower on a dark background",
}


def main(folder: Path) -> None:
    """Photographs and a captions file, as `FolderDataset` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    images = dict(zip(("china", "flower"), load_sample_images().images, strict=True))
    for name in ("astronaut", "coffee", "chelsea", "rocket"):
        images[name] = getattr(skimage.data, name)()
    rows = []
    for name, caption in CAPTIONS.items():
        Image.fromarray(images[name]).save(folder / f"{name}.jpg", quality=92)
        rows.append(json.dumps({"file": f"{name}.jpg", "caption": caption}))
    (folder / "captions.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    print(f"{len(rows)} photographs in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/photographs"))
