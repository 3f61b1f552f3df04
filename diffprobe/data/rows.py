"""Images at scale: a dataset of the hub saved on disk, WebDataset shards, a folder behind a URL.

The first two are read by the library `datasets`, one row at a time.  The invariant: ids are those of the source, so they stay
when rows are added; an image that is missing or broken is an `ImageError` of its own sample.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from PIL import Image

from diffprobe.data.drawn import spread
from diffprobe.data.files import cache_folder
from diffprobe.data.folder import SUFFIXES, FolderDataset
from diffprobe.data.images import ImageError, decode_image
from diffprobe.data.samples import Caption, IndexedDataset, Sample, join_spec
from diffprobe.rundir import first_line, optional, reaching, whole_folder

IDS = ("id", "__key__", "file_name")  # columns that name a row, by preference
CAPTIONS = ("caption", "captions", "text", "txt")


class RowsDataset(IndexedDataset):
    """Rows with an image; ``hf:PATH`` (saved by `save_to_disk`) and ``tar:GLOB`` (WebDataset) on the command line.

    The column of images is the first that is one.  Captions stand in the first of `CAPTIONS`, a text or a list of them; other
    texts and numbers are labels, those of a WebDataset's ``json`` among them.  The id is the first of `IDS`, else the number.

    Args:
        kind: "hf" or "tar".
        source: A folder, or the path, pattern or URL of tar files.
        split: Of a folder with several.

    Raises:
        ValueError: nothing can be read there, or it has no images.
    """

    def __init__(self, kind: str, source: str, split: str | None = None, limit: int | None = None) -> None:
        datasets = optional("datasets", f"{kind}:{source} takes the library datasets: pip install 'diffprobe[scale]'")
        try:
            if kind == "hf":
                found: Any = datasets.load_from_disk(str(Path(source).expanduser()))
            else:
                found = datasets.load_dataset("webdataset", data_files=source, split="train")
        except Exception as error:  # its builders raise their own kinds on what is not there or broken
            what = "a dataset that save_to_disk wrote" if kind == "hf" else "tar files of images"
            raise ValueError(f"{kind}:{source} is not {what} ({first_line(error)}).") from error
        if isinstance(found, datasets.DatasetDict):
            if (split or "") not in found:
                raise ValueError(f"{kind}:{source} has the splits {', '.join(found)}; choose one with split=.")
            found = found[split]
        kinds = found.features
        self._image = next((name for name, one in kinds.items() if isinstance(one, datasets.Image)), None)
        if self._image is None:
            raise ValueError(f"{kind}:{source} has no column of images; it has {', '.join(kinds)}.")
        found = found.cast_column(self._image, datasets.Image(decode=False))
        self._rows = found.select(range(min(limit, len(found)))) if limit else found
        self._names = {name: one.names for name, one in kinds.items() if isinstance(one, datasets.ClassLabel)}
        self._texts = self._rows.select_columns([name for name in kinds if not isinstance(kinds[name], datasets.Image)])
        self.name = f"{kind}-{Path(source).stem}"
        options = {"split": split, "limit": limit}
        self.spec = join_spec(kind, source, {name: value for name, value in options.items() if value is not None})

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, index: int) -> Sample:
        row = dict(self._texts[index]) if self._texts.column_names else {}
        more = row.pop("json", None)
        row |= more if isinstance(more, dict) else {}
        name = next((str(row.pop(column)) for column in IDS if row.get(column)), f"{index:08}")
        texts: Any = next((row.pop(column) for column in CAPTIONS if row.get(column)), [])
        captions = tuple(Caption(str(text).strip()) for text in ([texts] if isinstance(texts, str) else texts))
        labels = {
            key: self._names[key][value] if key in self._names and isinstance(value, int) else value
            for key, value in row.items()
            if isinstance(value, str | int | float) and not key.startswith("__") and key not in (*IDS, *CAPTIONS)
        }
        return Sample(name, partial(self._load, index, name), captions, labels)

    def _load(self, index: int, name: str) -> Image.Image:
        cell = self._rows[index][self._image]
        if not cell or not cell.get("bytes"):  # a path alone could name any file of this machine
            raise ImageError(f"'{name}' has no bytes of an image in its row; save the dataset with its images embedded.")
        return decode_image(cell["bytes"], name)

    def content(self) -> Iterator[bytes]:
        """Ids and texts of all rows; the images of some, evenly spread."""
        for index in range(len(self)):
            sample = self.sample(index)
            yield json.dumps([sample.id, [c.text for c in sample.captions], sorted(sample.labels.items())]).encode()
        for index in spread(len(self)):
            yield (self._rows[index][self._image] or {}).get("bytes") or b""


def folder_at(url: str, limit: int | None = None) -> FolderDataset:
    """A folder behind a URL that fsspec knows, copied once into the cache ($DIFFPROBE_CACHE), with its captions.

    A later call copies only where names or sizes have changed.

    Raises:
        ValueError: the URL does not answer, or has no images.
    """
    with reaching(url):
        files, root = url_to_fs(url)
        there = {name: info["size"] for name, info in files.find(root, detail=True).items()}
    if not any(name.lower().endswith(SUFFIXES) for name in there):
        raise ValueError(f"{url} holds no images ({', '.join(SUFFIXES)}); check the URL, or its credentials.")
    state = hashlib.sha256(json.dumps([url, sorted(there.items())]).encode()).hexdigest()[:16]
    place = cache_folder() / "folders" / state / (root.rstrip("/").rpartition("/")[2] or "root")
    if not place.is_dir():
        with reaching(url), whole_folder(place) as building:
            files.get(root.rstrip("/") + "/", f"{building}/", recursive=True)
    found = FolderDataset(place, limit=limit)
    found.origin = url
    return found
