"""The dry run: formulas against torch's own counter on tiny models, and the real shapes against published numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from experiments import dry_run
from experiments.plan import Transformer, Weights, hours, memory

TOKENS = 24


def tiny_llama(attention: str = "eager") -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


SHAPE = Transformer(3, 32, 72, 16, gated=True, vocabulary=50)


def step(model: Any, trained: bool) -> torch.Tensor:
    """The loss of one sample whose first tokens are soft; eager attention costs nothing that a formula would not see."""
    model.requires_grad_(trained)
    soft = torch.randn(1, TOKENS, 32, requires_grad=True)
    return model(inputs_embeds=soft, labels=torch.zeros(1, TOKENS, dtype=torch.long), use_cache=False).loss


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_flops_are_those_that_torch_counts(trained: bool, checkpointing: bool) -> None:
    model = tiny_llama()
    assert dry_run.shape_of(model) == SHAPE
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # torch may leave out the last product of a layer when it runs again; here, as in the formula, all of it does
    with FlopCounterMode(display=False) as counter, set_checkpoint_early_stop(False):
        step(model, trained).backward()
    assert counter.get_total_flops() == SHAPE.training_flops(TOKENS, trained=trained, checkpointing=checkpointing)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        step(model, trained)
    assert counter.get_total_flops() == SHAPE.forward_flops(TOKENS)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_about_what_autograd_keeps(checkpointing: bool) -> None:
    """Tensors that are kept for the backward pass, each storage once, without the weights; bfloat16, fused attention."""
    model = tiny_llama("sdpa").bfloat16()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # holding them keeps their addresses from being used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    soft = torch.randn(1, 256, 32, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(inputs_embeds=soft, labels=torch.zeros(1, 256, dtype=torch.long), use_cache=False)
    found = sum(storage.nbytes() for storage in kept.values())
    expected = SHAPE.activations(256, checkpointing=checkpointing)
    if checkpointing:  # the layer that is whole comes later, in the backward pass
        expected -= SHAPE.layer_activations(256)
    assert 0.75 < found / expected < 1.25, found / expected


def test_encoders_are_counted_as_they_run() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

    small = {"hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = CLIPTextModel(CLIPTextConfig(**small, vocab_size=60, attn_implementation="eager"))
    seen, _ = dry_run.forward_flops(text, lambda: text(torch.zeros(1, 77, dtype=torch.long)))
    assert seen == dry_run.shape_of(text).forward_flops(77)
    clip = CLIPVisionModel(CLIPVisionConfig(**small, image_size=28, patch_size=7, attn_implementation="eager"))
    seen, _ = dry_run.forward_flops(clip, lambda: clip(torch.zeros(1, 3, 28, 28)))
    assert seen == dry_run.shape_of(clip).forward_flops(17) + 2 * 16 * 3 * 49 * 32


def test_a_pass_ends_after_the_last_site(tiny: Any) -> None:
    unet = tiny("sd2").network
    inputs = (torch.zeros(1, 4, 8, 8), torch.zeros(1, dtype=torch.long), torch.zeros(1, 77, 16))
    site = "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_q"
    whole, _ = dry_run.forward_flops(unet, lambda: unet(*inputs))
    early, shapes = dry_run.forward_flops(unet, lambda: unet(*inputs), [site])
    later, _ = dry_run.forward_flops(unet, lambda: unet(*inputs), [site, "up_blocks.2.resnets.0"])
    assert 0 < early < later < whole and shapes == {site: (1, 4, 16)}
    assert not any(module._forward_hooks for module in unet.modules())


def test_memory_by_engine() -> None:
    weights = Weights(trained=1000, frozen=500, apart=100, largest=40, root=60)
    whole = memory(weights, 7, "DDP", 8)
    assert (whole.weights, whole.gradients, whole.optimizer, whole.activations) == (4000 + 1000 + 200, 4000, 8000, 7)
    assert whole == memory(weights, 7, "DDP", 1) == memory(weights, 7, "FSDP", 1)
    shared = memory(weights, 7, "FSDP", 8)
    assert (shared.weights, shared.gradients, shared.optimizer) == (625 + 200 + 2 * (2 * 40 + 60), 500, 1000)
    assert shared.total == sum((shared.weights, shared.gradients, shared.optimizer, 7))


def test_hours() -> None:
    assert hours(3.6e15, 1000, 10, 1e15, 0.5) == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"above 0 and at most 1; got 1\.5"):
        hours(1e12, 10, 1, 1e12, 1.5)


PUBLISHED = {"VAE (SD 2.1)": 83_653_863, "UNet (SD 2.1)": 865_910_724, "text encoder (SD 2.1)": 340_387_840,
             "CLIP-L/336": 303_507_456, "Llama 7B (Vicuna-1.5)": 6_738_415_616}  # fmt: skip


def test_the_real_configuration() -> None:
    """Nothing of it is in memory; parameters are the published ones, and hours near LLaVA-1.5's own (8 A100: about 4 and 10)."""
    parts = dry_run.build_parts()
    assert {name: dry_run.parameters(part) for name, part in parts.items()} == PUBLISHED
    assert all(parameter.is_meta for part in parts.values() for parameter in part.parameters())
    config = dry_run.Config(guidance=0.0)
    found, guided = dry_run.plan(config, parts), dry_run.plan(dry_run.Config(), parts)
    eight = found.costs[found.costs.gpus == 8].hours.tolist()
    assert found.tokens == 576 and 3 < eight[0] < 6 and 8 < eight[1] < 14
    assert found.costs.hours.tolist()[0] == pytest.approx(64 * found.costs.hours.tolist()[2])
    unet = "UNet (SD 2.1)"
    assert (guided.costs[unet] / found.costs[unet]).tolist() == [1, 1, 1, 2, 2, 2]  # two passes, in stage 2 only
    fits = {(row.stage, row.gpus, row.engine): row.fits for row in found.memories.itertuples()}
    assert fits[1, 8, "DDP"] and fits[2, 8, "FSDP"] and not fits[2, 8, "DDP"] and not fits[2, 1, "FSDP"]
    text = "\n".join(dry_run.lines(found, config))
    for words in ("865,910,724", "576 tokens an image", "assumed 40%", "GB of a GPU, of 80", "NO"):
        assert words in text
    alone = dry_run.plan(dry_run.Config(fusion="clip", gpus=(8,)), parts)
    assert list(alone.parts.part) == ["CLIP-L/336", "fusion", "Llama 7B (Vicuna-1.5)"]
    assert dry_run.plan(dry_run.Config(fusion="sequence", gpus=(8,)), parts).tokens == 1152


