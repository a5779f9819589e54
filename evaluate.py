"""Scores a run: base against tuned, with the same noise, by several judges.

    python evaluate.py out/shapes                                   the run's own held-out list
    torchrun --nproc_per_node 2 evaluate.py out/shapes              the same numbers from two cores, in half the time
    torchrun --nproc_per_node 8 evaluate.py out/sdxl                T2I-CompBench: 900 prompts, 10 images each, on eight GPUs
    python evaluate.py out/sdxl --count 20 --images 2 --scores vqa caption        a quick look
    python evaluate.py out/sdxl --prompts my.txt --checkpoint step-001000

prints a table with 95 % intervals of the difference, paired by prompt and seed, and the protocol; writes results.json and
scores.jsonl, one line an image, to OUT or --to. Scores of another protocol that are there are kept under another name. The
scores:

    oracle       the shapes world's oracle (shapes.score), for prompts and images of that world
    vqa          BLIP-VQA attribute binding as T2I-CompBench computes it (vqa.py), a row per list
    caption      log p(prompt | image) of the run's captioner, summed over the prompt's tokens, in nats
    activation   share of cross-attention that a noun's or attribute's token gets when finished latents are noised and denoised
                 once (sample.token_activations), mean over all cross-attention layers of the UNet, in percent
    fidelity     Frechet distance, in the captioner's image features, to the base's images with other seeds; the base's own
                 is the floor, what no change at all would give

Without --scores: the last three, and the oracle where it can read the prompts, else vqa.
"""
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

SCORES = ("oracle", "vqa", "caption", "activation", "fidelity")
LISTS = tuple(Path(f"data/t2i_compbench/{kind}_val.txt") for kind in ("color", "shape", "texture"))


@dataclass
class Options:
    """What is scored, and how. The empty values stand for a protocol that depends on the run: see the head of evaluate.py."""

    out: tyro.conf.Positional[Path]
    """Output folder of train.py."""
    checkpoint: str = "latest"
    """Folder name below out/checkpoints."""
    scores: tuple[Literal[SCORES], ...] = ()
    """Which scores; empty: caption, activation, fidelity, and oracle or vqa."""
    prompts: tuple[Path, ...] = ()
    """Prompt lists; empty: the run's --eval-prompts or, if it has none, T2I-CompBench's color, shape and texture lists."""
    images: int = 0
    """Images per prompt; 0: T2I-CompBench's 10 with vqa, else 1."""
    count: int = 0
    """The first prompts of each list; 0: the run's --eval-count."""
    seed: int | None = None
    """With one image per prompt the seed of the first prompt, the next has the next; with N images all prompts get the N seeds
    from this one. None: T2I-CompBench's 42 with vqa, else 1000000007, that of the grids."""
    to: Path | None = None
    """Folder for results.json and scores.jsonl. None: the output folder."""
    batch: int = 0
    """Images at a time; 0: the run's --batch. An image's score depends on it in the last digits only."""
    device: Literal["", "auto", "cuda", "cpu"] = ""
    """auto, cuda or cpu; empty: the run's."""
    vqa: str = "Salesforce/blip-vqa-base"
    """The model of BLIP-VQA: a hub id or a folder."""


if __name__ == "__main__":
    parsed = tyro.cli(Options, description=__doc__)  # before the heavy imports: --help answers at once

import contextlib  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

import attention  # noqa: E402
import config as configuration  # noqa: E402
import diffusion  # noqa: E402
import losses  # noqa: E402
import masks  # noqa: E402
import parallel  # noqa: E402
import prompts as prompt_lists  # noqa: E402
import sample  # noqa: E402
import shapes  # noqa: E402
import vqa  # noqa: E402

KEPT = 8  # first images that score_run returns, for a picture
OTHER = 700_000_001  # added to an image's seed for the base's image with another seed
TIMES = 5  # noise levels at which attention is measured
RESAMPLES, RESAMPLES_FIDELITY = 10_000, 200


@dataclass
class Item:
    """One image to be made and judged, once of the base and once of the tuned model."""
    list: str
    prompt: str
    seed: int


