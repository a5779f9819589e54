"""The paper's ablation in miniature: which of CoMat's terms does what, on the shapes world.

    python shapes/ablation.py    # four recipes, three seeds each: two hours on two cores

Each run is train.py and evaluate.py in OUT/<recipe>-<seed>; what is finished is not run again, what
was cut off goes on. Prints the table; OUT/ablation.json and OUT/ablation.png have the same."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from subprocess import CalledProcessError, run

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from config import PRESETS, ROOT


@dataclass
class Options:
    out: Path = Path("out/ablation")
    """Folder for all runs, the table and the figure."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run of each recipe per seed."""
    steps: int = PRESETS["shapes"][1].steps
    """Optimiser steps of each run."""


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)

import numpy as np
import torch
from matplotlib.figure import Figure

import utils
from tools import figures

NO_AC = ["--token-weight=0", "--pixel-weight=0"]  # attribute concentration
NO_FP = ["--adversarial-weight=0", "--adversarial-cap=0"]  # fidelity preservation
RECIPES = {"CM": NO_AC + NO_FP, "CM+AC": NO_FP, "CM+FP": NO_AC, "CM+AC+FP": []}


def finish(options, recipe, seed):
    """Trains and scores a run unless that is done. Returns its folder."""
    folder = options.out.resolve() / f"{recipe}-{seed}"
    scored = (folder / "results.json").exists()
    if not scored:
        train = ["train.py", "shapes", "--resume", f"--out={folder}", *RECIPES[recipe]]
        train += [f"--seed={seed}", f"--steps={options.steps}"]
        run([sys.executable, *train], cwd=ROOT, check=True)
    last = f"checkpoints/step-{options.steps:06d}"
    if utils.newest_checkpoint(folder) != folder / last:
        mend = "start again to go on, or choose another --out"
        raise ValueError(f"{folder}: not trained for {options.steps} steps; {mend}")
    if not scored:
        run([sys.executable, "evaluate.py", str(folder)], cwd=ROOT, check=True)
    return folder


def read(folder):
    """{score: (2, images)} of a run, base and tuned, NaN where an image has none. A score of all
    images together is repeated."""
    results = json.loads((folder / "results.json").read_text())
    rows = []
    for line in (folder / "scores.jsonl").read_text().splitlines():  # base and tuned take turns
        row = json.loads(line)
        rows.append(results[row["model"]] | row)
    scores = {}
    for score in results["base"]:
        values = np.array([row[score] for row in rows], np.float32)  # None becomes NaN
        scores[score] = torch.from_numpy(values).view(-1, 2).T
    return scores


def compare(scores):
    """[mean of base, of tuned, 95 % interval of their difference] of scores (2, seeds, images),
    from 10,000 resamples of seeds and of images, the same for both."""
    _, seeds, images = scores.shape
    generator = torch.Generator().manual_seed(0)
    column = torch.randint(images, (10_000, 1, images), generator=generator)
    row = torch.randint(seeds, (10_000, seeds, 1), generator=generator)
    base, tuned = scores[:, row, column].nanmean((2, 3))
    interval = (tuned - base).nanquantile(torch.tensor([0.025, 0.975]))
    return [*scores.nanmean((1, 2)).tolist(), interval.tolist()]


def show(table):
    """A line for each score and recipe: base -> tuned, 95 % interval of the difference."""
    line = "{:27}{:10}{:8.3f} -> {:8.3f}  [{:+.3f}, {:+.3f}]"
    for score, cells in table.items():
        for recipe, (base, tuned, interval) in cells.items():
            print(line.format(score, recipe, base, tuned, *interval))


def chart(table):
    """Differences to the base: a panel a score, a point and its interval a recipe."""
    figure = Figure((9, 4.4), dpi=figures.DPI, layout="constrained")
    panels = figure.subplots(2, 4, sharey=True)
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
    table = {}
    for recipe in RECIPES:
        runs = [read(finish(options, recipe, seed)) for seed in options.seeds]
        for score in runs[0]:
            scores = torch.stack([one[score] for one in runs], dim=1)
            table.setdefault(score, {})[recipe] = compare(scores)
    utils.write(options.out / "ablation.json", json.dumps(table, indent=2) + "\n")
    chart(table).savefig(options.out / "ablation.png")
    show(table)


if __name__ == "__main__":
    with utils.one_line_errors("ablation.py", faults=(ValueError, OSError, CalledProcessError)):
        main(options)
