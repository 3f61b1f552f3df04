"""The one forward engine: images, prompts, timesteps and noise draws go in, tensors by site come out.

A row is one pass of the network: one image under one prompt at one timestep with one draw of noise.  Rows share batches.
The invariant: what a row gives depends on the row alone and not, beyond rounding, on the batch that it shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffprobe.data.images import fit_image, normalised_pixels
from diffprobe.encoders import EncoderRecorder, VisionEncoder
from diffprobe.models import DiffusionModel, LatentRule, out_of_memory
from diffprobe.noise import noise_seed, sample_noise
from diffprobe.prompts import EncodedText
from diffprobe.recorder import Recorder

Listener: TypeAlias = Recorder | EncoderRecorder
Pixels = NDArray[np.float32]
_TEXTS = 64  # prompts that a text encoder takes at once
T = TypeVar("T")


class NotFiniteError(RuntimeError):
    """The model gave a value that is not finite, or that the store's dtype cannot hold."""


class Row(NamedTuple):
    """One pass: the image by its place among the latents, the prompt (None: unconditional), the timestep and the noise draw."""

    image: int
    prompt: str | None
    timestep: int
    draw: int = 0


@dataclass(frozen=True)
class Batch:
    """Rows that shared a pass, with its inputs and what was recorded.

    Attributes:
        rows: in the order of the tensors' first axis; `first` is the place of their first among all that are run.
        inputs: (row, channel, y, x): noised latents, or a vision encoder's images.
        noise: (row, channel, y, x) float32 on the model's device; None for a vision encoder.
        timesteps: (row,).
        text: one prompt a row.
        tensors: by site name, (row, ...); not to be written into, for they may be the network's own.
        prediction: (row, channel, y, x), the predicted noise; None where the recorder stopped the pass early.
    """

    rows: Sequence[Row]
    inputs: Float[Tensor, "row channel y x"]
    noise: Float[Tensor, "row channel y x"] | None
    timesteps: Int[Tensor, " row"]
    text: EncodedText
    tensors: dict[str, Tensor]
    prediction: Float[Tensor, "row channel y x"] | None
    first: int = 0


def to_pixels(image: Image.Image, size: tuple[int, int], fit: str) -> Pixels:
    """An image brought to (height, width), as (3, height, width) float32 in [-1, 1].

    NumPy alone, for it may run in a thread beside the model's: a torch operation there would start a second team of OpenMP
    threads, after which the model's own team no longer spins at its barriers (a third slower on two cores).

    >>> to_pixels(Image.new("RGB", (8, 4), "white"), (4, 4), "crop").max()
    np.float32(1.0)
    """
    return normalised_pixels(fit_image(image, size, fit))


