"""A dataset with grey images, to measure what a model says without seeing."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from diffprobe.data.samples import Dataset, Sample

GREY = (128, 128, 128)


@dataclass(frozen=True)
class BlankDataset:
    """The samples of another dataset with uniform grey images; ``blank:SPEC`` on the command line.

    Ids, and with them noise and captions, stay; masks, labels and questions, which describe the image, are dropped.

    >>> from diffprobe.data.drawn import ShapesDataset
    >>> blank = BlankDataset(ShapesDataset(2))
    >>> blank[0].id == ShapesDataset(2)[0].id, blank[0].load().getextrema()
    (True, ((128, 128), (128, 128), (128, 128)))
    """

    source: Dataset

    @property
    def name(self) -> str:
        return f"blank-{self.source.name}"

    @property
    def spec(self) -> str:
        return f"blank:{self.source.spec}"

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        sample = self.source[index]
        return Sample(sample.id, lambda: Image.new("RGB", (64, 64), GREY), captions=sample.captions)

    def fingerprint(self) -> str:
        return f"blank-{self.source.fingerprint()}"
