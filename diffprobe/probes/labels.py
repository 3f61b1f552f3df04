"""Labels that join features after they were recorded: of samples from a file, of patches from the masks of their objects.

Masks come from the dataset that the store names, fitted to the model's size as the images were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from PIL import Image

from diffprobe.data import fit_masks, load_dataset
from diffprobe.data.labels import label_arrays, read_labels
from diffprobe.data.samples import Dataset, Sample, did_you_mean, iterate
from diffprobe.store import provenance, sample_labels

BACKGROUND = "background"
PREFIX = "mask:"
Labelled = TypeVar("Labelled", xr.DataTree, xr.DataArray)


def with_labels(recorded: Labelled, labels: str | Path | Mapping[str, Mapping[str, Any]]) -> Labelled:
    """A store's tree, or features of it, with labels of samples from elsewhere as coordinates.

    They go before labels of the same name that are there.  A sample that is not named has NaN or "", which probes leave out.

    Args:
        recorded: With the coordinate ``sample``.
        labels: A .csv, .jsonl or .parquet file with a column id, sample, file or file_name and any others, which are the
            labels; or labels by sample id.

    Raises:
        ValueError: the file cannot be read, or names none of the samples.

    >>> features = xr.DataArray(np.ones((2, 3)), dims=("sample", "channel"), coords={"sample": ["a.jpg", "b.jpg"]})
    >>> with_labels(features, {"b.jpg": {"mood": "glad"}})["mood"].values.tolist()
    ['', 'glad']
    """
    ids = [str(name) for name in recorded.coords["sample"].values]
    known = labels if isinstance(labels, Mapping) else read_labels(labels, ids)
    arrays = label_arrays([known.get(name, {}) for name in ids])
    coords = {name: ("sample", values) for name, values in arrays.items()}
    if not isinstance(recorded, xr.DataTree):
        return recorded.assign_coords(coords)
    tree = recorded.copy()
    tree.dataset = recorded.to_dataset().assign_coords(coords)
    return tree


def only_label(tree: xr.DataTree, besides: Sequence[str] = ()) -> str:
    """The label of a store's samples that a probe can read, where there is one alone.

    Args:
        besides: Labels that are not meant, such as that of a split.

    Raises:
        ValueError: there are none or several, which the message lists.
    """
    there = [name for name in sample_labels(tree) if name not in besides]
    # a label can be read where it is a number, or a word that recurs, and differs between samples
    varied = {name: np.unique(tree.coords[name].values) for name in there}
    readable = [
        n
        for n, values in varied.items()
        if len(values) > 1 and (len(values) < tree.sizes["sample"] or values.dtype.kind in "if")
    ]
    if len(readable) == 1:
        return readable[0]
    if readable:
        raise ValueError(f"Which label is to be read? There are {', '.join(sorted(readable))}; name one with --label.")
    raise ValueError(
        f"There is no label to read (of the samples there are: {', '.join(sorted(there)) or 'none'}); join some with --labels FILE."
    )


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