@dataclass
class Scoring:
    """Everything that scoring needs: the run, Options with every blank filled in, the judges. Those not asked for are None."""
    config: object
    pipe: object
    plan: diffusion.Schedule
    scores: tuple
    lists: dict
    images: int
    batch: int
    items: list = field(repr=False)
    captioner: object = None
    tokenizer: object = None
    parser: object = None
    vqa: tuple | None = None
    questions: dict | None = None


# ---------------------------------------------------------------------------------------------------------------------
# The protocol

def plan_scoring(options, config, pipe, plan):
    """Options and a run -> Scoring without judges. Raises ValueError, naming the file or flag and the fix."""
    if min(options.images, options.count, options.batch) < 0:
        raise ValueError("--images, --count, --batch: cannot be negative")
    lists = read_lists(options, config)
    every = [(name, prompt) for name, prompts in lists.items() for prompt in prompts]
    unread = [prompt for _, prompt in every if not shapes.objects_of(prompt)]
    readable = config.resolution == shapes.SIZE and not unread
    scores = options.scores or ("oracle" if readable else "vqa", "caption", "activation", "fidelity")
    if "oracle" in scores and not readable:
        what = f"{unread[0]!r} asks for none of its objects" if unread else f"the images have {config.resolution} pixels"
        raise ValueError(f"--scores oracle: it reads the shapes world only, and {what}; leave it out")
    images = options.images or (10 if "vqa" in scores else 1)
    seed = options.seed if options.seed is not None else 42 if "vqa" in scores else sample.SEED
    items = [Item(name, prompt, seed + (i if images == 1 else k)) for i, (name, prompt) in enumerate(every)
             for k in range(images)]
    return Scoring(config, pipe, plan, tuple(s for s in SCORES if s in scores), {n: len(p) for n, p in lists.items()}, images,
                   options.batch or config.batch, items)


def read_lists(options, config):
    """{name: prompts} of the lists that Options or the run's Config name. Raises ValueError naming the file and the fix."""
    paths = options.prompts or ((Path(config.eval_prompts),) if config.eval_prompts else LISTS)
    for path in paths:
        if not path.is_file():
            fix = "fetch it: python prompts.py" if path in LISTS else "a list of prompts, one a line, is expected"
            raise ValueError(f"{path}: no such file; {fix}")
    lists = {path.stem.removesuffix("_val"): prompt_lists.read(path)[:options.count or config.eval_count] for path in paths}
    if len(lists) < len(paths):
        raise ValueError(f"--prompts: two lists of the same name in {', '.join(map(str, paths))}")
    return lists


def protocol(run, options):
    """What was done, in words and numbers, for results.json and the lines below the table."""
    c, first = run.config, run.items[0].seed
    said = {
        "scores": ", ".join(run.scores), "lists": run.lists, "images_per_prompt": run.images,
        "seeds": f"{first} plus the prompt's place in the list" if run.images == 1 else f"{first} to {first + run.images - 1}",
        "model": c.model, "unet": configuration.parts(c)[0] or c.model,
        "checkpoint": (options.out / "checkpoints" / options.checkpoint).resolve().name,
        "sampler": c.scheduler, "steps": len(run.plan.timesteps), "guidance_scale": c.guidance_scale,
        "resolution": c.resolution, "dtype": c.dtype,
        "intervals": f"95 %, {RESAMPLES} bootstrap resamples of prompts, paired by prompt and seed"}
    if run.captioner:
        said["captioner"] = c.captioner
    if "caption" in run.scores:
        said["caption"] = f"log p(prompt | image) in nats, sum over tokens, after {c.caption_prefix!r}"
    if "activation" in run.scores:
        layers = len(attention.cross_attention_layers(run.pipe.unet, attention.all_blocks(run.pipe.unet)))
        said["activation"] = (f"attention to noun and attribute tokens, mean of {TIMES} noise levels and of all {layers} "
                              f"cross-attention layers; parser {c.parser}")
    if "vqa" in run.scores:
        said["vqa"] = f"{options.vqa} at {vqa.SIZE} px; parser {masks.PARSER}"
    return said


# ---------------------------------------------------------------------------------------------------------------------
# Judging images

