"""A folder of photographs as a dataset, with or without captions.

Captions come from the file that is named, else from `captions.jsonl` or `captions.csv` in the folder, else from the hub's
`metadata.csv`, `.jsonl` or `.parquet` in it or in its subfolders, else from a text file beside each image (`cat.jpg`,
`cat.txt`; one caption a line).  Subfolders say an image's class and its part of a split.  Hidden files are left out.  The
invariant: nothing outside the folder is read, except a captions file that the caller names.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path

from diffprobe.data.files import check_inside, content_digests, listed, numbered_lines, real_path, spellings
from diffprobe.data.images import read_image
from diffprobe.data.labels import CAPTION_COLUMNS, FORMATS, Known, folder_labels, read_known
from diffprobe.data.samples import Caption, IndexedDataset, Sample, join_spec

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif")
CAPTION_FILES = ("captions.jsonl", "captions.csv")
METADATA_FILES = tuple(f"metadata{suffix}" for suffix in FORMATS)


class FolderDataset(IndexedDataset):
    """The images of a folder and of its subfolders, sorted; a sample's id is its path inside the folder.

    Args:
        root: The folder.
        captions: A `.jsonl` file of ``{"file": ..., "caption": ...}`` (or ``"captions": [...]``) or a `.csv` file
            with columns file and caption, or a `.parquet` file of the same; other keys and columns become labels.  In the
            hub's metadata files the image is called file_name, its place is that in the metadata file's own folder, and a
            text is a caption.  An image does not have a label that is empty, null or NaN or, among numbers, inf or a word
            such as NA.  Labels of a file go before those of folders (`class`, `split`).

    Raises:
        ValueError: the folder is missing or has no images, or its captions do not fit it.
    """

    origin = ""  # the URL that the folder is a copy of

    def __init__(self, root: str | Path, captions: str | Path | None = None, limit: int | None = None) -> None:
        self.root = real_path(root)
        if not self.root.is_dir():
            found = "is a file" if self.root.exists() else "does not exist"
            raise ValueError(f"A folder of images was asked for, but '{root}' {found}; name an existing folder.")
        self.name = f"folder-{self.root.name}"
        self._sources: list[Path] = []
        self.files = self._scan()
        if not self.files:
            raise ValueError(
                f"'{root}' and its subfolders hold no images ({', '.join(SUFFIXES)}); add some, or name another folder."
            )
        if captions is None:
            self._check_sources()
        else:
            self._sources = [Path(captions).expanduser()]
        self._known = self._read_captions() if self._sources else self._sidecars()
        self.limit, self.files = limit, self.files[:limit]
        self._folders = folder_labels(self.files)

    @property
    def spec(self) -> str:
        place = self.origin or str(self.root)
        return place if self.limit is None else f"{join_spec('', place, {})[1:]}?limit={self.limit}"

    def only(self, names: Iterable[str]) -> FolderDataset:
        """The same folder with these images alone, so that what they are can be compared with what they were."""
        part, wanted = copy.copy(self), set(names)
        kept = [(name, labels) for name, labels in zip(self.files, self._folders, strict=True) if name in wanted]
        part.files, part._folders = [name for name, _ in kept], [labels for _, labels in kept]
        for cached in ("_fingerprint", "image_digests"):
            part.__dict__.pop(cached, None)
        return part

    def _scan(self) -> list[str]:
        found, nowhere = [], []
        for path in self.root.rglob("*"):
            place = path.relative_to(self.root)
            if any(part.startswith(".") for part in place.parts):
                continue
            image = path.suffix.lower() in SUFFIXES
            source = path.name in METADATA_FILES or place.as_posix() in CAPTION_FILES
            if path.is_symlink() and (path.is_dir() or image):
                check_inside(self.root, path)
            if image and path.is_file():
                found.append(place.as_posix())
            elif source and path.is_file():
                self._sources.append(path)
            elif path.is_symlink() and not path.exists() and (image or source or path.suffix == ".txt"):
                nowhere.append(f"'{place.as_posix()}'")
        if nowhere:
            raise ValueError(
                f"{len(nowhere)} link(s) of the folder '{self.root}' lead nowhere: {listed(sorted(nowhere))}. Remove them, or "
                "put the files there."
            )
        return sorted(found)

    def _check_sources(self) -> None:
        """Raises ValueError where it is not known which of several files holds the captions."""
        order = (*CAPTION_FILES, *METADATA_FILES)
        self._sources.sort(key=lambda path: (path.parent, order.index(path.name)))
        own = [path for path in self._sources if path.name in CAPTION_FILES]
        for path in self._sources:
            beside = [other for other in self._sources if other.parent == path.parent or own]
            if len(beside) > 1:
                names = " and ".join(other.relative_to(self.root).as_posix() for other in beside)
                raise ValueError(f"'{self.root}' holds both {names}; remove one, or say which with `captions`.")
            check_inside(self.root, path)

    def _sidecars(self) -> dict[str, Known]:
        known = {}
        for name in self.files:
            beside = [(self.root / form).with_suffix(".txt") for form in spellings(name)]
            if path := next((path for path in beside if path.is_file()), None):
                check_inside(self.root, path)
                known[name] = Known([line.strip() for _, line in numbered_lines(path)])
        return known

    def _read_captions(self) -> dict[str, Known]:
        """Captions and labels by image; files of them may name only images of this folder."""
        files, found = set(self.files), dict[str, Known]()
        for source in self._sources:
            if not source.is_file():
                raise ValueError(f"The captions file '{source}' does not exist; check its name, or leave it out.")
            hub = source.name in METADATA_FILES and real_path(source).is_relative_to(self.root)
            before = source.parent.relative_to(self.root).as_posix() if hub else "."

            def find(name: str, before: str = before) -> str | None:
                placed = name if before == "." else f"{before}/{name}"
                return next((form for form in spellings(placed) if form in files), None)

            known, missing = read_known(source, find, captions=(*CAPTION_COLUMNS, *["text"] * hub))
            if missing:
                raise ValueError(
                    f"'{source}' names {len(missing)} file(s) that are no images of '{self.root}': {listed(missing)}. "
                    f"It has {len(files)} images, the first '{self.files[0]}'. Correct the names (they are relative to the "
                    "folder), or remove those lines."
                )
            found |= known
        return found

    def __len__(self) -> int:
        return len(self.files)

    def sample(self, index: int) -> Sample:
        name = self.files[index]
        known = self._known.get(name, Known())
        return Sample(
            id=name,
            load=partial(read_image, self.root / name),
            captions=tuple(Caption(text) for text in known.captions),
            labels=self._folders[index] | known.labels,
        )

    @property
    def captioned(self) -> bool:
        """Whether any image has a caption."""
        return any(known.captions for known in self._known.values())

    def content(self) -> Iterator[bytes]:
        """Names, contents and captions; no labels, which decide no feature, and no times, which a copy changes."""
        texts = (self._known.get(name, Known()).captions for name in self.files)
        rows = [[*row, []] for row in zip(self.files, self.image_digests, texts, strict=True)]
        yield json.dumps(rows).encode()

    @cached_property
    def image_digests(self) -> list[str]:
        """A hash of each sample's image file, by which a store can say which image was changed."""
        return content_digests(self.root, self.files)
