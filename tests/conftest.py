"""What the tests share: tiny random models of the true classes, and one trained output folder."""

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the network
if not any("test_gpu" in argument for argument in sys.argv):  # it alone sees the GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
torch.set_num_threads(1)

import config as configuration
import diffusion
import train
from discriminator import Discriminator
from rewards import Blip
from shapes import pretrain

PROMPTS = ["a red circle and a blue square", "a white ring"]
BLOCKS = ("mid_block", "up_blocks.0")


def randomise(parameters, seed=0, scale=0.05):
    """Makes adapters and heads do something: a LoRA's B and the head's last layer are zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.copy_(scale * torch.randn(p.shape, generator=generator))


def tiny_pipeline(seed=0):
    """An untrained SDXL pipeline of the shapes world's size and the parameters of its nonzero
    adapter `comat`."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        mid_block_add_attention=False,
    )
    pipe = pretrain.build_pipeline(vae)
    torch.nn.init.normal_(pipe.text_encoder_2.text_projection.weight)  # the base's is zero
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        part.requires_grad_(False).eval()
    parameters = diffusion.add_adapter(pipe.unet, diffusion.ADAPTER, 4)
    randomise(parameters, seed)
    return pipe, parameters


def tiny_discriminator(pipe, plan, seed=1):
    """A nonzero Discriminator of rank 4 on a pipeline."""
    null = diffusion.encode(pipe, [""]).null
    discriminator = Discriminator(pipe, plan, null, rank=4)
    randomise(discriminator.parameters, seed, scale=0.1)
    pipe.unet.set_adapter(diffusion.ADAPTER)
    return discriminator


def tiny_blip(seed=2, **options):
    """A rewards.Blip of an untrained model; its weights are enlarged, so that what it says depends
    on the image."""
    torch.manual_seed(seed)
    model, processor = pretrain.build_captioner()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() > 1 else 1)
    return Blip(model.requires_grad_(False).eval(), processor.tokenizer, **options)


NO_LOSS = {"token_weight": 0.0, "pixel_weight": 0.0, "adversarial_weight": 0.0}
ALL_LOSSES = {"token_weight": 0.5, "pixel_weight": 0.5, "adversarial_weight": 0.5}


def small_config(folder, **changes):
    """The shapes preset, small, on the CPU, the caption loss alone, every file below `folder`."""
    small = {
        "out": folder / "run",
        "references": folder / "references",
        "device": "cpu",
        "batch": 2,
        "num_steps": 3,
        "grad_steps": 2,
        "attention_steps": 1,
        "rank": 4,
        "steps": 4,
        "warmup": 0,
        "adversarial_cap": 0.0,
        "sample_every": 0,
        **NO_LOSS,
    }
    return replace(configuration.PRESETS["shapes"][1], **(small | changes))


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
    """Takes a training step: (the gradients that the optimiser gets, in a list; what it logs)."""
    gradients = []

    def keep(optimizer, *rest):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients.extend(p.grad.clone() for p in parameters)

    run.optimizer.register_step_pre_hook(keep)
    log, troubles = train.train_step(run)
    return gradients, log


def command(*arguments, env=None, timeout=300):
    """Runs `python *arguments` in the repository, as a reader of the README would, one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    arguments = [sys.executable, *map(str, arguments)]
    options = {"capture_output": True, "text": True, "timeout": timeout}
    return subprocess.run(arguments, cwd=ROOT, env=environment, **options)


class Ended(NamedTuple):
    """How a process ended: its exit code, minus the signal that killed it, and what it wrote."""

    code: int
    output: str


def forked(body, world_size=1, timeout=200):
    """Runs body() in processes forked from this one, which has imported the libraries already; of
    several each is a rank as torchrun starts it. What body changes stays in there. An Ended each;
    what still runs after `timeout` seconds is killed."""
    files = [tempfile.TemporaryFile("w+", buffering=1) for _ in range(world_size)]
    port = str(free_port())

    def start(rank):
        sys.stdout = sys.stderr = files[rank]
        os.dup2(files[rank].fileno(), 1)
        os.dup2(files[rank].fileno(), 2)
        if world_size > 1:
            ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
            os.environ.update({name: str(value) for name, value in ranks.items()})
            os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        body()

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=start, args=(rank,)) for rank in range(world_size)]
    deadline = time.monotonic() + timeout
    for process in processes:
        process.start()
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
        process.kill()
        process.join()
    for file in files:
        file.seek(0)
    return [Ended(process.exitcode, file.read()) for process, file in zip(processes, files)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The output folder of a two-step run with all losses."""
    folder = tmp_path_factory.mktemp("trained")
    changes = {"steps": 2, "num_steps": 4, "eval_count": 5, "sample_prompts": 2, "sample_every": 1}
    changes |= {"checkpoint_every": 1, "keep": 2, **ALL_LOSSES}
    train.main(small_config(folder, **changes))
    return folder / "run"


def tiny_sd15(folder):
    """Writes an untrained Stable Diffusion 1.5 pipeline, tiny, with its own PNDM scheduler. It has
    one text encoder, no size conditioning, and cross-attention in other blocks than SDXL."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = pretrain.build_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    noise = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.PNDMScheduler(**noise, skip_prk_steps=True, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
    )
    pipe.save_pretrained(folder)


@pytest.fixture
def small_sizes(monkeypatch):
    """Every architecture of tools/bench.py narrow and shallow; the classes and the code stay."""
    from transformers import GroundingDinoImageProcessor

    from tools import bench

    heads = {"num_attention_heads": 2, "num_hidden_layers": 1}
    thin = heads | {"hidden_size": 32, "intermediate_size": 32}
    sdxl = {"block_out_channels": [32, 32, 32], "attention_head_dim": [1, 2, 2]}
    sdxl |= {"transformer_layers_per_block": 1, "cross_attention_dim": 64}
    sdxl |= {"projection_class_embeddings_input_dim": 32 + 6 * 256}
    sd15 = {"block_out_channels": [32] * 4, "attention_head_dim": 2, "cross_attention_dim": 32}
    swin = {"model_type": "swin", "embed_dim": 12, "depths": [1, 1, 1, 1]}
    swin |= {"num_heads": [1, 2, 2, 4], "out_indices": [2, 3, 4]}
    layers = {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 20, "d_model": 32}
    layers |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    side, width = {"image_size": 64}, {"hidden_size": 32}
    vision = heads | side | width | {"output_channels": 32, "global_attn_indexes": [0]}
    small = {
        "unet": dict(zip(bench.SIZES["unet"], (sdxl, sd15))),
        "vae": {"block_out_channels": [32] * 4, "layers_per_block": 1},
        "clip-l": thin,
        "clip-g": thin | {"projection_dim": 32},
        "blip": {"vision_config": thin | {"image_size": 32}, "text_config": thin},
        "dino": layers | {"backbone_config": swin, "text_config": thin | {"model_type": "bert"}},
        "sam": {
            "vision_config": vision | {"num_pos_feats": 16},
            "prompt_encoder_config": side | width,
            "mask_decoder_config": heads | width,
        },
    }
    for name, model in bench.SIZES["unet"].items():
        small["unet"][name] = model | small["unet"][name]
    for name in ("vae", "clip-l", "clip-g"):
        small[name] = bench.SIZES[name] | small[name]
    for name, sizes in small.items():
        monkeypatch.setitem(bench.SIZES, name, sizes)
    edges = {"shortest_edge": 96, "longest_edge": 160}  # of the image that GroundingDINO sees
    monkeypatch.setattr(GroundingDinoImageProcessor, "size", edges)
