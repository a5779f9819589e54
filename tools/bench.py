"""One training step, measured: seconds, arithmetic and peak memory of each of its phases.

    python tools/bench.py sdxl --random-weights            does my GPU hold the recipe? No download
    python tools/bench.py sd15 --random-weights --batch 2  any field of the configuration is a flag
    python tools/bench.py shapes --profile                 the weights that the preset names

The first step counts the arithmetic, the next ones are timed; each makes its reference latents. It
is an error if a number is not finite or a tensor of an adapter gets no gradient.
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
    json: str = ""
    """Write the figures to this file, too."""


BENCHES = {name: (text, Bench(**vars(config))) for name, (text, config) in PRESETS.items()}

if __name__ == "__main__":
    config = parse(presets=BENCHES)  # before the heavy imports: --help answers at once

import json
import math
import tempfile
from collections import defaultdict
from contextlib import contextmanager

import diffusers
import torch
import transformers
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
    """(pipeline, rewards, segmenter) for train.setup; BLIP stands in for any reward."""
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
    options = c.caption_prefix, c.caption_reduction, c.label_smoothing
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
    """({phase: (seconds, TFLOP, peak GiB)} of the fastest step, and what it logs)."""
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
    with counter:
        step(run)
    steps = [step(run) for _ in range(repeat)]
    seconds, log = min(steps, key=lambda timed: sum(timed[0].values()))
    return {name: (seconds[name], tflop[name], peak[name]) for name in seconds}, log


def step(run):
    """({phase: seconds}, what is logged) of one training step."""
    with tempfile.TemporaryDirectory() as folder:
        run.config, run.seconds = replace(run.config, references=Path(folder)), {}
        log, troubles = train.train_step(run)
    if train.is_fatal(troubles):
        raise ValueError(troubles[0].reason)
    run.step += 1
    return run.seconds, log


def measure_peak_speed(device, dtype):
    """TFLOP/s of a large matrix product: what the device reaches, not what its maker says."""
    n = 8192 if device.type == "cuda" else 1024
    square = torch.randn(n, n, device=device, dtype=dtype)
    timer = Timer("a @ a", globals={"a": square}, num_threads=torch.get_num_threads())
    return 2 * n**3 / 1e12 / timer.blocked_autorange().median


def print_table(phases, peak_speed):
    seconds, tflop, gib = zip(*phases.values())
    total = sum(seconds)
    rows = phases | {"step": (total, sum(tflop), max(gib))}
    print("phase           seconds   share     TFLOP   TFLOP/s  of peak  peak GiB")
    for name, (seconds, tflop, gib) in rows.items():
        speed = tflop / seconds
        print(f"{name:<14}{seconds:>9.2f}{seconds / total:>8.1%}{tflop:>10.3f}", end="")
        print(f"{speed:>10.3f}{speed / peak_speed:>9.1%}{gib:>10.2f}")
    print(f"peak: {peak_speed:.3f} TFLOP/s, of a large matrix product")


def main(c):
    if c.repeat < 1:
        raise ValueError(f"--repeat {c.repeat}: must be at least 1")
    torch.manual_seed(c.seed)
    if c.random_weights:
        c = replace(c, prompts=SHAPES / "prompts/train.txt")
    run = train.setup(c, *(random_models(c) if c.random_weights else ()))
    for parameter in run.trainables():  # some are zero, and others get no gradient then
        torch.nn.init.normal_(parameter, std=0.01)
    build.announce(run)
    phases, log = measure(run, c.repeat)
    device = run.pipe.unet.device
    peak_speed = measure_peak_speed(device, run.pipe.unet.dtype)
    print_table(phases, peak_speed)
    shown = {name: value for name, value in log.items() if "loss" in name or "norm" in name}
    print(", ".join(f"{name} {value:.4g}" for name, value in shown.items()))
    if c.profile:
        with torch.profiler.profile() as profiler:
            step(run)
        print(profiler.key_averages().table(f"self_{device.type}_time_total", row_limit=15))
    if c.json:
        figures = {"phases": phases, "log": log, "peak_speed": peak_speed, "config": vars(c)}
        utils.write(c.json, json.dumps(figures, indent=2, default=str) + "\n")
    reached = [state for state in run.optimizer.state.values() if state["exp_avg"].any()]
    missing = len(run.trainables()) - len(reached)
    wrong = [name for name, value in log.items() if not math.isfinite(value)]
    if wrong or missing:
        raise ValueError(f"{missing} adapter tensors without gradient; not finite: {wrong}")


if __name__ == "__main__":
    with utils.one_line_errors("bench.py", "try --checkpointing, or a smaller --batch"):
        main(config)
