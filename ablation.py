"""The paper's ablation in miniature: which of CoMat's terms does what, on the embedded shapes world.

    python ablation.py                                    four recipes, three seeds each; about two hours on two cores
    python ablation.py --steps 20 --out out/ablation20    shorter runs, an hour
    python ablation.py --jobs 4                           four runs at a time, which share the cores

Each run is `train.py shapes` with some weights set to 0, in OUT/<recipe>-<seed>. What is finished is not run again, what was
cut off goes on from its checkpoint. Writes OUT/ablation.json and OUT/ablation.png and prints the table.
"""
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

RECIPES = {  # CM: concept matching, AC: attribute concentration, FP: fidelity preservation; the paper's names
    "CM": ["--token-weight", "0", "--pixel-weight", "0", "--adversarial-weight", "0", "--adversarial-cap", "0"],
    "CM+AC": ["--adversarial-weight", "0", "--adversarial-cap", "0"],
    "CM+FP": ["--token-weight", "0", "--pixel-weight", "0"],
    "CM+AC+FP": [],
}

if __name__ == "__main__":
    import tyro

    def arguments(out: Path = Path("out/ablation"), seeds: tuple[int, ...] = (0, 1, 2), steps: int = 0, eval_count: int = 0,
                  jobs: int = 1):
        """The paper's ablation in miniature: which of CoMat's terms does what, on the embedded shapes world.

        Args:
            out: Folder for all runs, the table and the figure.
            seeds: One run of each recipe per seed.
            steps: Optimiser steps of each run; 0 takes the preset's.
            eval_count: Held-out prompts; 0 takes the preset's.
            jobs: Runs at a time; they share the cores.
        """
        return dict(locals())

    parsed = tyro.cli(arguments, description=__doc__)

import json  # noqa: E402
import math  # noqa: E402

import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

import config as configuration  # noqa: E402
import evaluate  # noqa: E402
import figures  # noqa: E402
import sample  # noqa: E402

SHOWN = {"fully_right": "fully right", "objects_present": "objects present", "attributes_bound": "attributes bound",
         "extra_objects": "extra objects", "caption_log_likelihood": "log p(caption), nats",
         "entity_activation_percent": "entity activation, %", "frechet_distance": "Fréchet distance"}


