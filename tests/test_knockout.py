"""Routes of the text cut during the forward pass: what is cut is cut, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import Attention

from diffprobe.knockout import KnockedOut, chosen_attentions, cross_attentions, parse_knockout
from diffprobe.models import DiffusionModel
from diffprobe.prompts import EncodedText

PROMPTS = ["a red star on the left", None]


def inputs(model: DiffusionModel, prompts: list[str | None] = PROMPTS) -> tuple[torch.Tensor, torch.Tensor, EncodedText]:
    noised = torch.randn(len(prompts), model.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return noised, torch.full((len(prompts),), 50), model.encode_text(prompts)


class Dropping:
    """Attention as a naive loop in float64: columns are taken out of the softmax's result, what is left is scaled to 1."""

    def __init__(self, cut: torch.Tensor) -> None:
        self.cut = cut

    def __call__(
        self, attn: Attention, hidden: Any, encoder_hidden_states: Any = None, attention_mask: Any = None, **_: Any
    ) -> Any:
        assert attention_mask is None
        query, key, value = attn.to_q(hidden), attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        heads = attn.heads
        result = torch.zeros_like(query)
        width = query.shape[-1] // heads
        for row in range(len(query)):
            for head in range(heads):
                part = slice(head * width, (head + 1) * width)
                scores = query[row, :, part].double() @ key[row, :, part].double().T / width**0.5
                maps = scores.softmax(-1) * ~self.cut[row]
                maps = maps / maps.sum(-1, keepdim=True)
                result[row, :, part] = (maps @ value[row, :, part].double()).float()
        return attn.to_out[1](attn.to_out[0](result))


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@pytest.mark.parametrize("what", ["start", "eos_and_padding", "content"])
def test_masked_tokens_get_no_probability(fresh_pipeline: Callable[..., Any], family: str, what: str) -> None:
    model = DiffusionModel(fresh_pipeline(family))
    noised, steps, text = inputs(model)
    cutting = KnockedOut(model, what)
    found = cutting.denoise(noised, steps, text)
    plain = model.denoise(noised, steps, text)
    cut = cutting.cut_tokens(text)
    for attention in cross_attentions(model.network).values():
        attention.set_processor(Dropping(cut))
    assert torch.allclose(found, model.denoise(noised, steps, text), atol=1e-5)
    assert not torch.allclose(found[0], plain[0], atol=1e-3)  # the cut is large enough to see


def test_words_are_told_apart(tiny: Callable[[str], DiffusionModel]) -> None:
    text = tiny("sd1").encode_text(["a red star on the left"])  # "star" and "left" are several tokens here
    content = KnockedOut(tiny("sd1"), "content").cut_tokens(text)[0]
    named = {"a red star on the left"[a:b] for (a, b), cut in zip(text.spans[0].tolist(), content, strict=True) if cut}
    assert "".join(sorted("".join(named))) == "".join(sorted("redstarleft")) and not {"a", "on", "the"} & named
    every = [KnockedOut(tiny("sd1"), what).cut_tokens(text)[0] for what in ("start", "eos_and_padding", "content")]
    assert (sum(part.int() for part in every) <= 1).all()
    assert every[0].nonzero().tolist() == [[0]] and every[1].sum() == 77 - 1 - int((text.spans[0, :, 1] > 0).sum())


def test_words_of_a_template_are_no_ending(fresh_pipeline: Callable[[str], Any]) -> None:
    class Templated(StableDiffusionPipeline):
        def encode_prompt(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
            return super().encode_prompt([f"the {text} on the left" for text in prompt], *args, **kwargs)

    model = DiffusionModel(Templated(**fresh_pipeline("sd1").components, requires_safety_checker=False))
    text = model.encode_text(["red circle"])
    start, ending, content = (
        KnockedOut(model, what).cut_tokens(text)[0].nonzero().flatten().tolist()
        for what in ("start", "eos_and_padding", "content")
    )
    number = model.tokens(["red circle"])[2][0]
    assert (start, content) == ([0], [2, 3]) and ending == list(range(number - 1, 77))


def test_nothing_cut_is_bit_identical(model: DiffusionModel) -> None:
    noised, steps, text = inputs(model, [None, "of the"])  # no content words
    assert torch.equal(KnockedOut(model, "content").denoise(noised, steps, text), model.denoise(noised, steps, text))


def test_empty_everywhere_is_the_null_prompt(model: DiffusionModel) -> None:
    noised, steps, text = inputs(model)
    nothing = model.encode_text([None, None])
    found = KnockedOut(model, "empty").denoise(noised, steps, text)
    # SDXL's pooled text still goes in, beside the timestep
    assert torch.equal(found, model.denoise(noised, steps, nothing)) == (model.family != "sdxl")


def test_empty_in_the_first_ones_reaches_no_further(tiny: Callable[[str], DiffusionModel]) -> None:
    model = tiny("sd2")
    noised, steps, text = inputs(model)
    seen: list[torch.Tensor] = []
    handles = [
        attention.to_k.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
        for attention in cross_attentions(model.network).values()
    ]
    KnockedOut(model, "empty@first:3").denoise(noised, steps, text)
    for handle in handles:
        handle.remove()
    null = model.encode_text([None]).embeddings.expand(2, -1, -1)
    assert [torch.equal(given, null) for given in seen] == [True] * 3 + [False] * (len(seen) - 3)
    assert torch.equal(seen[3], text.embeddings)


def test_order_and_patterns(tiny: Callable[[str], DiffusionModel]) -> None:
    network = tiny("sd2").network
    paths = list(cross_attentions(network))
    stages = [path.partition(".")[0] for path in paths]
    assert stages == sorted(stages, key=("down_blocks", "mid_block", "up_blocks").index) and "mid_block" in stages
    assert list(chosen_attentions(network, "last:2")) == paths[-2:]
    assert list(chosen_attentions(network, "mid_block*")) == [p for p in paths if p.startswith("mid")]
    with pytest.raises(ValueError, match="'first:99' names none of the 16 cross-attentions"):
        chosen_attentions(network, "first:99")


def test_hooks_are_gone_and_the_store_knows(tiny: Callable[[str], DiffusionModel]) -> None:
    model = tiny("sd1")
    noised, steps, text = inputs(model)
    count = lambda: sum(len(m._forward_pre_hooks) for m in model.network.modules())  # noqa: E731
    before = count()
    cutting = KnockedOut(model, "start@up_blocks*")
    cutting.denoise(noised, steps, text)
    with pytest.raises(RuntimeError):
        cutting.denoise(noised[:, :1], steps, text)
    assert count() == before
    assert cutting.weights_hash() == f"{model.weights_hash()} without start@up_blocks*"


def test_unknown_knockout() -> None:
    with pytest.raises(ValueError, match="cuts none of start, eos_and_padding, content, empty"):
        parse_knockout("stat")
    assert str(parse_knockout("content@first:2")) == "content@first:2"
