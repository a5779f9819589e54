"""One training step, measured: seconds, arithmetic and peak memory of each of its phases.

    python tools/bench.py sdxl --random-weights         does my GPU hold the recipe? No download
    python tools/bench.py sd15 --random-weights --batch 2    any field of the configuration is a flag
    python tools/bench.py shapes --profile              the weights that the preset names

The first step warms up and counts the arithmetic, further ones are timed. Captioner, GroundingDINO
and SAM are part of a step, and so are the reference latents, as in a run's first epoch. It ends
with an error unless all numbers are finite and all tensors of both adapters get a gradient.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import config as configuration


@dataclass
class Bench(configuration.Config):
    random_weights: bool = False
    """Random weights in the architectures of SDXL or SD1.5, BLIP, GroundingDINO and SAM."""
    repeat: int = 1
    """Steps to time; the fastest is shown."""
    profile: bool = False
    """Show the operators that take most of a step, by torch's profiler."""
    json: str = ""
    """Write the figures to this file, too."""


def parse(arguments=None):
    presets = {k: (text, Bench(**vars(c))) for k, (text, c) in configuration.PRESETS.items()}
    return configuration.parse(arguments, presets=presets)


if __name__ == "__main__":
    config = parse()  # before the heavy imports: --help answers at once

import itertools
import json
import math
import tempfile
from collections import defaultdict
from contextlib import contextmanager

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch.utils import flop_counter
from torch.utils.benchmark import Timer
from transformers import (
    AutoTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    SamConfig,
    SamModel,
)

import diffusion
import models
import train
import utils
from entities import load_tokenizer
from masks import GroundedSAM
from rewards import Blip

THINGS = (
    "a red car",
    "a tall green tree",
    "a wooden chair",
    "a blue dog",
    "a metallic spoon",
    "a fluffy white rug",
    "two small birds",
    "a black bench",
    "a round mirror",
    "a square table",
    "an orange cat",
    "a glass vase",
)
PROMPTS = [f"{one} and {other}" for one, other in itertools.permutations(THINGS, 2)]

# --------------------------------------------------------------------------------------------------
# Random weights: the published configurations, where they differ from the classes' defaults

UNETS = {
    configuration.SDXL: {
        "sample_size": 128,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    configuration.SD15.model: {"sample_size": 64, "cross_attention_dim": 768},
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
CLIP_IDS = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, **CLIP_IDS}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
    **CLIP_IDS,
}
BLIP = {
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "text_config": {"num_attention_heads": 12},
}
DINO = {}  # Swin-T and BERT are the defaults
SAM = {
    "vision_config": {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "global_attn_indexes": [7, 15, 23, 31],
    }
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@contextmanager
def building(device, dtype):
    """Within the context modules are made on the device and in the dtype, with no copy elsewhere."""
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def random_models(c):
    """(pipeline, rewards, segmenter) of the true sizes, as train.setup takes them."""
    if c.model not in UNETS:
        raise ValueError(
            f"--random-weights: no architecture for --model {c.model}; take the preset sdxl or sd15"
        )
    device, dtype = utils.choose_device(c), getattr(torch, c.dtype)
    tokenizer = AutoTokenizer.from_pretrained(configuration.SHAPES / "captioner")
    scheduler = diffusion.SCHEDULERS[c.scheduler](**BETAS, steps_offset=1)
    with building(device, dtype):
        pipe = random_pipeline(c.model, scheduler)
        blip = BlipForConditionalGeneration(BlipConfig(**BLIP)).requires_grad_(False).eval()
    with building(device, torch.float32):
        dino = GroundingDinoForObjectDetection(GroundingDinoConfig(**DINO))
        sam = SamModel(SamConfig(**SAM))
    judge = Blip(blip, tokenizer, c.caption_prefix, c.caption_reduction, c.label_smoothing)
    # thresholds of 0: SAM gets as many boxes as it ever does
    segmenter = GroundedSAM(dino, tokenizer, sam, 0.0, 0.0, dtype).to(device)
    return models.freeze(pipe), {"blip": judge}, segmenter
