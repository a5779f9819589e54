"""Scores a run: base against tuned, with the same noise, on held-out prompts.

    python evaluate.py out/shapes

prints a table with 95 % bootstrap intervals of the difference, paired by prompt, and writes results.json.
"""
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    import tyro

    def arguments(out: tyro.conf.Positional[Path], checkpoint: str = "latest"):
        """Scores a run: base against tuned, with the same noise, on held-out prompts.

        Args:
            out: Output folder of train.py.
            checkpoint: Folder name below out/checkpoints.
        """
        return out, checkpoint

    parsed = tyro.cli(arguments)

import torch  # noqa: E402

import prompts as prompt_lists  # noqa: E402
import sample  # noqa: E402
import shapes  # noqa: E402


def compare(base, tuned, resamples=10_000, seed=0):
    """Paired comparison of two tables of scores (lists of dicts, one a prompt): means, difference, 95 % bootstrap interval."""
    results = {"n": len(base), "base": {}, "tuned": {}, "difference": {}, "interval": {}}
    index = torch.randint(len(base), (resamples, len(base)), generator=torch.Generator().manual_seed(seed))
    for key in base[0]:
        before, after = (torch.tensor([row[key] for row in rows]) for rows in (base, tuned))
        differences = after[index].nanmean(1) - before[index].nanmean(1)
        low, high = differences.nanquantile(torch.tensor([0.025, 0.975])).tolist()
        results["base"][key], results["tuned"][key] = before.nanmean().item(), after.nanmean().item()
        results["difference"][key] = results["tuned"][key] - results["base"][key]
        results["interval"][key] = [low, high]
    return results


def table(results):
    """The results as the lines that are printed."""
    lines = [f"{'held-out prompts, n = ' + str(results['n']):<28} {'base':>6}    {'tuned':>6}  difference  95 % interval"]
    for key in results["base"]:
        low, high = results["interval"][key]
        lines.append(f"{key.replace('_', ' '):<28} {results['base'][key]:6.3f} -> {results['tuned'][key]:6.3f}"
                     f"  {results['difference'][key]:+10.3f}  [{low:+.3f}, {high:+.3f}]")
    return "\n".join(lines)


def score_run(config, pipe, plan, count=None):
    """Scores the adapter `comat` of a pipeline against its base on config.eval_prompts by the oracle: (results, prompts, images
    of the base, images of the tuned model)."""
    asked = prompt_lists.read(config.eval_prompts)[:count or config.eval_count]
    tuned, base = sample.generate(pipe, plan, asked, config.guidance_scale, config.resolution, progress="scoring")
    rows = [[shapes.score(image, prompt) for image, prompt in zip(images, asked)] for images in (base, tuned)]
    return compare(*rows), asked, base, tuned


def main(out, checkpoint):
    config, pipe, plan = sample.open_run(out, checkpoint)
    if not config.eval_prompts:
        raise ValueError(f"{out}: its config names no held-out list (--eval-prompts)")
    results, *_ = score_run(config, pipe, plan)
    print(table(results))
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main(*parsed)
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: {str(error).splitlines()[0]}")