def finish(folder, flags, threads):
    """Trains and scores one run unless that is done. Raises ValueError if it fails or is stopped, with its output in a .txt
    file, or if what is done had other --steps or --eval-count."""
    results, said = folder / "results.json", folder.with_suffix(".txt")
    if results.is_file():
        done, asked = configuration.load(folder / "config.json"), configuration.parse(["shapes", *flags])
        for name in ("steps", "eval_count"):
            if getattr(done, name) != getattr(asked, name):
                raise ValueError(f"{folder}: is finished with --{name.replace('_', '-')} {getattr(done, name)}, not "
                                 f"{getattr(asked, name)}; choose another --out")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("train.py")), "shapes", "--out", str(folder), *flags, "--resume"]
    with open(said, "a") as file:
        subprocess.run(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    if not results.is_file():  # a run that was stopped exits with 0 too
        raise ValueError(f"{folder}: did not finish, see {said}; start again to go on, finished runs are kept")


def read(folder):
    """(scores of the base, of the tuned model, seconds of training) of a run; scores: a dict an image, in the list's order."""
    rows = {"base": [], "tuned": []}
    for line in open(folder / "scores.jsonl"):
        row = json.loads(line)
        rows[row["model"]].append(row)
    return rows["base"], rows["tuned"], sum(json.loads(line)["seconds"] for line in open(folder / "log.jsonl"))


def column(rows, key):
    return torch.tensor([float("nan") if row.get(key) is None else row[key] for row in rows])


def compare(out, seeds):
    """{recipe: {score: {"mean", "difference", "interval"}, "minutes"}}, the base among them; means over seeds. The intervals
    say what other seeds and other prompts of this kind would give; over few seeds a bootstrap is too narrow."""
    table = {"base": {}}
    for recipe in RECIPES:
        folders = [out / f"{recipe}-{seed}" for seed in seeds]
        runs = [read(folder) for folder in folders]
        table[recipe] = {"minutes": sum(seconds for *_, seconds in runs) / len(runs) / 60}
        for key in SHOWN:
            if key == "frechet_distance":  # of a set of images, not of one: the range over seeds stands for an interval
                pairs = [json.loads((f / "results.json").read_text()) for f in folders]
                before, after = (torch.tensor([p[name][key] for p in pairs]) for name in ("base", "tuned"))
                spread = [(after - before).min().item(), (after - before).max().item()]
            else:
                before, after = (torch.stack([column(run[i], key) for run in runs]) for i in (0, 1))
                spread = sample.bootstrap(before, after)
            table["base"][key] = {"mean": before.nanmean().item()}
            table[recipe][key] = {"mean": after.nanmean().item(), "interval": spread,
                                  "difference": after.nanmean().item() - before.nanmean().item()}
    return table


def markdown(table):
    """The table in Markdown: a row a score, a column a recipe; differences to the base with their intervals."""
    lines = ["| | base | " + " | ".join(RECIPES) + " |", "|---" * (len(RECIPES) + 2) + "|"]
    for key, name in SHOWN.items():
        digits = 1 if abs(table["base"][key]["mean"]) >= 2 else 3
        cells = [f"{table['base'][key]['mean']:.{digits}f}"]
        for recipe in RECIPES:
            cell = table[recipe][key]
            low, high = cell["interval"]
            cells.append(f"{cell['mean']:.{digits}f}, {cell['difference']:+.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("| minutes of training | | " + " | ".join(f"{table[r]['minutes']:.1f}" for r in RECIPES) + " |")
    return "\n".join(lines)


def figure(table, path):
    """Each score's difference to the base, a panel a score, a point a recipe with its interval."""
    chart = Figure(figsize=(9, 4.4), dpi=figures.DPI, layout="constrained")
    panels = chart.subplots(2, math.ceil(len(SHOWN) / 2), sharey=True).flatten()
    for axes in panels[len(SHOWN):]:
        axes.set_axis_off()
    for axes, (key, name) in zip(panels, SHOWN.items()):
        figures.plain(axes, "x")
        axes.axvline(0, color=figures.FAINT, linewidth=1)
        for y, recipe in enumerate(reversed(RECIPES)):
            cell = table[recipe][key]
            axes.plot(cell["interval"], [y, y], color=figures.COLOURS["tuned"], linewidth=2)
            axes.plot(cell["difference"], y, "o", color=figures.COLOURS["tuned"])
        axes.set_yticks(range(len(RECIPES)), list(reversed(RECIPES)))
        axes.set_title(f"{name}\nbase {table['base'][key]['mean']:.3g}", fontsize=9.5, color=figures.INK)
        axes.margins(y=0.2)
    chart.supxlabel("difference to the base", fontsize=9, color=figures.INK)
    chart.savefig(path)


def main(out, seeds, steps, eval_count, jobs):
    if not seeds or jobs < 1:
        raise ValueError("--seeds: at least one; --jobs: at least 1")
    common = ["--sample-every", "0", "--keep", "1", "--references", str(out / "references"),
              *(["--steps", str(steps)] if steps else []), *(["--eval-count", str(eval_count)] if eval_count else [])]
    threads, pool, ended = max(1, (os.cpu_count() or 1) // jobs), ThreadPoolExecutor(jobs), threading.Event()

    def run(name, flags):
        if ended.is_set():
            return
        try:
            finish(out / name, [*common, *flags], threads)
        except BaseException:
            ended.set()  # here, or this thread would start the next run before the main one hears of it
            raise
        print(f"{name} done", flush=True)

    try:
        for done in as_completed([pool.submit(run, f"{recipe}-{seed}", ["--seed", str(seed), *flags])
                                  for seed in seeds for recipe, flags in RECIPES.items()]):
            done.result()
    finally:
        ended.set()  # by Ctrl-C: the runs get it too, save and end
    table = compare(out, seeds)
    configuration.write(out / "ablation.json", evaluate.as_json({"seeds": seeds, **table}, indent=2) + "\n")
    figure(table, out / "ablation.png")
    print(markdown(table))


if __name__ == "__main__":
    try:
        main(**parsed)
    except (ValueError, OSError) as error:
        sys.exit(f"ablation.py: {configuration.first_line(error)}")
    except KeyboardInterrupt:
        sys.exit("ablation.py: stopped; start it again to go on")