def open_judges(run, options, captioner=None, parser=None):
    """Loads the models that the scores need. captioner: (model, tokenizer) if they are loaded already."""
    c, device = run.config, run.pipe.device
    if "activation" in run.scores:
        run.parser = parser or masks.load_parser(c.parser)
    if "vqa" in run.scores:
        nlp = masks.load_parser()  # theirs is the small one, whatever the run's own
        run.vqa = vqa.load(options.vqa, device)
        run.questions = {item.prompt: vqa.questions(item.prompt, nlp) for item in run.items}
    if {"caption", "fidelity"} & set(run.scores):
        run.captioner, run.tokenizer = captioner or losses.load_captioner(c.captioner, device, getattr(torch, c.dtype))


@torch.no_grad()
def score_batch(run, items):
    """Makes and judges a batch of images: {model: rows}, {model: features (B, dim)}, {model: images (B, 3, H, W)} of "base" and
    "tuned"; a row is a dict of one image's scores. Features are also given of "other", the base with other seeds."""
    pipe, c, seeds = run.pipe, run.config, [item.seed for item in items]
    models = {"base": (None, seeds), "tuned": (diffusion.ADAPTER, seeds)}
    if "fidelity" in run.scores:
        models["other"] = None, [seed + OTHER for seed in seeds]
    rows, features, images = {}, {}, {}
    for name, (adapter, own) in models.items():
        z, = sample.latents(pipe, run.plan, [item.prompt for item in items], c.guidance_scale, c.resolution, (adapter,), own,
                            len(items))
        images[name] = sample.decode_all(pipe, z)
        if "fidelity" in run.scores:
            features[name] = image_features(run.captioner, images[name])
        if name != "other":
            with diffusion.adapter(pipe.unet, adapter):
                rows[name] = score_images(run, items, z, images[name])
    images.pop("other", None)
    return rows, features, images


def score_images(run, items, z, images):
    """The rows of one model's images (B, 3, H, W) and latents (B, 4, h, w); its adapter must be the active one."""
    prompts, columns = [item.prompt for item in items], {}
    rows = [shapes.score(image, p) if "oracle" in run.scores else {} for image, p in zip(images, prompts)]
    if "vqa" in run.scores:
        for row, image, item in zip(rows, images, items):
            row[f"blip_vqa_{item.list}"] = vqa.score(*run.vqa, image, run.questions[item.prompt])
    if "caption" in run.scores:
        columns["caption_log_likelihood"] = -losses.caption_loss(run.captioner, run.tokenizer, images.to(run.captioner.device),
                                                                 prompts, run.config.caption_prefix)
    if "activation" in run.scores:
        entities = masks.find_all(prompts, run.parser, run.pipe.tokenizer)
        text, blocks = diffusion.encode(run.pipe, prompts), attention.all_blocks(run.pipe.unet)
        shares = sample.token_activations(run.pipe, run.plan, text, z, blocks, [item.seed for item in items], TIMES)
        columns["entity_activation_percent"] = 100 * sample.entity_activation(shares, entities)
    for key, values in columns.items():
        for row, value in zip(rows, values.tolist()):
            row[key] = value
    return rows


def image_features(captioner, images):
    """The captioner's pooled image features of images (B, 3, H, W) in [0, 1]: (B, dim), float32 on the CPU."""
    pixels = losses.captioner_input(captioner, images.to(captioner.device))
    return captioner.vision_model(pixel_values=pixels).pooler_output.float().cpu()


def score_all(run, process=0, processes=1):
    """score_batch for all items, dealt out to the processes batch by batch. No batch depends on the number of processes, so
    no number does. Returns its three on process 0, with the first KEPT images only, and None on the others."""
    batches = [run.items[i:i + run.batch] for i in range(0, len(run.items), run.batch)]
    done = []  # of images copies: a slice would keep, and send, the whole batch
    for k in tqdm(range(process, len(batches), processes), desc="scoring", disable=process > 0):
        rows, features, images = score_batch(run, batches[k])
        done.append((k, rows, features, {name: x[:max(0, KEPT - k * run.batch)].clone() for name, x in images.items()}))
    done = parallel.gather(done, processes)
    if process > 0:
        return None
    _, rows, features, images = zip(*sorted(done, key=lambda part: part[0]))
    return ({name: [row for part in rows for row in part[name]] for name in rows[0]},
            *({name: torch.cat([part[name] for part in parts]) for name in parts[0]} for parts in (features, images)))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers

