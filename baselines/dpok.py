"""DPOK (Fan et al. 2023, arXiv 2305.16381) with CoMat's reward: what CoMat is compared with.

    python baselines/dpok.py shapes --out out/dpok    # flags and output folder are train.py's

After --resume the value function is learned anew.

CoMat sends the gradient of the reward back into the UNet. DPOK only tries: it samples, has the
images judged, and makes the noise that led to good ones more likely. A step of the sampler is a
Gaussian policy, z' = mean + c n with mean = a z + b output, so that its objective is a loss on z':

    L = -A clamp(r, 1 - eps, 1 + eps) + k KL        log r = (|n_old|^2 - |n|^2) / 2D, D numbers in z
    n = (z' - mean) / c                             d log r / d mean = n / (c D)
    dL/d mean = -A r [r not clipped] n / (c D) + k (mean - mean_pretrained) / (c^2 D)

and a step alone is a sampler of one step: `diffusion.replay` sends dL/d mean through it. As in the
official code, log p is a mean over the latents' numbers, and the clip takes both signs of A.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import config as configuration

if __name__ == "__main__":
    config = configuration.parse()

import random
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

import build
import diffusion
import images as imaging
import train
import utils

UPDATES = 3  # optimiser steps per rollout, each on --grad-steps of the sampler's steps
CLIP = 1e-4 * 4 * 64 * 64  # of log p; the official 1e-4 is of its mean over SD's 16,384 numbers
KL_WEIGHT = 0.01
VALUE_STEPS, VALUE_LR = 20, 1e-3  # of the value function's AdamW, per rollout
LEAST_NOISE = 1e-6  # c of a step that counts as random; DDPM's last one has 1e-10


@dataclass
class Rollout:
    """Images of a batch and how they were made: states z_0 to z_T, the noise n of each step, and
    rewards (B,)."""

    text: diffusion.Text
    states: list
    noises: list
    rewards: torch.Tensor


@torch.no_grad()
def roll_out(run):
    """The Rollout of this rank at this step, with the weighted sum of --rewards."""
    c = run.config
    pipe, plan = run.pipe, run.plan
    size = (c.resolution, c.resolution)
    prompts, generators = train.deal(run, part=0)
    text = diffusion.encode(pipe, prompts)
    noise = diffusion.initial_noise(pipe, size, generators)
    every = range(len(plan.steps))
    with diffusion.adapter(pipe.unet, diffusion.ADAPTER):
        z, states = diffusion.sample(pipe, plan, text, noise, generators, c.guidance_scale, every)
    _, generators = train.deal(run, part=0)
    diffusion.initial_noise(pipe, size, generators)
    noises = [randn_tensor(z.shape, generators, z.device) for _ in every]  # the sampler's, again
    images = imaging.decode_all(pipe, z, c.judge_batch).to(z.device)
    rewards = torch.zeros(len(z), device=z.device)
    for name, weight in configuration.reward_weights(c).items():
        rewards += weight * run.rewards[name](images, prompts)
    return Rollout(text, [*states.values(), z], noises, rewards)


def policy_gradient(run, rollout, i, advantages):
    """(dL/d mean of step i (B, 4, h, w), numbers to log), L a mean over images."""
    pipe = run.pipe
    step = run.plan.steps[i]
    z = rollout.states[i]
    how = pipe, step, z, rollout.text, run.config.guidance_scale
    with torch.no_grad(), diffusion.adapter(pipe.unet, diffusion.ADAPTER):
        output = diffusion.guided(*how)
    with torch.no_grad(), diffusion.adapter(pipe.unet, None):
        pretrained = diffusion.guided(*how)
    mean = step.a * z + step.b * output
    after, noise = rollout.states[i + 1], rollout.noises[i]
    residual = (after - mean) / step.c
    squares = noise.square() - residual.square()
    log_ratio = squares.mean((1, 2, 3)) / 2
    ratio = log_ratio.exp()
    clipped = (ratio - 1).abs() > CLIP / z[0].numel()
    factor = advantages * ratio.where(~clipped, 0.0)
    shift = step.b * (output - pretrained) / step.c
    gradient = KL_WEIGHT * shift - factor.view(-1, 1, 1, 1) * residual
    kl = shift.square().mean() / 2
    log = {"clipped": clipped.float().mean().item(), "kl": kl.item()}
    return gradient / (step.c * z.numel()), log


def add_gradients(run, rollout, steps, advantages):
    """Adds the mean gradient over the steps to .grad; advantages: {step: (B,)}. Returns numbers to
    log."""
    pipe, guidance_scale, logs = run.pipe, run.config.guidance_scale, []
    for i in steps:
        gradient, log = policy_gradient(run, rollout, i, advantages[i])
        gradient = gradient / len(steps)
        alone = diffusion.Schedule([run.plan.steps[i]])
        states = {0: rollout.states[i]}
        with diffusion.adapter(pipe.unet, diffusion.ADAPTER):
            diffusion.replay(pipe, alone, rollout.text, states, gradient, guidance_scale)
        logs.append(log)
    return utils.mean_of(logs)


def make_value(run, width=256):
    """The value function's network: state, prompt and step -> the reward that is expected."""
    c, unet = run.config, run.pipe.unet
    side = c.resolution // run.pipe.vae_scale_factor
    numbers = unet.config.in_channels * side**2
    inputs = numbers + unet.config.cross_attention_dim + c.num_steps
    value = nn.Sequential(
        nn.Linear(inputs, width),
        nn.SiLU(),
        nn.Linear(width, width),
        nn.SiLU(),
        nn.Linear(width, 1),
    )
    return value.to(unet.device)


