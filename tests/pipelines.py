"""Tiny random-weight pipelines of the families beside Stable Diffusion and PixArt, built from config, offline.

Each is the family's own pipeline class with its own kinds of text encoder, tokenizer and image encoder, some channels wide.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.kolors import ChatGLMModel
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig
from tokenizers import processors

from tests.conftest import byte_spelling, clip_encoder, clip_tokenizer, t5_tokenizer

FLOWS = ("flux", "flux2-klein", "flux2", "qwen-image", "sd3", "z-image", "sana", "lumina2", "aura-flow", "chroma", "cogview4")
DIFFUSIONS = ("hunyuan-dit", "kolors", "lcm")
WORDS = ("Ġred", "Ġcircle", "Ġst", "ar", "red", "Ġon", "Ġthe")
CHAT = (
    "{% for m in messages %}<|user|>{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[0].text }}{% endif %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def language_tokenizer(side: str = "right", start: bool = False) -> Any:
    """A language model's tokenizer that spells in bytes, and some words as a whole."""
    spelling = byte_spelling(("<|end|>", "<|user|>", "<|assistant|>", "<|pad|>", "<|start|>"), WORDS)
    if start:
        spelling.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 4)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=spelling, eos_token="<|end|>", pad_token="<|pad|>", bos_token="<|start|>", padding_side=side,
        extra_special_tokens=["<|user|>", "<|assistant|>"],
    )  # fmt: skip
    tokenizer.chat_template = CHAT
    return tokenizer


def t5(tokenizer: Any, width: int = 16) -> Any:
    config = transformers.T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config)


SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8, "max_position_embeddings": 4096, "initializer_range": 0.3,
}  # fmt: skip


def vae(levels: int = 2, channels: int = 4, **options: Any) -> Any:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels, layers_per_block=1, latent_channels=channels, norm_num_groups=4, sample_size=16,
        scaling_factor=0.36, **options,
    )  # fmt: skip


def flux_like(cls: Any, **options: Any) -> Any:
    return cls(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=options.pop("text", 16), **options,
    )  # fmt: skip


def flux() -> Any:
    network = flux_like(
        diffusers.FluxTransformer2DModel, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=True
    )
    clip, spelling = clip_tokenizer("!"), t5_tokenizer()
    return diffusers.FluxPipeline(
        transformer=network, vae=vae(shift_factor=0.1), tokenizer=clip, text_encoder=clip_encoder(clip), tokenizer_2=spelling,
        text_encoder_2=t5(spelling), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def chroma() -> Any:
    network = flux_like(
        diffusers.ChromaTransformer2DModel, axes_dims_rope=(4, 4, 8), approximator_num_channels=8, approximator_hidden_dim=16,
        approximator_layers=1,
    )  # fmt: skip
    spelling = t5_tokenizer()
    return diffusers.ChromaPipeline(
        transformer=network, vae=vae(shift_factor=0.1), tokenizer=spelling, text_encoder=t5(spelling),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def flux2_parts() -> dict[str, Any]:
    network = flux_like(diffusers.Flux2Transformer2DModel, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), text=48)
    encoder = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8),
        layers_per_block=1, latent_channels=4, norm_num_groups=4,
    )  # fmt: skip
    encoder.bn.running_mean.normal_()
    encoder.bn.running_var.uniform_(0.5, 2)
    return {"transformer": network, "vae": encoder, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler()}


def language(config: Any, cls: Any, tokenizer: Any, **options: Any) -> Any:
    tokens = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 4, "eos_token_id": 0}
    return cls(config(vocab_size=len(tokenizer), **SIZES, **tokens, **options))


def flux2_klein() -> Any:
    spelling = language_tokenizer()
    sizes = {"num_hidden_layers": 28}
    config = transformers.Qwen3Config(vocab_size=len(spelling), **(SIZES | sizes))
    return diffusers.Flux2KleinPipeline(
        **flux2_parts(), tokenizer=spelling, text_encoder=transformers.Qwen3ForCausalLM(config), is_distilled=False
    )