def compare(base, tuned):
    """Paired comparison of two tables of scores (lists of dicts, one a prompt): means, difference, 95 % bootstrap interval. A
    score that only some prompts have is compared over these; one that is NaN in one table is left out of that table's mean."""
    results = {"n": len(base), "base": {}, "tuned": {}, "difference": {}, "interval": {}}
    for key in dict.fromkeys(key for row in base for key in row):
        before, after = (torch.tensor([row[key] for row in rows if key in row]) for rows in (base, tuned))
        results["base"][key], results["tuned"][key] = before.nanmean().item(), after.nanmean().item()
        results["difference"][key] = results["tuned"][key] - results["base"][key]
        results["interval"][key] = sample.bootstrap(before, after, RESAMPLES)
    return results


def by_prompt(rows, images):
    """Rows of `images` consecutive images a prompt -> one row a prompt, the mean over its images, NaN left out."""
    def mean(values):
        values = [v for v in values if not math.isnan(v)]
        return sum(values) / len(values) if values else math.nan
    groups = [rows[i:i + images] for i in range(0, len(rows), images)]
    return [{key: mean([row[key] for row in group]) for key in group[0]} for group in groups]


def frechet_distance(x, y):
    """Squared Frechet distance of the Gaussians of two sets of features, (n, dim) and (m, dim) (Heusel et al. 2017, eq. 6):
    |mu_x - mu_y|^2 + tr(S_x) + tr(S_y) - 2 tr((S_x S_y)^1/2).

    With S = R'R, R from the QR decomposition of the centred features, the last trace is the sum of the singular values of
    R_x R_y'. No root of a matrix is taken, so it is exact also where n < dim makes the covariances singular."""
    x, y = x.double(), y.double()
    r, q = (torch.linalg.qr((v - v.mean(0)) / max(len(v) - 1, 1) ** 0.5, mode="r").R for v in (x, y))
    distance = (x.mean(0) - y.mean(0)).square().sum() + r.square().sum() + q.square().sum()
    return (distance - 2 * torch.linalg.matrix_norm(r @ q.T, "nuc")).clamp(min=0).item()


def fidelity(features, images, resamples=RESAMPLES_FIDELITY, seed=0):
    """(distance to "other" of "base", of "tuned", interval of their difference) for features (prompts * images, dim).

    Prompts are resampled. Resampling repeats images, which raises any Frechet distance, so that only the spread is
    taken from it: the interval is the difference +- 1.96 standard deviations."""
    grouped = {name: x.unflatten(0, (-1, images)) for name, x in features.items()}

    def distances(index):
        base, tuned, other = (grouped[name][index].flatten(0, 1) for name in ("base", "tuned", "other"))
        return frechet_distance(base, other), frechet_distance(tuned, other)
    n = len(grouped["base"])
    draws = torch.randint(n, (resamples, n), generator=torch.Generator().manual_seed(seed))
    spread = torch.tensor([tuned - base for base, tuned in map(distances, draws)]).std().item()
    base, tuned = distances(torch.arange(n))
    return base, tuned, [tuned - base - 1.96 * spread, tuned - base + 1.96 * spread]


def summarise(run, rows, features, said):
    """What results.json holds: n prompts; means of base and tuned, their difference and its interval by score; the protocol."""
    results = compare(*(by_prompt(rows[name], run.images) for name in ("base", "tuned")))
    if features:
        base, tuned, interval = fidelity(features, run.images)
        for key, value in (("base", base), ("tuned", tuned), ("difference", tuned - base), ("interval", interval)):
            results[key]["frechet_distance"] = value
        n, dim = features["base"].shape
        said["fidelity"] = (
            f"Frechet distance to the base with other seeds, {n} images of each model, {dim} features"
            + (f" (n <= {dim}: biased upwards, compare at the same n only)" if n <= dim else "")
            + f"; interval: {RESAMPLES_FIDELITY} resamples, +- 1.96 standard deviations"
            + "; of the base: the floor; between base and tuned with the same seeds: "
            + f"{frechet_distance(features['base'], features['tuned']):.4g}")
    return {**results, "protocol": said}


def as_json(value, indent=None):
    """JSON text with null for what is not finite: JSON has no NaN."""
    return json.dumps(json.loads(json.dumps(value), parse_constant=lambda name: None), indent=indent)