def expected(value, rollout, i):
    """V(z_i, prompt, i): (B,)."""
    z = rollout.states[i].flatten(1)
    tokens = rollout.text.prompt.tokens
    prompt = tokens.float().mean(1)
    step = torch.zeros(len(z), len(rollout.noises), device=z.device)
    step[:, i] = 1
    inputs = torch.cat([z, prompt, step], 1)
    return value(inputs)[:, 0]


def dpok_step(value, optimizer, run):
    """In train_step's place: samples and judges once, then learns from it in UPDATES optimiser
    steps. Rewards are standardised within the batch."""
    c = run.config
    rng = random.Random(utils.seed_of(c.seed, "dpok", run.step))
    with run.phase("sample"):
        rollout = roll_out(run)
    mean, deviation = rollout.rewards.mean(), rollout.rewards.std()
    rewards = (rollout.rewards - mean) / (deviation + 1e-8)
    steps = [i for i, step in enumerate(run.plan.steps) if step.c > LEAST_NOISE]
    with torch.no_grad():
        advantages = {i: rewards - expected(value, rollout, i) for i in steps}
        unexplained = torch.stack([*advantages.values()]).square().mean()
    for _ in range(VALUE_STEPS):
        error = F.mse_loss(expected(value, rollout, rng.choice(steps)), rewards)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    logs = []
    for _ in range(UPDATES):
        chosen = rng.sample(steps, min(c.grad_steps, len(steps)))
        with run.phase("replay"):
            logs.append(add_gradients(run, rollout, chosen, advantages))
        logs.append(train.update(run, skip=False))
    images = (run.step + 1) * run.prompts_per_step()
    log = utils.mean_of(logs)
    log |= {"reward": mean.item(), "value_error": unexplained.item(), "images": images}
    return log, []


def begin(c):
    """(Run, its step). Raises ValueError for what DPOK cannot do."""
    if c.scheduler != "ddpm":
        raise ValueError(f"--scheduler {c.scheduler}: has no noise to learn from; use ddpm")
    if c.batch < 2 or c.accumulate > 1:
        raise ValueError(
            "--batch, --accumulate: a batch is judged as a whole; give 2 or more, and 1"
        )
    no_loss = {"token_weight": 0.0, "pixel_weight": 0.0, "adversarial_weight": 0.0}
    run = build.begin(replace(c, **no_loss, adversarial_cap=0.0))
    value = make_value(run)
    optimizer = torch.optim.AdamW(value.parameters(), lr=VALUE_LR)
    return run, partial(dpok_step, value, optimizer)


def main(c):
    with utils.one_line_errors("dpok.py"):
        run, step = begin(c)
        train.train(run, step)
        utils.leave(run.world_size)
    if run.rank == 0:
        print(f"images seen: {run.step * run.prompts_per_step()}")


if __name__ == "__main__":
    main(config)
