"""CoMat beside what needs no training and beside DPOK: the same base, prompts and noise.

    python shapes/compare.py    # an hour on two cores

Each run is in a folder of its own below OUT, as in ablation.py; what is finished is not run again,
what was cut off goes on. Prints the table, with the time of sampling and training; OUT/compare.json
has the same, OUT/baselines.png a row of images for each."""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from config import PRESETS, Positive


@dataclass
class Options:
    out: Path = Path("out/compare")
    """Folder for all runs, the table and the picture."""
    seeds: tuple[int, ...] = (0,)
    """One run of each trainer per seed."""
    steps: int = PRESETS["shapes"][1].steps
    """Optimiser steps of CoMat; DPOK sees as many images."""
    jobs: Positive = os.cpu_count()
    """Runs at a time, each on one core."""


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)

import images
import models
import prompts as prompt_lists
import utils
from baselines import training_free
from diffusion import ADAPTER
from shapes import ablation, parallel

SCORES = ["--scores", "oracle", "blip", "fidelity"]
TRAINED = {  # name -> (command, training-free methods on top of it)
    "CoMat": (["train.py", "shapes"], ["attend-and-excite", "syngen"]),
    "DPOK": (["baselines/dpok.py", "shapes", "--lr=1e-3"], []),
}
TIMED, REPEATS, SHOWN = 32, 3, 4  # held-out prompts, the fastest of so many times; in the picture


def score_all(options):
    """{name: [(folder, side) of each seed]} of all that is compared, trained and scored."""
    out = options.out.resolve()
    scoring = [*SCORES, ablation.draw_real(out / "real")]
    folder = out / "training-free"
    tasks = [(score_methods, folder, scoring)]
    runs = {name: [(folder, f"base+{name}")] for name in training_free.METHODS}
    for name, (train, methods) in TRAINED.items():
        for seed in options.seeds:
            folder = out / f"{name}-{seed}"
            own = [*scoring, "--method", *methods]
            tasks.append((ablation.finish, folder, [*train, f"--seed={seed}"], options.steps, own))
            for method in ("", *methods):
                suffix = f"+{method}" if method else ""
                places = runs.setdefault(name + suffix, [])
                places.append((folder, f"tuned{suffix}"))
    parallel.side_by_side(tasks, options.jobs)
    return runs


def score_methods(folder, scoring):
    """Scores the training-free methods on the base unless that is done."""
    if not (folder / "results.json").exists():
        command = ["evaluate.py", "shapes", f"--to={folder}", *scoring]
        command += ["--method", *training_free.METHODS]
        parallel.start(command, folder.with_suffix(".log"))
        print(f"{folder.name}: scored", flush=True)


def draw(source, side):
    """(images of the first held-out prompts, the least CPU seconds of sampling more of them)."""
    config, pipe, plan = models.open_run(source, base_only=source in PRESETS)
    model, _, method = side.partition("+")
    adapters = {model: ADAPTER if model == "tuned" else None}
    sides = training_free.sides(adapters, [method] if method else [], config.parser)
    adapter, sampler = sides[side]
    prompts = prompt_lists.read(config.eval_prompts)[:TIMED]
    how = config.guidance_scale, config.resolution, [adapter]
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        (z,) = images.latents(pipe, plan, prompts, *how, sampler=sampler)
        seconds.append(time.process_time() - start)
    return images.decode_all(pipe, z)[:SHOWN], min(seconds)


def minutes_of(folder):
    """How long a run was trained; 0 for what was not."""
    log = folder / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else ()
    rows = map(json.loads, lines)
    seconds = [row["seconds"] for row in rows]
    return sum(seconds) / 60


def main(options):
    runs = score_all(options)
    table = ablation.tabulate(runs)
    pictures, seconds, minutes = {}, {}, {}
    pictures["base"], seconds["base"] = draw("shapes", "base")
    for name, ((folder, side), *_) in runs.items():
        source = "shapes" if side.startswith("base") else folder
        pictures[name], seconds[name] = draw(source, side)
        minutes[name] = minutes_of(folder)
    ablation.show(table)
    costs = {}
    for name in runs:
        costs[name] = seconds[name] / seconds["base"]
        print(f"{name:35}sampling x {costs[name]:.2f}, {minutes[name]:.1f} minutes of training")
    results = {"scores": table, "relative_cost_of_sampling": costs, "training_minutes": minutes}
    utils.write(options.out / "compare.json", json.dumps(results, indent=2) + "\n")
    prompts = prompt_lists.read(PRESETS["shapes"][1].eval_prompts)[:SHOWN]
    images.save_grid(options.out / "baselines.png", prompts, pictures)


if __name__ == "__main__":
    with utils.one_line_errors("compare.py"):
        main(options)
