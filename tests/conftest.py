"""What the tests share: tiny random models of the true classes, and one trained output folder."""
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the network

import config as configuration  # noqa: E402
import diffusion  # noqa: E402
import discriminator  # noqa: E402

PROMPTS = ["a red circle and a blue square", "a white ring"]
BLOCKS = ("mid_block", "up_blocks.0")


def randomise(parameters, seed=0, scale=0.05):
    """Makes adapters and heads do something: a LoRA's B and the head's last layer are zero at first."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.copy_(scale * torch.randn(p.shape, generator=generator))


def tiny_pipeline(seed=0):
    """An untrained SDXL pipeline of the shapes world's size and the parameters of its nonzero adapter `comat`."""
    from diffusers import AutoencoderKL

    import pretrain
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=4,
        norm_num_groups=4, sample_size=32, mid_block_add_attention=False)
    pipe = pretrain.build_pipeline(vae)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        part.requires_grad_(False).eval()
    parameters = diffusion.add_adapter(pipe.unet, diffusion.ADAPTER, 4)
    randomise(parameters, seed)
    return pipe, parameters


def tiny_head(pipe, seed=1):
    """A nonzero discriminator (adapter of rank 4 and head) on a pipeline; returns (head, its parameters)."""
    parameters = diffusion.add_adapter(pipe.unet, discriminator.ADAPTER, 4)
    head = discriminator.Head(4, width=8)
    parameters += list(head.parameters())
    randomise(parameters, seed, scale=0.1)
    pipe.unet.set_adapter(diffusion.ADAPTER)
    return head, parameters


def tiny_captioner(seed=2):
    """An untrained BLIP, frozen, and its tokenizer; enlarged weights, so that what it says depends on the image."""
    import pretrain
    torch.manual_seed(seed)
    captioner, processor = pretrain.build_captioner()
    with torch.no_grad():
        for p in captioner.parameters():
            p.mul_(4 if p.dim() > 1 else 1)
    return captioner.requires_grad_(False).eval(), processor.tokenizer


def small_config(folder, **changes):
    """The shapes preset, small, on the CPU, with every file below `folder`."""
    return replace(configuration.PRESETS["shapes"][1], **{
        "out": folder / "run", "references": folder / "references", "device": "cpu", "batch": 2, "num_steps": 3,
        "grad_steps": 2, "rank": 4, "steps": 4, "warmup": 0, "caption_copies": 1, "caption_shift": 0.0,
        "token_weight": 0.0, "pixel_weight": 0.0, "adversarial_weight": 0.0, "adversarial_cap": 0.0, "sample_every": 0,
        "terms_every": 0,
        **changes})


def same(a, b):
    """Whether two states, nested as they may be, are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def watched_step(run):
    """Takes a training step: (the gradients that both optimisers get, in a list; what it logged)."""
    import train
    found = []
    for optimizer in (run.optimizer, run.discriminator_optimizer):
        optimizer.register_step_pre_hook(
            lambda o, *_: found.extend(p.grad.clone() for group in o.param_groups for p in group["params"]))
    return found, train.train_step(run)


ALL_LOSSES = {"token_weight": 0.5, "pixel_weight": 0.5, "adversarial_weight": 0.5, "attention_steps": 1}


def command(*arguments, env=None, modules=(), timeout=300):
    """Runs `python *arguments` in the repository, as a reader of the README would, on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(env or {})}
    return subprocess.run([sys.executable, *map(str, modules), *map(str, arguments)], cwd=ROOT, env=environment,
                          capture_output=True, text=True, timeout=timeout)


SMALL_RUN = ("--batch", 2, "--num-steps", 4, "--grad-steps", 2, "--eval-count", 5, "--rank", 4, "--caption-copies", 2,
             "--sample-prompts", 2, "--sample-every", 1, "--checkpoint-every", 1, "--keep", 2)
LOSS_FLAGS = ("--token-weight", 0.1, "--pixel-weight", 0.1, "--attention-steps", 1, "--adversarial-weight", 0.1)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """(output folder, finished process) of a two-step run with all losses, made by the command line."""
    folder = tmp_path_factory.mktemp("trained")
    done = command("train.py", "shapes", "--steps", 2, "--out", folder / "run", "--references", folder / "references",
                   *SMALL_RUN, *LOSS_FLAGS)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "run", done


@pytest.fixture
def small_sizes(monkeypatch):
    """Every architecture of bench.py narrow and shallow; the classes and the code stay."""
    import bench
    narrow = dict(block_out_channels=(32, 32, 32), cross_attention_dim=48, transformer_layers_per_block=1,
                  attention_head_dim=(1, 2, 2), projection_class_embeddings_input_dim=16 + 6 * 256)
    monkeypatch.setitem(bench.UNETS, "sdxl", {**bench.UNETS["sdxl"], **narrow})
    monkeypatch.setitem(bench.UNETS, "sd15", dict(block_out_channels=(32,) * 4, cross_attention_dim=32, attention_head_dim=2))
    monkeypatch.setattr(bench, "VAE", {**bench.VAE, "block_out_channels": (32,) * 4, "layers_per_block": 1})
    clip = dict(intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    monkeypatch.setattr(bench, "CLIP_L", {**bench.CLIP_L, **clip, "hidden_size": 32})
    monkeypatch.setattr(bench, "CLIP_G", {**bench.CLIP_G, **clip, "hidden_size": 16, "projection_dim": 16})
    blip = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    monkeypatch.setattr(bench, "BLIP_VISION", {**blip, "image_size": 32})
    monkeypatch.setattr(bench, "BLIP_TEXT", blip)
