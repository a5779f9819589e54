"""The paper's ablation in miniature: which of CoMat's terms does what, on the shapes world.

    python shapes/ablation.py    # four recipes, three seeds each; two of them also long, one seed

Each run is train.py and evaluate.py in OUT/<recipe>-<seed>, on a core of its own, with what they
say in OUT/<recipe>-<seed>.log; what is finished is not run again, what was cut off goes on. Prints
the table; OUT/ablation.json and OUT/ablation.png have the same. The Frechet distance is that to
OUT/real, scenes of the held-out prompts as the renderer draws them."""

import json
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from config import PRESETS, Positive


@dataclass
class Options:
    out: Path = Path("out/ablation")
    """Folder for all runs, the table and the figure."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of each recipe per seed."""
    steps: int = PRESETS["shapes"][1].steps
    """Optimiser steps of each run."""
    jobs: Positive = os.cpu_count()
    """Runs at a time, each on one core and with 1.3 GB of memory."""


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)

import numpy as np
import torch
from matplotlib.figure import Figure

import images
import prompts as prompt_lists
import utils
from scores.numbers import compare
from shapes import parallel, world
from tools import figures

NO_AC = ["--token-weight=0", "--pixel-weight=0"]  # attribute concentration
NO_FP = ["--adversarial-weight=0", "--adversarial-cap=0"]  # fidelity preservation
RECIPES = {  # name -> (flags, how many times as long; a longer one with the first seed only)
    "CM": (NO_AC + NO_FP, 1),
    "CM+AC": (NO_FP, 1),
    "CM+FP": (NO_AC, 1),
    "CM+AC+FP": ([], 1),
    "CMx5": (NO_AC + NO_FP, 5),
    "CM+FPx5": (NO_AC, 5),
}


def draw_real(folder):
    """A scene of each held-out prompt: folder/NNN.png. Returns the flag of evaluate.py for it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    toy = PRESETS["shapes"][1]
    for number, prompt in enumerate(prompt_lists.read(toy.eval_prompts)[: toy.eval_count]):
        scene = world.place(rng, world.objects_of(prompt))
        images.save_png(world.render(scene), folder / f"{number:03}.png", prompt=prompt)
    return f"--real={folder}"


def finish(folder, train, steps, scoring):
    """Trains and scores a run unless that is done. train: the command, scoring: flags of
    evaluate.py."""
    log = folder.with_suffix(".log")
    scored = (folder / "results.json").exists()
    if not scored:
        parallel.start([*train, "--resume", f"--out={folder}", f"--steps={steps}"], log)
    if utils.newest_checkpoint(folder) != folder / f"checkpoints/step-{steps:06d}":
        mend = "start again to go on, or choose another --out"
        raise ValueError(f"{folder}: not trained for {steps} steps; {mend}")
    if not scored:
        parallel.start(["evaluate.py", str(folder), *scoring], log)
        print(f"{folder.name}: trained and scored", flush=True)


def read(folder, side):
    """{score: (2, images)} of the base and another side of what was scored, NaN where an image has
    none. A score of all images together is repeated."""
    sides = json.loads((folder / "results.json").read_text())["sides"]
    lines = (folder / "scores.jsonl").read_text().splitlines()
    rows = list(map(json.loads, lines))
    scores = {}
    for score in sides[side]:
        pair = []
        for name in ("base", side):
            mean = sides[name][score]["mean"]
            values = [row.get(score, mean) for row in rows if row["side"] == name]
            pair.append(np.array(values, np.float32))  # None becomes NaN
        scores[score] = torch.from_numpy(np.stack(pair))
    return scores


def tabulate(runs):
    """{score: {recipe: [mean of base, of the recipe, 95 % interval of their difference]}} from runs
    {recipe: [(folder, side) of each seed]}."""
    table = {}
    for recipe, places in runs.items():
        scores = [read(*place) for place in places]
        for score in scores[0]:
            base, own = torch.stack([of_seed[score] for of_seed in scores], dim=1)
            first, second = compare({"base": base, recipe: own}).values()
            cell = [first["mean"], second["mean"], second["interval"]]
            table.setdefault(score, {})[recipe] = cell
    return table


def show(table):
    """A line for each score and recipe: base -> tuned, 95 % interval of the difference."""
    first, *_ = table.values()
    width = 2 + max(map(len, first))
    for score, cells in table.items():
        for recipe, (base, tuned, (low, high)) in cells.items():
            numbers = f"{base:8.3f} -> {tuned:8.3f}  [{low:+.3f}, {high:+.3f}]"
            print(f"{score:27}{recipe:{width}}{numbers}")


def chart(table):
    """Differences to the base: a panel a score, a point and its interval a recipe."""
    figure = Figure((9, 6.6), dpi=figures.DPI, layout="constrained")
    panels = figure.subplots(3, 3, sharey=True)
    for axes, score in zip(panels.flat, table):
        figures.plain(axes, "x")
        axes.axvline(0, color=figures.FAINT, linewidth=1)
        for recipe, (base, tuned, interval) in table[score].items():
            axes.plot(interval, [recipe, recipe], color=figures.INK)
            axes.plot(tuned - base, recipe, "o", color=figures.INK)
        title = score.replace("_", " ")
        axes.set_title(f"{title}\nminus base", fontsize=9)
    return figure


def main(options):
    out, runs, tasks = options.out.resolve(), {}, []
    scoring = [draw_real(out / "real")]
    for recipe, (flags, times) in RECIPES.items():
        runs[recipe] = []
        for seed in options.seeds if times == 1 else options.seeds[:1]:
            train = ["train.py", "shapes", *flags, f"--seed={seed}"]
            folder = out / f"{recipe}-{seed}"
            tasks.append((finish, folder, train, options.steps * times, scoring))
            runs[recipe].append((folder, "tuned"))
    # longest first: a flag takes a loss away
    tasks.sort(key=lambda task: (-task[3], len(task[2])))
    parallel.side_by_side(tasks, options.jobs)
    table = tabulate(runs)
    utils.write(options.out / "ablation.json", json.dumps(table, indent=2) + "\n")
    figures.save(chart(table), options.out / "ablation.png")
    show(table)


if __name__ == "__main__":
    with utils.one_line_errors("ablation.py"):
        main(options)
