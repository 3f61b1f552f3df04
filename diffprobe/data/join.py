"""Several datasets as one, and some samples of one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from diffprobe.data.samples import Dataset, IndexedDataset, Sample, join_spec


def joined_fingerprint(fingerprints: Sequence[str]) -> str:
    """The fingerprint of datasets that are joined in this order."""
    return hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()[:16]


class JoinedDataset(IndexedDataset):
    """The samples of several datasets, one after the other; ``join:?part0=SPEC&part1=SPEC`` on the command line.

    >>> from diffprobe.data import ShapesDataset, load_dataset
    >>> both = JoinedDataset([ShapesDataset(2), ShapesDataset(3, "test")])
    >>> len(both), both[2].id, load_dataset(both.spec)[4].id
    (5, 'shapes-test-0-000000', 'shapes-test-0-000002')
    """

    def __init__(self, parts: Sequence[Dataset]) -> None:
        self.parts = list(parts)
        self.name = "+".join(part.name for part in parts)
        self.spec = join_spec("join", "", {f"part{number}": part.spec for number, part in enumerate(parts)})
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def sample(self, index: int) -> Sample:
        number = next(number for number, end in enumerate(self._ends) if index < end)
        return self.parts[number][index - ([0, *self._ends][number])]

    def fingerprint(self) -> str:
        return joined_fingerprint([part.fingerprint() for part in self.parts])

    @property
    def image_digests(self) -> list[str]:
        """A hash of every image; AttributeError where a part has none."""
        parts: list[Any] = self.parts
        return [digest for part in parts for digest in part.image_digests]


class PartDataset(IndexedDataset):
    """Some samples of a dataset, by their index in it.  Texts that come from other samples still come from all of them."""

    def __init__(self, whole: Dataset, rows: Sequence[int]) -> None:
        self.whole, self.rows = whole, list(rows)
        self.name, self.spec = whole.name, whole.spec

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int) -> Sample:
        return self.whole[self.rows[index]]

    def content(self) -> Iterator[bytes]:
        yield f"{self.whole.fingerprint()} {self.rows}".encode()
