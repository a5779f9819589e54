"""One training step, measured: seconds, arithmetic and peak memory of each of its phases.

    python tools/bench.py sdxl --random-weights            does my GPU hold the recipe? No download
    python tools/bench.py sd15 --random-weights --batch 2  any field of the configuration is a flag
    python tools/bench.py shapes --profile                 the weights that the preset names
    python tools/bench.py sdxl --random-weights --grid batch=1 batch=6 "batch=6 checkpointing"

The last prints a Markdown table, README's of a card. A first step measures each loss's share of the
gradient, a second counts the arithmetic, the next are timed; each makes its reference latents. A
number that is not finite, or a missing gradient, is an error.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import PRESETS, SDXL, SHAPES, Config, parse, reward_weights


@dataclass
class Bench(Config):
    random_weights: bool = False
    """Random weights of the true sizes: SDXL or SD1.5, BLIP, GroundingDINO and SAM."""
    repeat: int = 1
    """Steps to time; the fastest is shown."""
    profile: bool = False
    """Show the operators that take most of a step, by torch's profiler."""
    grid: tuple[str, ...] = ()
    """Flags without their dashes, "batch=6 no-merge": a row of the table each."""


BENCHES = {name: (text, Bench(**vars(config))) for name, (text, config) in PRESETS.items()}

if __name__ == "__main__":
    config = parse(presets=BENCHES)  # before the heavy imports: --help answers at once

import gc
import json
import math
import tempfile
from collections import defaultdict
from contextlib import contextmanager

import diffusers
import torch
import transformers
import tyro
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

import build
import diffusion
import models
import train
import utils
from entities import load_tokenizer
from masks import GroundedSAM
from rewards import Blip

# --------------------------------------------------------------------------------------------------
# Models with random weights, of the published configurations

SIZES = json.loads(Path(__file__).with_name("architectures.json").read_text())


def random_models(c):
    """(pipeline, rewards, segmenter) for build.setup; BLIP stands in for any reward."""
    if c.model not in SIZES["unet"]:
        raise ValueError(f"--random-weights: for the presets sdxl and sd15, not for {c.model}")
    device, dtype = utils.choose_device(c), getattr(torch, c.dtype)
    scheduler = diffusion.SCHEDULERS[c.scheduler].from_config(SIZES["scheduler"])
    dino_config = transformers.GroundingDinoConfig(**SIZES["dino"])
    with device:
        torch.set_default_dtype(dtype)  # so large a UNet is never made in float32
        pipe = random_pipeline(c.model, scheduler)
        blip = transformers.BlipForConditionalGeneration(transformers.BlipConfig(**SIZES["blip"]))
        torch.set_default_dtype(torch.float32)
        dino = transformers.GroundingDinoForObjectDetection(dino_config)
        sam = transformers.SamModel(transformers.SamConfig(**SIZES["sam"]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHAPES / "captioner")
    options = c.caption_prefix, c.caption_reduction, c.label_smoothing, c.caption_end_factor
    reward = Blip(blip.requires_grad_(False).eval(), tokenizer, *options)
    judges = dict.fromkeys(reward_weights(c), reward)
    lowest = 0.0, 0.0  # thresholds: SAM gets as many boxes as it ever does
    return pipe, judges, GroundedSAM(dino, tokenizer, sam, *lowest, dtype).to(device)


def random_pipeline(model, scheduler):
    first, second = (transformers.CLIPTextConfig(**SIZES[name]) for name in ("clip-l", "clip-g"))
    parts = {
        "unet": diffusers.UNet2DConditionModel(**SIZES["unet"][model]),
        "vae": diffusers.AutoencoderKL(**SIZES["vae"]),
        "text_encoder": transformers.CLIPTextModel(first),
        "tokenizer": load_tokenizer(),
        "scheduler": scheduler,
    }
    if model == SDXL:
        parts["text_encoder_2"] = transformers.CLIPTextModelWithProjection(second)
        parts["tokenizer_2"] = parts["tokenizer"]
        return models.freeze(diffusers.StableDiffusionXLPipeline(**parts))
    parts |= {"safety_checker": None, "feature_extractor": None}
    return models.freeze(diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False))


# --------------------------------------------------------------------------------------------------
# Measuring

aten = torch.ops.aten  # torch has no formula for its CPU kernel of attention
flop_registry[aten._scaled_dot_product_flash_attention_for_cpu] = sdpa_flop
flop_registry[aten._scaled_dot_product_flash_attention_for_cpu_backward] = sdpa_backward_flop


class FlopCounter(TorchDispatchMode):
    """Counts the arithmetic of products, convolutions and attention by torch's formulas, while it
    is on. (torch's FlopCounterMode fails in torch.autograd.grad.)"""

    tflop = 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        if formula := flop_registry.get(function.overloadpacket):
            self.tflop += formula(*args, **kwargs, out_val=output) / 1e12
        return output