def flux2() -> Any:
    spelling = language_tokenizer()
    config = transformers.Qwen3Config(vocab_size=len(spelling), **(SIZES | {"num_hidden_layers": 31}))
    return diffusers.Flux2Pipeline(**flux2_parts(), tokenizer=spelling, text_encoder=transformers.Qwen3ForCausalLM(config))


def qwen_image() -> Any:
    spelling = language_tokenizer()
    encoder = transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={
                **SIZES, "vocab_size": len(spelling), "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
            },
            vision_config={
                "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16, "fullatt_block_indexes": [0],
            },
        )
    )  # fmt: skip
    image_encoder = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.0, 2.0, 0.5, 1.5],
    )  # fmt: skip
    network = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    pipeline = diffusers.QwenImagePipeline(
        transformer=network, vae=image_encoder, tokenizer=spelling, text_encoder=encoder,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip
    before = pipeline.prompt_template_encode.partition("{}")[0]
    pipeline.prompt_template_encode_start_idx = len(spelling(before).input_ids)  # 34 of the real one's tokens
    return pipeline


def sd3() -> Any:
    first, second, spelling = clip_tokenizer("<|endoftext|>"), clip_tokenizer("!"), t5_tokenizer()
    network = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=32,
        caption_projection_dim=16, pooled_projection_dim=32, out_channels=4, pos_embed_max_size=8, dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=network, vae=vae(shift_factor=0.1), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        tokenizer=first, text_encoder=clip_encoder(first, True), tokenizer_2=second, text_encoder_2=clip_encoder(second, True),
        tokenizer_3=spelling, text_encoder_3=t5(spelling, 32),
    )  # fmt: skip


def z_image() -> Any:
    spelling = language_tokenizer()
    network = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
        cap_feat_dim=16, axes_dims=[8, 4, 4], axes_lens=[1024, 32, 32],
    )  # fmt: skip
    return diffusers.ZImagePipeline(
        transformer=network, vae=vae(shift_factor=0.1), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        tokenizer=spelling, text_encoder=language(transformers.Qwen3Config, transformers.Qwen3Model, spelling),
    )  # fmt: skip


def gemma(tokenizer: Any) -> Any:
    return language(transformers.Gemma2Config, transformers.Gemma2Model, tokenizer, query_pre_attn_scalar=8)