def test_options_of_the_dry_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given, folder = dry_run.read_arguments(["--fusion", "concat", "--samples", "5", "6", "--gpus", "2", "--no-checkpointing"])
    assert (given.fusion, given.samples, given.gpus, given.checkpointing) == ("concat", (5, 6), (2,), False)
    assert folder is None and dry_run.read_arguments(["--rehearse", "x"]) == (dry_run.Config(), Path("x"))

    def refuse(config: Any) -> None:
        raise ValueError("no such site")

    monkeypatch.setattr(dry_run, "plan", refuse)
    with pytest.raises(SystemExit) as stopped:
        dry_run.main([])
    assert stopped.value.code == 2 and capsys.readouterr().err == "dry_run: no such site\n"


@pytest.mark.slow
def test_the_same_architectures_train_on_two_processes(tmp_path: Path) -> None:
    """Two steps of both stages on tiny random weights: two gloo ranks take the steps that one process takes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "experiments.dry_run",
               "--rehearse", str(tmp_path / "two")]  # fmt: skip
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = dry_run.rehearse(tmp_path / "one")
    for stage in ("stage1", "stage2"):
        losses = pd.read_csv(tmp_path / "two" / stage / "loss.csv").loss.tolist()
        assert losses == pytest.approx(alone[stage], rel=1e-4) and len(losses) == 2
        assert (tmp_path / "two" / stage / "fused_mllm.json").is_file()
    assert (tmp_path / "two" / "stage2" / "language").is_dir() and not (tmp_path / "two" / "stage1" / "language").exists()