def measure(run, repeat):
    """({phase: (seconds, TFLOP, peak GiB)} of the fastest step, "step" for all; what it logs)."""
    counter, tflop, peak = FlopCounter(), defaultdict(float), defaultdict(float)
    device = run.pipe.unet.device

    @contextmanager
    def phase(name):
        before = counter.tflop
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with build.Run.phase(run, name):
            yield
        tflop[name] += counter.tflop - before
        peak[name] = max(peak[name], utils.peak_memory(device))

    run.phase = phase
    run.measuring = True
    print(build.gradient_shares(step(run)[1]))
    run.measuring = False
    with counter:
        step(run)
    steps = [step(run) for _ in range(repeat)]
    seconds, log = min(steps, key=lambda timed: sum(timed[0].values()))
    phases = {name: (seconds[name], tflop[name], peak[name]) for name in seconds}
    all_seconds, all_tflop, all_gib = zip(*phases.values())
    phases["step"] = sum(all_seconds), sum(all_tflop), max(all_gib)
    return phases, log


def step(run):
    """({phase: seconds}, what is logged) of one training step."""
    with tempfile.TemporaryDirectory() as folder:
        run.config, run.seconds = replace(run.config, references=Path(folder)), {}
        log, troubles = train.train_step(run)
    if train.is_fatal(troubles):
        raise ValueError(troubles[0].reason)
    run.step += 1
    return run.seconds, log


def measure_peak_speed(unet):
    """TFLOP/s of a large matrix product: what the device reaches, not what its maker says."""
    n = 8192 if unet.device.type == "cuda" else 1024
    square = torch.randn(n, n, device=unet.device, dtype=unet.dtype)
    timer = Timer("a @ a", globals={"a": square}, num_threads=torch.get_num_threads())
    return 2 * n**3 / 1e12 / timer.blocked_autorange().median


def print_table(phases, peak_speed):
    total = phases["step"][0]
    print("phase           seconds   share     TFLOP   TFLOP/s  of peak  peak GiB")
    for name, (seconds, tflop, gib) in phases.items():
        speed = tflop / seconds
        print(f"{name:<14}{seconds:>9.2f}{seconds / total:>8.1%}{tflop:>10.3f}", end="")
        print(f"{speed:>10.3f}{speed / peak_speed:>9.1%}{gib:>10.2f}")
    print(f"peak: {peak_speed:.3f} TFLOP/s, of a large matrix product")


def bench(c):
    """Measures a configuration and prints the figures: (phases and log of `measure`, peak TFLOP/s).
    Raises ValueError for a number that is not finite and a missing gradient."""
    if c.repeat < 1:
        raise ValueError(f"--repeat {c.repeat}: must be at least 1")
    torch.manual_seed(c.seed)
    if c.random_weights:
        c = replace(c, prompts=SHAPES / "prompts/train.txt")
    run = build.setup(c, *(random_models(c) if c.random_weights else ()))
    for parameter in run.trainables():  # some are zero, and others get no gradient then
        torch.nn.init.normal_(parameter, std=0.01)
    build.announce(run)
    phases, log = measure(run, c.repeat)
    peak_speed = measure_peak_speed(run.pipe.unet)
    print_table(phases, peak_speed)
    print(", ".join(f"{name} {value:.4g}" for name, value in log.items()))
    if c.profile:
        with torch.profiler.profile() as profiler:
            step(run)
        order = f"self_{run.pipe.unet.device.type}_time_total"
        print(profiler.key_averages().table(order, row_limit=15))
    reached = [state for state in run.optimizer.state.values() if state["exp_avg"].any()]
    missing = len(run.trainables()) - len(reached)
    wrong = [name for name, value in log.items() if not math.isfinite(value)]
    if wrong or missing:
        raise ValueError(f"{missing} adapter tensors without gradient; not finite: {wrong}")
    return phases, log, peak_speed


def grid_row(flags, c):
    """A configuration's cells; GiB: allocated at most, reserved at the end, in use on the card."""
    print(f"\n{' '.join(flags)}")
    try:
        phases, _, peak_speed = bench(c)
        seconds, tflop, allocated = phases["step"]
        cells = [f"{seconds:.1f}", f"{tflop / seconds / peak_speed:.1%}", f"{allocated:.1f}"]
    except torch.OutOfMemoryError:
        cells = ["out of memory", "", ""]
    if utils.choose_device(c).type == "cuda":
        free, total = torch.cuda.mem_get_info()
        cells += [f"{n / 2**30:.1f}" for n in (torch.cuda.memory_reserved(), total - free)]
    gc.collect()  # of the models, which hold each other
    torch.cuda.empty_cache()
    return [f"`{' '.join(flags)}`", *cells]


def main(c):
    if not c.grid:
        return bench(c)
    rows = [[f"--{word}" for word in words.split()] for words in c.grid]
    configs = [tyro.cli(Bench, args=flags, default=replace(c, grid=())) for flags in rows]
    on_gpu = utils.choose_device(c).type == "cuda"
    header = [torch.cuda.get_device_name() if on_gpu else "CPU", "seconds", "of peak", "peak GiB"]
    header += ["reserved", "on the card"] if on_gpu else []
    table = [header, ["---"] * len(header), *map(grid_row, rows, configs)]
    print(f"\ntorch {torch.__version__}\n")
    for cells in table:
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    with utils.one_line_errors("bench.py"):
        main(config)