def sana() -> Any:
    spelling = language_tokenizer(start=True)
    network = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16, sample_size=8, patch_size=1,
    )  # fmt: skip
    encoder = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), scaling_factor=0.4,
    )  # fmt: skip
    return diffusers.SanaPipeline(
        transformer=network, vae=encoder, tokenizer=spelling, text_encoder=gemma(spelling),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def lumina2() -> Any:
    spelling = language_tokenizer(start=True)
    network = diffusers.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1, num_attention_heads=3,
        num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(300, 32, 32), cap_feat_dim=16,
    )  # fmt: skip
    return diffusers.Lumina2Pipeline(
        transformer=network, vae=vae(4), tokenizer=spelling, text_encoder=gemma(spelling),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def aura_flow() -> Any:
    spelling = t5_tokenizer()
    network = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=3, joint_attention_dim=16, caption_projection_dim=24, out_channels=4, pos_embed_max_size=64,
    )  # fmt: skip
    return diffusers.AuraFlowPipeline(
        transformer=network, vae=vae(), tokenizer=spelling, text_encoder=t5(spelling),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def cogview4() -> Any:
    spelling = language_tokenizer("left", start=True)
    network = diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, text_embed_dim=16,
        time_embed_dim=8, condition_dim=4, pos_embed_max_size=8, sample_size=8, rope_axes_dim=(8, 8),
    )  # fmt: skip
    return diffusers.CogView4Pipeline(
        transformer=network, vae=vae(), tokenizer=spelling, text_encoder=language(transformers.GlmConfig, transformers.GlmModel, spelling),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


def hunyuan_dit() -> Any:
    spelling = t5_tokenizer()
    pieces = {
        p: n for n, p in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "circle", "st", "##ar", "on", "the", "dot"])
    }
    words = transformers.BertTokenizer(vocab=pieces, model_max_length=77)
    sizes = {name: size for name, size in SIZES.items() if name not in ("head_dim", "num_key_value_heads")}
    network = diffusers.HunyuanDiT2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=3, cross_attention_dim=16,
        cross_attention_dim_t5=16, pooled_projection_dim=4, hidden_size=24, text_len=77, text_len_t5=256,
    )  # fmt: skip
    return diffusers.HunyuanDiTPipeline(
        transformer=network, vae=vae(4), tokenizer=words, text_encoder=transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)),
        tokenizer_2=spelling, text_encoder_2=t5(spelling), scheduler=diffusers.DDPMScheduler(prediction_type="v_prediction"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


class GlmWords(transformers.PreTrainedTokenizer):
    """As Kolors' own: written in Python, so it tells no offsets; it spells some words in pieces, and padding stands on the left."""

    model_input_names = ["input_ids", "attention_mask", "position_ids"]  # noqa: RUF012
    pieces = (
        "<pad>",
        "[gMASK]",
        "sop",
        "▁a",
        "▁red",
        "▁circle",
        "▁st",
        "ar",
        "▁on",
        "▁the",
        "▁",
        *"abcdefghijklmnopqrstuvwxyz",
    )

    def __init__(self, **options: Any) -> None:
        super().__init__(pad_token="<pad>", extra_special_tokens=["[gMASK]", "sop"], **options)

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def get_vocab(self) -> dict[str, int]:
        return {piece: number for number, piece in enumerate(self.pieces)}

    def _convert_id_to_token(self, index: int) -> str:
        return self.pieces[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens).replace("▁", " ").strip()

    def _spell(self, word: str) -> list[int]:
        left, found = f"▁{word.lower()}", list[int]()
        while left:
            piece = max((one for one in self.pieces[3:] if left.startswith(one)), key=len)
            found, left = [*found, self.pieces.index(piece)], left[len(piece) :]
        return found

    def __call__(self, text: Any, max_length: int = 8, **kwargs: Any) -> Any:
        rows = [[1, 2, *(n for word in one.split() for n in self._spell(word))][:max_length] for one in text]
        pads = [max_length - len(row) for row in rows]
        ids = torch.tensor([[0] * pad + row for pad, row in zip(pads, rows, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (max_length - pad) for pad in pads])
        return transformers.BatchEncoding(
            {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        )


def kolors() -> Any:
    config = ChatGLMConfig(
        num_layers=2, padded_vocab_size=64, hidden_size=16, ffn_hidden_size=16, kv_channels=8, num_attention_heads=2,
        multi_query_attention=True, add_qkv_bias=True, original_rope=True, fp32_residual_connection=False,
    )  # fmt: skip
    encoder = ChatGLMModel(config)
    for values in encoder.parameters():
        torch.nn.init.normal_(values, std=0.1)  # it is made without
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, norm_num_groups=4, cross_attention_dim=16, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2), use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16, encoder_hid_dim=16, encoder_hid_dim_type="text_proj",
    )  # fmt: skip
    return diffusers.KolorsPipeline(
        unet=unet, vae=vae(), tokenizer=GlmWords(), text_encoder=encoder,
        scheduler=diffusers.DDIMScheduler(beta_schedule="scaled_linear", timestep_spacing="trailing"), force_zeros_for_empty_prompt=True,
    )  # fmt: skip


def lcm() -> Any:
    clip = clip_tokenizer("!")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, norm_num_groups=4, cross_attention_dim=16, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2), time_cond_proj_dim=32,
    )  # fmt: skip
    return diffusers.LatentConsistencyModelPipeline(
        unet=unet, vae=vae(), tokenizer=clip, text_encoder=clip_encoder(clip), scheduler=diffusers.LCMScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


@cache
def family_pipeline(name: str) -> Any:
    """One shared pipeline of a family, whose attention is far from even; not to be changed."""
    torch.manual_seed(0)
    pipeline = globals()[name.replace("-", "_")]()
    network = pipeline.components.get("transformer") or pipeline.components["unet"]
    with torch.no_grad():
        for parameter, values in network.named_parameters():
            if parameter.rpartition(".")[0].endswith(("to_q", "to_k", "add_q_proj", "add_k_proj")):
                values.mul_(4)
            if values.abs().max() == 0 and values.ndim > 1:
                values.normal_(std=0.1)  # some families' last layers start at zero
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