def table(results):
    """The results as the lines that are printed: a row a score, then the protocol."""
    lines = [f"{'prompts, n = ' + str(results['n']):<28} {'base':>6}    {'tuned':>6}  difference  95 % interval"]
    for key in results["base"]:
        base, tuned, difference, (low, high) = (results[part][key] for part in ("base", "tuned", "difference", "interval"))
        digits = 4 if 0 < max(abs(base), abs(tuned)) < 0.1 else 3
        lines.append(f"{key.replace('_', ' '):<28} {base:6.{digits}f} -> {tuned:6.{digits}f}  {difference:+10.{digits}f}  "
                     f"[{low:+.{digits}f}, {high:+.{digits}f}]")
    said = {key: value if isinstance(value, str) else json.dumps(value).strip("{}").replace('"', "")
            for key, value in results.get("protocol", {}).items()}
    return "\n".join([*lines, *(f"  {key.replace('_', ' ')}: {value}" for key, value in said.items())])


# ---------------------------------------------------------------------------------------------------------------------
# A run

def set_aside(folder, said):
    """Renames the scores of another protocol in a folder, hours of work perhaps, to results.N.json and scores.N.jsonl."""
    try:
        before = json.loads((folder / "results.json").read_text())["protocol"]
        same = all(before.get(key) == value for key, value in said.items())
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError, AttributeError):  # another program's, or an older version's
        same = False
    if not same:
        number = next(n for n in itertools.count(1) if not (folder / f"results.{n}.json").exists())
        for name, end in ("results", "json"), ("scores", "jsonl"):
            with contextlib.suppress(FileNotFoundError):
                (folder / f"{name}.{end}").rename(folder / f"{name}.{number}.{end}")
        print(f"{folder}: the scores of another protocol are kept as results.{number}.json and scores.{number}.jsonl")


def score_run(config, pipe, plan, options=None, captioner=None, parser=None, process=0, processes=1):
    """Scores the adapter `comat` of a pipeline against its base, prints the table, writes results.json and scores.jsonl.

    options: an Options, by default those of the run's own folder. captioner (model, tokenizer), parser: if they are loaded
    already. Returns (results, prompts, images of the base, images of the tuned model), the last three for the first KEPT
    images, or None on a process but the first. All processes must call it together.
    Raises ValueError, naming the file or flag, for a list or a judge that is not there."""
    options = options or Options(config.out)
    folder = options.to or options.out
    if folder.exists() and not os.access(folder, os.W_OK):  # known before the work, not after
        raise ValueError(f"{folder}: cannot be written; give --to another folder")
    run = plan_scoring(options, config, pipe, plan)
    open_judges(run, options, captioner, parser)
    scored = score_all(run, process, processes)
    if scored is None:
        return None
    if pipe.device.type != "cpu":
        torch.set_num_threads(os.cpu_count() or 1)  # torchrun gave each process one, and the others are done
    rows, features, images = scored
    said = protocol(run, options)
    set_aside(folder, said)
    results = summarise(run, rows, features, said)
    print(table(results))
    lines = [as_json({**vars(item), "model": name, **rows[name][i]}) + "\n" for i, item in enumerate(run.items)
             for name in ("base", "tuned")]
    configuration.write(folder / "scores.jsonl", "".join(lines))
    configuration.write(folder / "results.json", as_json(results, indent=2) + "\n")
    return results, [item.prompt for item in run.items[:KEPT]], images["base"], images["tuned"]


def main(options):
    process, processes = parallel.join(options.device, "gloo", minutes=8 * 60)  # only numbers are exchanged, once
    config, pipe, plan = sample.open_run(options.out, options.checkpoint, device=options.device)
    if pipe.device.type == "cpu":
        torch.set_num_threads(1)  # the last digits depend on it; torchrun does so too. More cores: more processes
    score_run(config, pipe, plan, options, process=process, processes=processes)
    parallel.leave(processes)


if __name__ == "__main__":
    try:
        main(parsed)
    except (ValueError, OSError, parallel.Lost) as error:
        parallel.give_up(f"evaluate.py: {configuration.first_line(error)}")
    except torch.OutOfMemoryError:
        parallel.give_up("evaluate.py: out of the GPU's memory: give a smaller --batch, or use another GPU, or --device cpu")
