"""A store in the formats of others: npz, safetensors, Parquet, datasets of the hub; needs no torch.

Every format has the sample ids, the labels and the prompts beside the arrays.  The invariant: memory holds one block of
samples at a time.  Arrays keep the store's number type, but for Parquet, whose readers mostly know no float16.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from safetensors.numpy import save_file

from diffprobe.rundir import is_remote, optional, whole_file, whole_folder
from diffprobe.store import SHARD_BYTES, choose, known, open_store, provenance, sample_labels, site_names

Format = Literal["npz", "safetensors", "parquet", "hf"]


def export(
    path: str | Path,
    out: str | Path,
    form: Format,
    *,
    sites: Sequence[str] = (),
    timesteps: Sequence[int] = (),
    conditionings: Sequence[str] = (),
) -> int:
    """Writes the complete samples of a store in another format; what is not given is written whole.

    Args:
        form: "npz": one file with an array (sample, conditioning, timestep, ...) a site.  "safetensors": a folder with the same
            in files of some samples each, and ``samples.csv``.  "parquet": one file, and "hf": a folder for `load_from_disk`,
            with a row a sample and a column SITE/CONDITIONING/TIMESTEP; in Parquet it is a list, its shape in the field's
            metadata.

    Returns:
        The number of samples.

    Raises:
        ValueError: the store lacks something that is asked for, `out` is taken, or the format's library is missing.
    """
    if form not in get_args(Format):
        raise ValueError(f"{form!r} is not one of {', '.join(get_args(Format))}.")
    if is_remote(out) or Path(out).exists():
        raise ValueError(f"{out} {'is a URL' if is_remote(out) else 'exists'}; give a new path of this machine.")
    tree, out = open_store(path), Path(out)
    arrays = {}
    for name in sites or site_names(tree):
        data = tree[known(name, site_names(tree), "site")].to_dataset()
        array = data["maps" if "maps" in data else "features"]
        for axis, values in (("timestep", timesteps), ("conditioning", conditionings)):
            array = choose(array, axis, list(values) or None)
        arrays[name] = array
    write = {"npz": _npz, "safetensors": _safetensors, "parquet": _parquet, "hf": _hf}[form]
    write(out, arrays, _samples(tree))
    return int(tree.sizes["sample"])


def _samples(tree: xr.DataTree) -> pd.DataFrame:
    """Ids, labels and the prompts of each conditioning; one row a sample."""
    root = tree.to_dataset()
    labels = {name: root[name].values for name in sample_labels(root)}
    texts = tree["prompts"].to_dataset()["text"].values
    prompts = {f"prompt/{name}": texts[:, n] for n, name in enumerate(provenance(tree)["request"]["conditionings"])}
    return pd.DataFrame({"id": root["sample"].values, **labels, **prompts})


def _blocks(arrays: dict[str, xr.DataArray]) -> Iterator[tuple[slice, dict[str, NDArray[Any]]]]:
    count = next(iter(arrays.values())).sizes["sample"]
    size = max(1, SHARD_BYTES * count // max(1, sum(array.nbytes for array in arrays.values())))
    for first in range(0, count, size):
        rows = slice(first, min(first + size, count))
        yield rows, {name: array.isel(sample=rows).values for name, array in arrays.items()}


def _npz(out: Path, arrays: dict[str, xr.DataArray], samples: pd.DataFrame) -> None:
    small = {str(name): np.array(column.tolist()) for name, column in samples.items()}
    for name, array in arrays.items():
        small |= {f"{name}/{axis}": array[axis].values for axis in ("conditioning", "timestep")}
    with whole_file(out) as beside, zipfile.ZipFile(beside, "w") as archive:
        for name, values in small.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, values, allow_pickle=False)
        for name, array in arrays.items():
            header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_2_0(file, header)
                for _, block in _blocks({name: array}):
                    file.write(block[name].tobytes())


def _safetensors(out: Path, arrays: dict[str, xr.DataArray], samples: pd.DataFrame) -> None:
    told = {
        f"{name}/{axis}": ",".join(map(str, a[axis].values))
        for name, a in arrays.items()
        for axis in ("conditioning", "timestep")
    }
    with whole_folder(out) as folder:
        samples.to_csv(folder / "samples.csv", index=False)
        for number, (rows, block) in enumerate(_blocks(arrays)):
            contiguous = {name: np.ascontiguousarray(values) for name, values in block.items()}
            metadata = told | {"first_sample": str(rows.start), "last_sample": str(rows.stop - 1)}
            save_file(contiguous, folder / f"part-{number:05}.safetensors", metadata=metadata)


def _cells(arrays: dict[str, xr.DataArray]) -> dict[str, xr.DataArray]:
    """One array (sample, ...) for each site, conditioning and timestep."""
    return {
        f"{name}/{c}/{t}": array.isel(conditioning=i, timestep=j)
        for name, array in arrays.items()
        for i, c in enumerate(array["conditioning"].values)
        for j, t in enumerate(array["timestep"].values)
    }


def _parquet(out: Path, arrays: dict[str, xr.DataArray], samples: pd.DataFrame) -> None:
    pa, parquet = (
        optional(name, "Writing Parquet takes: pip install 'diffprobe[hub]'") for name in ("pyarrow", "pyarrow.parquet")
    )
    cells, fields = _cells(arrays), list(pa.Schema.from_pandas(samples, preserve_index=False))
    for name, cell in cells.items():
        kind = pa.list_(pa.float32(), int(np.prod(cell.shape[1:], dtype=np.int64)))
        fields.append(pa.field(name, kind, metadata={"shape": ",".join(map(str, cell.shape[1:]))}))
    schema = pa.schema(fields)
    with whole_file(out) as beside, parquet.ParquetWriter(beside, schema) as writer:
        for rows, block in _blocks(cells):
            columns = [pa.array(samples[name][rows], schema.field(name).type) for name in samples]
            flat = [pa.array(values.astype(np.float32).ravel()) for values in block.values()]
            columns += [
                pa.FixedSizeListArray.from_arrays(values, type=schema.field(name).type)
                for name, values in zip(block, flat, strict=True)
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _hf(out: Path, arrays: dict[str, xr.DataArray], samples: pd.DataFrame) -> None:
    datasets = optional("datasets", "Writing a dataset of the hub takes: pip install 'diffprobe[scale]'")
    cells = _cells(arrays)
    kinds = {"i": "int64", "f": "float64"}
    features: dict[str, Any] = {
        str(name): datasets.Value(kinds.get(column.dtype.kind, "string")) for name, column in samples.items()
    }
    for name, cell in cells.items():
        shape, dtype = cell.shape[1:], str(cell.dtype)
        array_kind: Any = getattr(datasets, f"Array{len(shape)}D", None)
        features[name] = array_kind(shape, dtype) if array_kind else datasets.List(datasets.Value(dtype), length=shape[0])

    def rows() -> Iterator[dict[str, Any]]:
        for part, block in _blocks(cells):
            for number, row in enumerate(samples[part].to_dict("records")):
                yield {str(name): value for name, value in row.items()} | {
                    name: values[number] for name, values in block.items()
                }

    with whole_folder(out) as folder, tempfile.TemporaryDirectory(dir=out.parent) as cache:
        datasets.Dataset.from_generator(rows, features=datasets.Features(features), cache_dir=cache).save_to_disk(folder)
