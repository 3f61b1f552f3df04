"""What training costs before it is run: FLOPs, memory and hours from the shapes of the parts alone.

FLOPs are counted as torch's `FlopCounterMode` does: two for each multiply-add of a matrix product or convolution, nothing
for the rest; attention over the full square, though a causal kernel needs half of it.

The invariant: nothing here is measured.  FLOPs are exact for the shapes; memory leaves out the allocator's waste and the
encoders' short-lived activations; hours stand and fall with the utilisation that is assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Engine = Literal["DDP", "FSDP"]
HALF, FULL = 2, 4  # bytes of bfloat16 and float32


@dataclass(frozen=True)
class Transformer:
    """The shape of a stack of transformer layers.

    Attributes:
        layers: how many.
        width: of the residual stream.
        inner: of the feed-forward layer.
        key_width: of all key heads together; less than `width` where query heads share them.
        gated: whether the feed-forward layer has three matrices (Llama) or two.
        vocabulary: of the output layer; 0 where there is none.
    """

    layers: int
    width: int
    inner: int
    key_width: int
    gated: bool = False
    vocabulary: int = 0

    def layer_weights(self) -> int:
        """Weights in the matrices of one layer.

        >>> Transformer(32, 4096, 11008, 4096, gated=True).layer_weights()
        202375168
        """
        attention = 2 * self.width * (self.width + self.key_width)
        return attention + (3 if self.gated else 2) * self.width * self.inner

    def head_flops(self, tokens: int) -> int:
        """Of the output layer over one sample: 2 n d V."""
        return 2 * tokens * self.width * self.vocabulary

    def matrix_flops(self, tokens: int) -> int:
        """Of every product with weights over one sample, forward: 2 n (L w + d V), w as in `layer_weights`."""
        return 2 * tokens * self.layers * self.layer_weights() + self.head_flops(tokens)

    def attention_flops(self, tokens: int) -> int:
        """Of scores and of their products with the values, forward: 4 L n^2 d."""
        return 4 * self.layers * tokens**2 * self.width

    def forward_flops(self, tokens: int) -> int:
        """Forward over one sample.

        >>> f"{Transformer(32, 4096, 11008, 4096, True, 32000).forward_flops(1000):.3e}"
        '1.374e+13'
        """
        return self.matrix_flops(tokens) + self.attention_flops(tokens)

    def training_flops(self, tokens: int, *, trained: bool, checkpointing: bool) -> int:
        """Forward and backward over one sample.

        A product with weights costs as much again for the gradient of its input, and once more for that of its weights, where
        they are trained; the two products of attention cost twice as much backward (kernels that compute the scores anew: 2.5
        times).  A frozen model is gone through all the same: soft tokens stand at its beginning.

        Args:
            tokens: of the sample.
            trained: whether the weights get gradients.
            checkpointing: whether the layers run forward twice.
        """
        forward = self.forward_flops(tokens)
        backward = self.matrix_flops(tokens) * (2 if trained else 1) + 2 * self.attention_flops(tokens)
        again = forward - self.head_flops(tokens) if checkpointing else 0
        return forward + backward + again

    def layer_activations(self, tokens: int) -> int:
        """Bytes that one layer keeps for the backward pass of one sample, in bfloat16 with fused attention.

        In widths: the inputs of both norms in float32 and their outputs (2 (4 + 2) d), queries and what is attended to
        (2 x 2 d), keys and values (2 x 2 k); with a gate the two halves, the activation and their product (4 x 2 m), else two
        (2 x 2 m).
        """
        each = 2 * (FULL + HALF) * self.width + 2 * HALF * (self.width + self.key_width)
        return tokens * (each + (4 if self.gated else 2) * HALF * self.inner)

    def activations(self, tokens: int, *, checkpointing: bool) -> int:
        """Bytes that a sample keeps for its backward pass.

        All layers, or with checkpointing the input of each and one layer whole; and the logits: in bfloat16, in float32, and
        the gradient of these.

        >>> shape = Transformer(32, 4096, 11008, 4096, True, 32000)
        >>> [round(shape.activations(1000, checkpointing=c) / 1e9, 1) for c in (False, True)]
        [5.8, 0.8]
        """
        logits = tokens * self.vocabulary * (HALF + 2 * FULL)
        if not checkpointing:
            return self.layers * self.layer_activations(tokens) + logits
        return self.layers * tokens * self.width * HALF + self.layer_activations(tokens) + logits


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters by how they are held.

    Attributes:
        trained: in float32, with gradients and Adam's two moments.
        frozen: of the model that is trained in part, in bfloat16, sharded with it.
        apart: of the encoders, in bfloat16, whole on every GPU.
        largest: of the largest piece that is gathered at a time under sharding (one layer).
        root: of what lies outside such pieces and stays gathered (embeddings, output layer, fusion).
    """

    trained: int
    frozen: int
    apart: int
    largest: int = 0
    root: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def memory(weights: Weights, activations: int, engine: Engine, gpus: int) -> Memory:
    """What one GPU holds in a step.

    Trained parameters take 4 bytes, their gradients 4, Adam's moments 8; frozen ones 2.  DDP holds all of it on each GPU; FSDP
    (ZeRO-3) a share of the model, and besides in bfloat16 what it has gathered: two layers, one of them ahead, and the root.

    Args:
        weights: numbers of parameters.
        activations: bytes of the samples that one GPU works on at a time.
        engine: "DDP" or "FSDP".
        gpus: among which FSDP shares.

    >>> seven = Weights(trained=7 * 10**9, frozen=0, apart=10**9, largest=2 * 10**8)
    >>> [round(memory(seven, 0, engine, 8).total / 1e9) for engine in ("DDP", "FSDP")]
    [114, 17]
    """
    share, gathered = 1, 0
    if engine == "FSDP" and gpus > 1:
        share, gathered = gpus, HALF * (2 * weights.largest + weights.root)
    held = (FULL * weights.trained + HALF * weights.frozen) // share + HALF * weights.apart + gathered
    return Memory(held, FULL * weights.trained // share, 2 * FULL * weights.trained // share, activations)


def hours(flops: float, samples: int, gpus: int, peak: float, utilisation: float) -> float:
    """Time of one epoch.

    Args:
        flops: of one sample.
        samples: of the epoch.
        gpus: that share it.
        peak: FLOPs a second of one GPU, by its data sheet.
        utilisation: the share of the peak that is reached.

    >>> round(hours(5e13, 665_298, 8, 312e12, 0.4), 1)
    9.3
    """
    if not 0 < utilisation <= 1:
        raise ValueError(f"The utilisation is a share of the peak, above 0 and at most 1; got {utilisation}.")
    return flops * samples / (gpus * peak * utilisation) / 3600