def rows_not_finite(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Bool[np.ndarray, " row"]:
    """The rows with a value that is not finite in the dtype.

    A row's sum is finite only where all its values are: one pass, and no mask of the tensor's size.

    >>> rows_not_finite({"a": torch.tensor([[1.0], [1e6]])}, torch.float16).tolist()
    [False, True]
    """
    sums = torch.stack([t.to(dtype).flatten(1).sum(1, dtype=torch.float32) for t in tensors.values()])
    return (~sums.isfinite().all(0)).cpu().numpy()


def in_parts(run: Callable[[slice], T], count: int, size: int, smaller: Callable[[int, int], None]) -> list[T]:
    """Runs `count` items in parts of at most `size`; a part that does not fit into memory is halved, and so are later parts.

    Args:
        smaller: called with the size that did not fit and the new size.
    """
    found: list[T] = []
    start = 0
    while start < count:
        size = min(size, count - start)
        try:
            found.append(run(slice(start, start + size)))
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or size == 1:
                raise
        else:
            start += size
            continue
        smaller(size, size // 2)  # outside of the handler, whose traceback holds the pass's tensors
        size //= 2
    return found


class Engine:
    """Passes of one model in batches that fit into memory.

    Args:
        model: a diffusion model, or a vision encoder, which has neither noise nor prompts.
        batch_rows: the most rows of a pass; it shrinks where memory is short.

    Attributes:
        cut: the prompts so far that were longer than the text encoder takes.
    """

    def __init__(
        self,
        model: DiffusionModel | VisionEncoder,
        *,
        seed: int = 0,
        latent_rule: LatentRule = "mean",
        batch_rows: int = 1,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.model, self.seed, self.latent_rule, self.batch_rows, self.log = model, seed, latent_rule, batch_rows, log
        self.cut: set[str] = set()
        self._encoder_rows = 0  # images of one encoder pass, once more did not fit
        self._texts: dict[str | None, EncodedText] = {}

    def encode_images(self, images: Sequence[Pixels] | Pixels, ids: Sequence[str]) -> Float[Tensor, "image channel y x"]:
        """Latents of images in [-1, 1], (3, height, width) each."""

        def encode(part: slice) -> Tensor:
            generators = [torch.Generator("cpu").manual_seed(noise_seed(self.seed, name, -1)) for name in ids[part]]
            return self.model.encode_image(torch.from_numpy(np.stack(list(images[part]))), self.latent_rule, generators)

        def smaller(size: int, fits: int) -> None:
            self._encoder_rows = fits
            self.log(f"Encoding {size} images at once did not fit into memory; going on with {fits}.")

        size = self._encoder_rows or max(1, self.batch_rows // 4)  # an encoder's activations are larger than the network's
        return torch.cat(in_parts(encode, len(images), size, smaller))

    def encode_prompts(self, prompts: Sequence[str | None]) -> dict[str | None, EncodedText]:
        """Encodes each distinct prompt once; only prompts of the newest call are kept for the next."""
        wanted = dict.fromkeys(prompts)
        known = {prompt: text for prompt, text in self._texts.items() if prompt in wanted}
        fresh = [prompt for prompt in wanted if prompt not in known]
        for part in (fresh[start : start + _TEXTS] for start in range(0, len(fresh), _TEXTS)):
            encoded = self.model.encode_text(part)
            known |= {prompt: encoded.take([row]) for row, prompt in enumerate(part)}
            self.cut |= {str(prompt) for prompt, cut in zip(part, encoded.truncated, strict=True) if cut}
        self._texts = known
        return known

    def run(
        self,
        recorder: Listener,
        latents: Tensor | Sequence[Tensor] | Mapping[int, Tensor],
        ids: Sequence[str],
        rows: Sequence[Row],
    ) -> Iterator[Batch]:
        """Runs rows in batches of nearly equal size.

        Args:
            latents, ids: latent and id by the rows' `image`.
        """
        texts = self.encode_prompts([row.prompt for row in rows])
        done = 0
        while done < len(rows):  # the batch size can shrink on the way
            left = len(rows) - done
            batch = rows[done : done + -(-left // -(-left // self.batch_rows))]
            batch = batch[: EncodedText.together([texts[row.prompt] for row in batch])]
            timesteps = torch.tensor([row.timestep for row in batch])
            places, noise = [row.image for row in batch], None
            # indexing keeps a tensor's order of memory, which decides the last bits of what a convolution makes of it
            inputs = latents[places] if isinstance(latents, Tensor) else torch.stack([latents[place] for place in places])
            if isinstance(self.model, DiffusionModel):
                drawn = [sample_noise(self.seed, ids[row.image], row.timestep, row.draw, inputs.shape[1:]) for row in batch]
                noise = torch.stack(drawn).to(inputs.device)
                inputs = self.model.add_noise(inputs, noise, timesteps)
            text = EncodedText.concatenate([texts[row.prompt] for row in batch])
            yield self._pass(recorder, Batch(batch, inputs, noise, timesteps, text, {}, None, done))
            done += len(batch)

    def _pass(self, recorder: Listener, batch: Batch) -> Batch:
        def once(part: slice) -> tuple[dict[str, Tensor], Tensor | None]:
            whole = part == slice(0, len(batch.rows))
            text = batch.text if whole else batch.text.take(range(*part.indices(len(batch.rows))))
            prediction = self.model.forward(batch.inputs[part], batch.timesteps[part], text)
            return dict(recorder.last), prediction

        def smaller(size: int, fits: int) -> None:
            self.batch_rows = min(self.batch_rows, fits)
            self.log(f"A batch of {size} did not fit into memory; going on with {fits}.")

        parts = in_parts(once, len(batch.rows), len(batch.rows), smaller)
        if len(parts) == 1:
            return replace(batch, tensors=parts[0][0], prediction=parts[0][1])
        tensors = {name: torch.cat([part[name] for part, _ in parts]) for name in parts[0][0]}
        predictions = [prediction for _, prediction in parts if prediction is not None]
        return replace(batch, tensors=tensors, prediction=torch.cat(predictions) if predictions else None)

    def in_float32(self, recorder: Listener, batch: Batch) -> Batch:
        """Runs the rows of a batch again with the network in float32, and restores its dtype."""
        dtype, network, text = self.model.dtype, self.model.network.float(), batch.text
        try:
            return self._pass(recorder, replace(batch, inputs=batch.inputs.float(), text=text.float()))
        finally:
            network.to(dtype)
