"""Scenes of the drawn world as a dataset: image, masks, captions, labels and questions of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from diffprobe.data.questions import questions
from diffprobe.data.samples import IndexedDataset, Question, Sample
from diffprobe.data.shapes import CAPTION_STYLES, Scene, all_alike, caption, picture, random_scene, relation, render

FINGERPRINTED = 256  # scenes in a fingerprint: a quarter of a second


def spread(count: int) -> list[int]:
    """The indices of drawn items that a fingerprint covers: all of few, `FINGERPRINTED` evenly spread ones of many.

    >>> spread(3), len(spread(10**6)), spread(10**6)[-1]
    ([0, 1, 2], 256, 999999)
    """
    return sorted({round(place * (count - 1) / (FINGERPRINTED - 1)) for place in range(FINGERPRINTED) if count})


def scene_labels(scene: Scene) -> dict[str, str | int | float]:
    """The labels of a scene for probes; object attributes are those of the first object."""
    first = scene.objects[0]
    labels: dict[str, str | int | float] = {
        "n_objects": len(scene.objects),
        "colour": first.colour,
        "shape": first.shape,
        "size": first.size,
        "fill": first.fill,
        "tone": scene.tone,
        "texture": scene.texture,
    }
    if len(scene.objects) == 2 and not all_alike(scene):
        labels["relation"] = relation(scene.objects[0], scene.objects[1]) or "none"
    return labels


@dataclass(frozen=True)
class ShapesDataset(IndexedDataset):
    """`count` scenes of one split; ``shapes:256?split=test&objects=1`` on the command line.

    >>> sample = ShapesDataset(4)[0]
    >>> sample.id, len(sample.captions) >= 5
    ('shapes-train-0-000000', True)
    """

    count: int
    split: str = "train"
    seed: int = 0
    n_objects: int | None = None

    @property
    def name(self) -> str:
        suffix = "" if self.n_objects is None else f"-n{self.n_objects}"
        return f"shapes-{self.split}-{self.seed}{suffix}"

    @property
    def spec(self) -> str:
        objects = "" if self.n_objects is None else f"&objects={self.n_objects}"
        return f"shapes:{self.count}?split={self.split}&seed={self.seed}{objects}"

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> Scene:
        return random_scene(self.seed, index, self.split, self.n_objects)

    def sample(self, index: int) -> Sample:
        scene = self.scene(index)
        return Sample(
            id=f"{self.name}-{index:06d}",
            load=lambda: picture(scene),
            masks=lambda: render(scene)[1],
            captions=tuple(caption(scene, style) for style in CAPTION_STYLES),
            labels=scene_labels(scene),
            questions=self._questions(scene),
            objects=tuple(vars(o) for o in scene.objects),
        )

    def _questions(self, scene: Scene) -> tuple[Question, ...]:
        asked = questions(scene, self.seed)
        # where all scenes have the same number of objects, "how many" can be answered without the image
        return asked if self.n_objects is None else tuple(q for q in asked if q.category != "count")

    def content(self) -> Iterator[bytes]:
        """The parameters and scenes from first to last, pixels and words: changes when the drawing code does."""
        yield repr(self).encode()
        for index in spread(self.count):
            scene = self.scene(index)
            texts = [caption(scene, style).text for style in CAPTION_STYLES]
            texts += [f"{question.text} {question.answer}" for question in self._questions(scene)]
            yield from (part.tobytes() for part in render(scene))
            yield repr((scene_labels(scene), texts)).encode()
