"""Labels of patches: an attribute of the object that covers each place of a feature map.

Masks come from the dataset that the store names, fitted to the model's size as the images were.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from PIL import Image

from diffprobe.data import fit_masks, load_dataset
from diffprobe.data.samples import Dataset, Sample, did_you_mean, iterate
from diffprobe.store import provenance

BACKGROUND = "background"
PREFIX = "mask:"


def with_mask_labels(features: xr.DataArray, tree: xr.DataTree, attribute: str, dataset: Dataset | None = None) -> xr.DataArray:
    """The features with the coordinate ``mask:ATTRIBUTE`` (sample, y, x), for probes with ``pool="patches"``.

    Args:
        features: (sample, ..., channel, y, x) of a site of the store.
        tree: The store.
        attribute: An attribute of the objects, with or without ``mask:`` in front; "shape" labels each patch with the
            shape that covers most of it, or background.
        dataset: By default the one that the store names.

    Raises:
        ValueError: the features have no y and x, the dataset is not the recorded one, or its objects lack masks or the
            attribute.
    """
    label = PREFIX + attribute.removeprefix(PREFIX)
    if not {"y", "x"} <= set(features.dims):
        raise ValueError(f"Label {label!r} belongs to places, and these features have none: {features.dims}.")
    request = provenance(tree)["request"]
    dataset = dataset if dataset is not None else load_dataset(provenance(tree)["data"])
    if dataset.fingerprint() != request["fingerprint"]:
        raise ValueError(f"{dataset.name} is not the dataset of this store ({request['dataset']}): its content differs.")
    by_id = {sample.id: sample for sample in iterate(dataset)}
    samples = [by_id[str(name)] for name in features["sample"].values]
    grid = features.sizes["y"], features.sizes["x"]
    labels = patch_labels(samples, label.removeprefix(PREFIX), grid, tuple(request["resolution"]), request["fit"])
    return features.assign_coords({label: (("sample", "y", "x"), labels)})


def patch_labels(
    samples: Sequence[Sample], attribute: str, grid: tuple[int, int], size: tuple[int, int], fit: str = "crop"
) -> NDArray[np.object_]:
    """The attribute value that covers the largest part of each patch, or background: (sample, y, x).

    Args:
        attribute: An attribute of the samples' objects, such as "shape"; objects with the same value count together.
        grid: (y, x) patches.
        size: (height, width) of the fitted images in pixels; `fit` is as in `fit_image`.
    """
    labels = np.full((len(samples), *grid), BACKGROUND, object)
    for index, sample in enumerate(samples):
        masks = fit_masks(sample.masks(), size, fit)
        if not len(masks) or len(masks) != len(sample.objects):
            raise ValueError(
                f"Sample {sample.id!r} has {len(masks)} masks and {len(sample.objects)} described objects; patches need both."
            )
        known = dict.fromkeys(str(key) for one in sample.objects for key in one)
        if attribute not in known:
            raise ValueError(f"Objects have no {attribute!r}; they have {', '.join(known)}.{did_you_mean(attribute, known)}")
        # an object without the attribute gets "", for which a probe drops the patch
        values = ["" if (value := o.get(attribute)) is None or value != value else str(value) for o in sample.objects]
        names = sorted(set(values))
        together = np.stack([np.any([m for m, v in zip(masks, values, strict=True) if v == n], axis=0) for n in names])
        cover = np.stack([_shares(mask, grid) for mask in together])
        # a patch is background unless one class covers more of it than is left uncovered
        empty = 1 - _shares(np.any(masks, axis=0), grid)
        labels[index] = np.array([BACKGROUND, *names], object)[np.argmax(np.concatenate([empty[None], cover]), axis=0)]
    return labels


def _shares(mask: NDArray[np.bool_], grid: tuple[int, int]) -> NDArray[np.float32]:
    """The share of each patch's area that a mask (y, x) covers."""
    shrunk = Image.fromarray(mask.astype(np.float32)).resize((grid[1], grid[0]), Image.Resampling.BOX)
    return np.asarray(shrunk)
