"""The paper's ablation in miniature: which of CoMat's terms does what, on the shapes world.

    python shapes/ablation.py    # four recipes, three seeds each: two hours on two cores
    python shapes/ablation.py --steps 20 --out out/ablation20    # shorter runs, an hour

Each run is train.py and evaluate.py in OUT/<recipe>-<seed>; what is finished is not run again, what
was cut off goes on. Writes OUT/ablation.json, OUT/ablation.png and prints the table."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

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

import numpy as np
from matplotlib.figure import Figure

import utils
from tools import figures

NO_AC = ["--token-weight", "0", "--pixel-weight", "0"]  # attribute concentration
NO_FP = ["--adversarial-weight", "0", "--adversarial-cap", "0"]  # fidelity preservation
RECIPES = {"CM": NO_AC + NO_FP, "CM+AC": NO_FP, "CM+FP": NO_AC, "CM+AC+FP": []}
SCORES = ["fully_right", "objects_present", "attributes_bound", "extra_objects"]
SCORES += ["caption_log_likelihood", "entity_activation_percent", "frechet_distance"]


def finish(folder, flags, steps):
    """Trains and scores a run unless that is done."""
    train = ["train.py", "shapes", *flags, "--steps", str(steps), "--out", folder, "--resume"]
    for command in [] if (folder / "results.json").exists() else [train, ["evaluate.py", folder]]:
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    if len((folder / "log.jsonl").read_text().splitlines()) != steps:
        raise ValueError(f"{folder}: has not {steps} steps; delete it or choose another --out")


def values_of(folders, model, score):
    """(runs, images), NaN where an image has none; of all images together: (runs, 1)."""
    values = []
    for folder in folders:
        if score == "frechet_distance":
            values.append([json.loads((folder / "results.json").read_text())[model][score]])
        else:
            rows = map(json.loads, (folder / "scores.jsonl").read_text().splitlines())
            values.append([row[score] for row in rows if row["model"] == model])
    return np.array(values, dtype=float)


def compare(base, tuned, resamples=10_000):
    """Means of scores (seeds, images), and the 95 % interval of their difference: percentiles over
    resamples of seeds and of images, the same for both."""
    rng, (seeds, images) = np.random.default_rng(0), base.shape
    differences = []
    for _ in range(resamples):
        drawn = np.ix_(rng.integers(seeds, size=seeds), rng.integers(images, size=images))
        differences.append(np.nanmean(tuned[drawn]) - np.nanmean(base[drawn]))
    means = {"base": np.nanmean(base), "tuned": np.nanmean(tuned)}
    low, high = np.nanpercentile(differences, [2.5, 97.5])
    return {**means, "difference": means["tuned"] - means["base"], "interval": [low, high]}


def markdown(table):
    """A row a score, a column a recipe: its mean, the difference to the base, the interval."""
    lines = ["| | base | " + " | ".join(RECIPES) + " |", "|---" * (len(RECIPES) + 2) + "|"]
    for score, cells in table.items():
        line = f"| {score.replace('_', ' ')} | {cells['CM']['base']:.3f} |"
        for cell in cells.values():
            low, high = cell["interval"]
            line += f" {cell['tuned']:.3f}, {cell['difference']:+.3f} [{low:.3f}, {high:.3f}] |"
        lines.append(line)
    return "\n".join(lines)


def chart(table):
    """Differences to the base: a panel a score, a point and its interval a recipe."""
    figure = Figure(figsize=(9, 4.4), dpi=figures.DPI, layout="constrained")
    panels = figure.subplots(4, 2, sharey=True).flatten()
    panels[-1].set_axis_off()
    for axes, (score, cells) in zip(panels, table.items()):
        figures.plain(axes, "x")
        axes.axvline(0, color=figures.FAINT, linewidth=1)
        for recipe, cell in cells.items():
            axes.plot(cell["interval"], [recipe] * 2, color=figures.COLOURS["tuned"])
            axes.plot(cell["difference"], recipe, "o", color=figures.COLOURS["tuned"])
        axes.set_title(f"{score.replace('_', ' ')}, minus base", fontsize=9.5, color=figures.INK)
    return figure


def main(options):
    common = ["--eval-count", str(options.eval_count), "--sample-every", "0"]
    table = {score: {} for score in SCORES}
    for recipe, flags in RECIPES.items():
        folders = [options.out.resolve() / f"{recipe}-{seed}" for seed in options.seeds]
        for seed, folder in zip(options.seeds, folders):
            finish(folder, ["--seed", str(seed), *common, *flags], options.steps)
        for score in SCORES:
            sides = [values_of(folders, model, score) for model in ("base", "tuned")]
            table[score][recipe] = compare(*sides)
    utils.write(options.out / "ablation.json", json.dumps(table, indent=2) + "\n")
    chart(table).savefig(options.out / "ablation.png")
    print(markdown(table))


if __name__ == "__main__":
    with utils.one_line_errors(
        "ablation.py", faults=(ValueError, OSError, subprocess.CalledProcessError)
    ):
        main(options)
