"""Draws one training step, train.add_gradients of one prompt, as one picture.

python tools/anatomy.py shapes --prompt "a yellow circle and a blue ring"
python tools/anatomy.py shapes --run out/shapes     from a run's LoRA and discriminator
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import PRESETS, Config, parse


@dataclass
class Anatomy(Config):
    prompt: str = "a yellow circle and a blue ring"
    """The prompt of the step."""
    run: str = ""
    """Output folder of train.py, of the same preset and --rank: start from its newest adapters."""
    updates: int = 40
    """Updates, each of a step from the same noise, before the last panel."""
    to: str = "docs/anatomy.png"
    """The picture."""


ANATOMIES = {name: (text, Anatomy(**vars(config))) for name, (text, config) in PRESETS.items()}

if __name__ == "__main__":
    config = parse(presets=ANATOMIES)  # before the heavy imports: --help answers at once

from unittest.mock import patch

import torch
from matplotlib.colors import AsinhNorm
from matplotlib.figure import Figure
from torch.autograd.graph import register_multi_grad_hook
from torch.nn.utils import get_total_norm

import build
import diffusion
import train
import utils
from tools.figures import DPI, draw_heat, save, words_of

LAYOUT = [  # titles; those of the single letters follow
    ["1 Sample", ".", "2 Judge: -log p", "2 Judge: -log p", "2 Wanted: -dL/dimage"],
    ["3 Masks", "a", "b", "c", "d"],
    [".", "4 Replay: |dL/dθ| at t", "4 Replay: |dL/dθ| at t", "5 Discriminator", "6 Update"],
]


def take_step(run):
    """Adds a step's gradients: (z_T, the last (maps, entities, masks), norms of replayed steps)."""
    norms = []
    with (
        patch.object(train, "judge", wraps=train.judge) as judge,
        patch.object(train, "attention_losses", wraps=train.attention_losses) as attend,
        register_multi_grad_hook(run.parameters, lambda g: norms.append(get_total_norm(g).item())),
    ):
        train.add_gradients(run, 0)
    z = judge.call_args.args[1]
    _, entities, masks, maps = attend.call_args_list[0].args
    return z, (maps, entities, masks), norms[::-1]  # replay goes backwards


def show_bars(axes, labels, values):
    places = range(len(labels))
    bars = axes.barh(places, values)
    axes.bar_label(bars, fmt=" %.2g")
    axes.set(yticks=places, yticklabels=labels, xmargin=0.15)
    axes.invert_yaxis()


def draw(run, z, attention, norms):
    """The figure of a step, and its panels by title."""
    figure = Figure((11, 7.8), dpi=DPI)
    panels = figure.subplot_mosaic(LAYOUT)
    for title, axes in panels.items():
        axes.set(title=title if " " in title else "", xticks=[], yticks=[], frame_on=False)
    images = diffusion.decode(run.pipe, z).detach().requires_grad_()
    image = images[0].detach().cpu()
    panels["1 Sample"].imshow(image.movedim(0, -1))
    blip = run.rewards["blip"]
    log_p, ids, scored = blip.token_log_likelihood(images, run.prompts)
    (log_p * scored).sum().backward()
    tokens = blip.tokenizer.convert_ids_to_tokens(ids[scored > 0])
    show_bars(panels["2 Judge: -log p"], tokens, (-log_p[scored > 0]).tolist())
    gradient = images.grad[0].cpu()
    wanted = 0.5 + image.mean(0) / 2 + gradient / gradient.abs().max()
    panels["2 Wanted: -dL/dimage"].imshow(wanted.clamp(0, 1).movedim(0, -1))
    maps, (entities,), (masks,) = attention
    panels["3 Masks"].imshow(masks.sum(0).cpu(), "gray", vmin=0)
    *_, finest = maps.values()
    mean = finest[0].mean(0).detach().cpu()  # over heads: (h, w, tokens)
    for name, word in zip("abcd", words_of(run.prompts[0], entities, run.pipe.tokenizer)):
        heat = mean[..., word.tokens].sum(-1)
        draw_heat(panels[name], image, heat / heat.max(), masks[word.entity].cpu())
        panels[name].set_title(f"4 Attention: {word.text}")
    trained, _ = train.choose_steps(run.config, run.step)
    timesteps = [run.plan.steps[i].t for i in trained]
    show_bars(panels["4 Replay: |dL/dθ| at t"], timesteps, norms)
    with torch.no_grad(), run.discriminator_active():
        logits = run.discriminator.logits(z)[0, 0].cpu()
    panel = panels["5 Discriminator"]
    panel.imshow(logits, "PiYG", AsinhNorm(0.01, -1, 1))
    panel.set_xlabel("pink: fake" if logits.any() else "untrained: all 0")
    return figure, panels


def main(c):
    utils.check_writable("--to", Path(c.to).parent)
    run = build.setup(replace(c, batch=1, accumulate=1, warmup=0))
    if not (run.segmenter and run.discriminator and "blip" in run.rewards):
        raise ValueError("every part of a step is drawn: leave blip in --rewards, and no weight 0")
    run.prompts = [c.prompt]
    if c.run:
        utils.load_weights(run, Path(c.run, "checkpoints/latest"))
    step = take_step(run)
    figure, panels = draw(run, *step)
    for _ in range(c.updates):
        train.update(run, skip=False)
        step = take_step(run)
    image = diffusion.decode(run.pipe, step[0])[0].detach().cpu()
    panel = panels["6 Update"]
    panel.imshow(image.movedim(0, -1))
    panel.set_xlabel(f"after {c.updates} such steps")
    save(figure, c.to, bbox_inches="tight")
    print(c.to)


if __name__ == "__main__":
    with utils.one_line_errors("anatomy.py"):
        main(config)
