"""The paper's ablation in miniature: which of CoMat's terms does what, on the shapes world.

    python shapes/ablation.py    # four recipes, three seeds each: two hours on two cores

Each run is train.py and evaluate.py in OUT/<recipe>-<seed>; what is finished is not run again, what
was cut off goes on. Writes OUT/ablation.json, OUT/ablation.png and prints the table."""

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
    eval_count: int = PRESETS["shapes"][1].eval_count
    """Held-out prompts."""


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)

import torch
from matplotlib.figure import Figure

import utils
from tools import figures

NO_AC = ["--token-weight", "0", "--pixel-weight", "0"]  # attribute concentration
NO_FP = ["--adversarial-weight", "0", "--adversarial-cap", "0"]  # fidelity preservation
RECIPES = {"CM": NO_AC + NO_FP, "CM+AC": NO_FP, "CM+FP": NO_AC, "CM+AC+FP": []}


def finish(options, recipe, seed):
    """Trains and scores a run unless that is done. Returns its folder."""
    folder = options.out.resolve() / f"{recipe}-{seed}"
    train = ["train.py", "shapes", "--out", folder, "--seed", str(seed), *RECIPES[recipe]]
    train += ["--steps", str(options.steps), "--eval-count", str(options.eval_count), "--resume"]
    for command in [] if (folder / "results.json").exists() else [train, ["evaluate.py", folder]]:
        run([sys.executable, *command], cwd=ROOT, check=True)
    if len((folder / "log.jsonl").read_text().splitlines()) != options.steps:
        raise ValueError(f"{folder}: not {options.steps} steps; delete it or choose another --out")
    return folder


def read(folder, model):
    """{score: (images,)} of a run's "base" or "tuned"; a score of all images is repeated."""
    lines = (folder / "scores.jsonl").read_text().replace("null", "NaN").splitlines()
    rows = [row for row in map(json.loads, lines) if row["model"] == model]
    scores = json.loads((folder / "results.json").read_text())[model]
    return {score: [row.get(score, mean) for row in rows] for score, mean in scores.items()}


def compare(base, tuned, resamples=10_000):
    """[mean of base, of tuned, 95 % interval of their difference] of scores (seeds, images)."""
    generator, (seeds, images) = torch.Generator().manual_seed(0), base.shape
    column = torch.randint(images, (resamples, 1, images), generator=generator)
    row = torch.randint(seeds, (resamples, seeds, 1), generator=generator)  # the same for both
    differences = tuned[row, column].nanmean((1, 2)) - base[row, column].nanmean((1, 2))
    interval = differences.nanquantile(torch.tensor([0.025, 0.975])).tolist()
    return [base.nanmean().item(), tuned.nanmean().item(), interval]


def markdown(table):
    """A row a score, a column a recipe: its mean, the difference to the base, the interval."""
    lines = ["| | base | " + " | ".join(RECIPES) + " |", "|---" * (len(RECIPES) + 2) + "|"]
    for score, cells in table.items():
        lines.append(f"| {score.replace('_', ' ')} | {cells['CM'][0]:.3f} |")
        for base, tuned, (low, high) in cells.values():
            lines[-1] += f" {tuned:.3f}, {tuned - base:+.3f} [{low:.3f}, {high:.3f}] |"
    return "\n".join(lines)


def chart(table):
    """Differences to the base: a panel a score, a point and its interval a recipe."""
    figure = Figure(figsize=(9, 4.4), dpi=figures.DPI, layout="constrained")
    for axes, (score, cells) in zip(figure.subplots(2, 4, sharey=True).flat, table.items()):
        figures.plain(axes, "x")
        axes.axvline(0, color=figures.FAINT, linewidth=1)
        for recipe, (base, tuned, (low, high)) in cells.items():
            axes.plot(
                [low, tuned - base, high], [recipe] * 3, "o-", color=figures.INK, markevery=[1]
            )
        axes.set_title(f"{score.replace('_', ' ')}\nminus base", fontsize=9, color=figures.INK)
    return figure


def main(options):
    table = {}
    for recipe in RECIPES:
        folders = [finish(options, recipe, seed) for seed in options.seeds]
        base = [read(folder, "base") for folder in folders]
        tuned = [read(folder, "tuned") for folder in folders]
        for score in base[0]:
            sides = [torch.tensor([one[score] for one in runs]) for runs in (base, tuned)]
            table.setdefault(score, {})[recipe] = compare(*sides)
    utils.write(options.out / "ablation.json", json.dumps(table, indent=2) + "\n")
    chart(table).savefig(options.out / "ablation.png")
    print(markdown(table))


if __name__ == "__main__":
    with utils.one_line_errors("ablation.py", faults=(ValueError, OSError, CalledProcessError)):
        main(options)
