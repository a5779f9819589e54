"""Scores a run, a LoRA, a base, training-free methods or finished pictures; compares results.

    python evaluate.py out/shapes                         the run's own held-out prompts
    torchrun --nproc_per_node 2 evaluate.py out/shapes    the same numbers from two CPU cores
    torchrun --nproc_per_node 8 evaluate.py out/sdxl      T2I-CompBench: 900 prompts, 10 images each
    python evaluate.py out/sdxl --count 20 --to out/look  a quick look
    python evaluate.py sdxl --lora me/my-lora:0.8         a preset and any LoRAs, as in sample.py
    python evaluate.py me/my-model --base-only            a base alone: a preset, hub id or folder
    python evaluate.py shapes --method attend-and-excite  a preset without and with a method
    python evaluate.py PICTURES --prompts color_val.txt   pictures of any tool
    python evaluate.py --compare out/a out/b --to out/ab  one table, differences paired

Writes results.json; results.md, which it prints: means, differences to the base, the protocol;
scores.jsonl, a line an image; sheets/, for each score the images that gained and lost most.
The scores (without --scores: oracle, or each list's own of the next three; blip, activation,
fidelity):

    oracle       the shapes world's oracle
    vqa          BLIP-VQA attribute binding as T2I-CompBench computes it
    clip         cosine of CLIP, T2I-CompBench's score of non-spatial relations
    grounding_dino_spatial   its rule for spatial relations, but on GroundingDINO's boxes, not
                 UniDet's: a surrogate, not the benchmark's number
    blip         log p(prompt | image) of the run's captioner, in nats; so any reward of rewards.py
    activation   percent of cross-attention on the tokens of entities (paper, section 3)
    concentration   percent of the attention of nouns, and of attributes, that falls into their own
                 entity's mask, and into others' (paper, section 3.3)
    fidelity     Frechet distance of image features of what finds the nouns (GroundingDINO), which
                 no loss is trained by, to those of --real, and of the base with other seeds (the
                 base's own is the floor)
    fid, clean_fid   the same of Inception's features, by clean-fid

PICTURES holds metadata.jsonl with file_name and text, as of sample.py, or T2I-CompBench's
samples/PROMPT_000000.png.
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from config import PRESETS, Overrides, portable, unet_and_vae

LISTS = tuple(Path(f"data/t2i_compbench/{kind}_val.txt") for kind in ("color", "shape", "texture"))


@dataclass
class Options(Overrides):
    out: tyro.conf.Positional[Path | None] = None
    """Output folder of train.py, a preset, a hub id, or a folder of pictures."""
    checkpoint: str = "latest"
    """Folder name below OUT/checkpoints."""
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """In place of the checkpoint a LoRA, as in sample.py; of several the sum."""
    base_only: bool = False
    """Only the base; needs no checkpoint."""
    method: tuple[str, ...] = ()
    """Training-free methods of baselines/training_free.py, each on each model."""
    compare: tuple[Path, ...] = ()
    """Folders with results.json: one table, differences to the first."""
    scores: tuple[str, ...] = ()
    """Names of scores."""
    prompts: tuple[Path, ...] = ()
    """Prompt lists; empty: the run's --eval-prompts, or T2I-CompBench's; of pictures all."""
    images: int = 0
    """Images per prompt; 0: 10 where T2I-CompBench scores, else 1; of pictures all."""
    count: int = 0
    """The first prompts of each list; 0: the run's --eval-count."""
    real: Path | None = None
    """Folder of real images, for fidelity, fid and clean_fid."""
    to: Path | None = None
    """Folder for the results, of no other protocol; None: OUT, or out/NAME-scores."""
    batch: int = 0
    """Images at a time; 0: the run's --batch. Changes no more than last digits."""
    vqa: str = "Salesforce/blip-vqa-base"
    """Model of the score vqa: a hub id or a folder."""
    clip: str = "openai/clip-vit-base-patch32"
    """Model of the score clip."""
    inception: Path = Path("data")
    """Folder with clean-fid's inception-2015-12-05.pt."""


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)  # before the heavy imports

import json
import os
from collections import Counter
from dataclasses import replace
from functools import partial

import torch
from tqdm import tqdm

import images as imaging
import models
import prompts as prompt_lists
import utils
from baselines import training_free
from scores import judges as judging
from scores import numbers, pictures, report
from scores.judges import Batch, Item, Setup

READING = "captioner caption_prefix".split()
SAMPLING = "model scheduler num_steps guidance_scale resolution dtype parser".split()
WHO = "scores pictures model unet checkpoint lora methods trained_on".split()  # may differ
OTHER = 700_000_001  # added to a seed for the base's image with another seed

# --------------------------------------------------------------------------------------------------
# Planning: all that can be known before models are loaded


def read_lists(options, config, finished):
    """[(name of its list, prompt)]. Raises ValueError naming the file."""
    if finished and not options.prompts:
        name = options.out.resolve().name
        files, *_ = finished.values()
        own = dict.fromkeys(prompt for prompt, _ in files)
        asked = [(name, prompt) for prompt in own]
        return asked[: options.count or None]
    count = options.count or config.eval_count
    paths = options.prompts or LISTS
    if config.eval_prompts and not options.prompts:
        paths = (Path(config.eval_prompts),)
    if paths == LISTS and not LISTS[0].exists():
        raise ValueError(f"{LISTS[0]}: no such file; fetch it: python prompts.py")
    asked = []
    for path in paths:
        name = path.stem.removesuffix("_val")
        asked += [(name, prompt) for prompt in prompt_lists.read(path)[:count]]
    return asked


def choose_scores(options, lists, readable, finished):
    """Names of scores, in order. readable: whether the oracle can read the images; finished:
    whether they are pictures. Raises ValueError for what is nobody's protocol."""
    default = ["oracle"] if readable else [judging.OWN.get(name, "vqa") for name in lists]
    default += ["blip"] if finished else ["blip", "activation", "fidelity"]
    scores = set(options.scores or default)
    features = judging.FEATURES & scores
    if unknown := scores - judging.JUDGES.keys():
        listed = ", ".join(judging.JUDGES)
        raise ValueError(f"--scores {min(unknown)}: unknown, there are {listed}")
    if "oracle" in scores and not readable:
        raise ValueError("--scores oracle: it reads prompts and images of the shapes world only")
    if finished and (unable := judging.OF_LATENTS & scores):
        raise ValueError(f"--scores {min(unable)}: needs a model; pictures have no latents")
    if features and finished and not options.real:
        raise ValueError(f"--scores {min(features)}: of pictures it needs --real FOLDER")
    if options.real and not features:
        raise ValueError("--real: is for --scores fidelity, fid, clean_fid")
    for score in options.scores:
        if wrong := lists.keys() & judging.OTHERS.get(score, ()):
            mend = "without --scores each list gets its own"
            raise ValueError(f"--scores {score}: no protocol for the list {min(wrong)}; {mend}")
    return [name for name in judging.JUDGES if name in scores]


def items_of(options, asked, scores):
    """The Items of [(list, prompt)], to be drawn."""
    images, seed = (10, 42) if judging.COMPBENCH & set(scores) else (1, imaging.SEED)
    images = options.images or images
    items = []
    for place, (name, prompt) in enumerate(asked):
        first = seed + place if images == 1 else seed
        items += [Item(name, prompt, first + k) for k in range(images)]
    return items


def finished_items(options, asked, files):
    """The Items of [(list, prompt)] among pictures {(prompt, number): file}. Raises ValueError."""
    there = Counter(prompt for prompt, _ in files)
    _, first = asked[0]
    images = options.images or there[first] or 1
    items = []
    for name, prompt in asked:
        if there[prompt] < images:
            raise ValueError(f"{options.out}: not {images} pictures of {prompt!r}")
        items += [Item(name, prompt, number) for number in range(images)]
    return items


def trained_on(items, config):
    """How many of the prompts are in the run's training list, as prompts.normalise sees them."""
    if not Path(config.prompts).is_file():
        return f"not known: there is no {config.prompts}"
    trained = set(map(prompt_lists.normalise, prompt_lists.read(config.prompts)))
    asked = {prompt_lists.normalise(item.prompt) for item in items}
    shared = f"{len(asked & trained)} of these {len(asked)} prompts, in {portable(config.prompts)}"
    return f"{shared} (case, spaces, quotes and final stops aside)"


def protocol_of(options, config, items):
    """What makes the images of a model."""
    unet, _ = unet_and_vae(config)
    trained = not (options.base_only or options.lora)
    checkpoint = options.out / "checkpoints" / options.checkpoint
    return {
        **{name: portable(getattr(config, name)) for name in SAMPLING},
        "unet": portable(unet or config.model),
        "seeds": f"{items[0].seed} to {items[-1].seed}",
        "checkpoint": checkpoint.resolve().name if trained else "none",
        "lora": options.lora,
        "methods": {name: training_free.METHODS[name].keywords for name in options.method},
        "trained_on": trained_on(items, config) if trained else "not known",
    }


def plan_scoring(options, config, oracle, finished=None):
    """(Items, protocol). finished: what pictures.find returns. Raises ValueError naming the file or
    flag."""
    training_free.check(options.method)
    if min(options.images, options.count, options.batch) < 0:
        raise ValueError("--images, --count, --batch: cannot be negative")
    asked = read_lists(options, config, finished)
    lists = Counter(name for name, _ in asked)
    of_the_world = all(oracle.objects_of(prompt) for _, prompt in asked)
    readable = of_the_world and config.resolution == oracle.SIZE
    scores = choose_scores(options, lists, readable, bool(finished))
    if finished:
        files, *_ = finished.values()
        items = finished_items(options, asked, files)
    else:
        items = items_of(options, asked, scores)
    judging.check(scores, items, options.inception)
    sam = config.segmenter == "grounded-sam"
    finders = [config.dino, config.sam] if sam else [config.segmenter]
    models_of = vars(config) | {
        "vqa": options.vqa,
        "grounding_dino_spatial": config.dino,
        "fidelity": finders[0],
        "concentration": ", ".join(map(portable, finders)),
    }
    protocol = {
        "scores": scores,
        "prompts": lists,
        "prompts_hash": imaging.short_hash(repr(asked)),
        "images_per_prompt": len(items) // len(asked),
        "intervals": f"95 %, {numbers.RESAMPLES} bootstrap resamples of prompts, paired",
        **{name: portable(models_of[name]) for name in (*READING, *scores) if name in models_of},
    }
    if options.real:
        count = len(pictures.find_real(options.real))
        protocol["real"] = f"{count} in {portable(options.real)}"
    if finished:
        protocol["pictures"] = portable(options.out)
    else:
        protocol |= protocol_of(options, config, items)
    return items, json.loads(report.as_json(protocol))


def folder_of(options, protocol):
    """Where the results go. Raises ValueError if they cannot."""
    is_base = "pictures" not in protocol and not (options.out / "config.json").is_file()
    folder = options.to or (Path(f"out/{options.out}-scores") if is_base else options.out)
    utils.check_writable("--to", folder)
    results = folder / "results.json"
    if results.exists() and json.loads(results.read_text())["protocol"] != protocol:
        raise ValueError(f"{results}: of another protocol; give --to another folder")
    return folder


# --------------------------------------------------------------------------------------------------
# Scoring: draw(items) -> Batch


def draw_model(setup, adapter, sampler, items):
    """Images that a model makes, rounded to the 8 bits of a PNG file."""
    config, pipe = setup.config, setup.pipe
    prompts, seeds = [item.prompt for item in items], [item.seed for item in items]
    drawing = config.guidance_scale, config.resolution, [adapter], seeds, setup.batch
    (z,) = imaging.latents(pipe, setup.plan, prompts, *drawing, sampler=sampler)
    images = (255 * imaging.decode_all(pipe, z)).round() / 255
    return Batch(items, images, z, adapter)


def judge_all(setup, judges, items, draw, label, batch):
    """The rows of all items, on every rank. Batches are dealt out whole, so that no number depends
    on world_size."""
    rank, world_size = setup.ranks
    judged = []
    for start in tqdm(range(0, len(items), batch)[rank::world_size], desc=label, disable=rank > 0):
        rows = judging.judge(judges, draw(items[start : start + batch]))
        judged += enumerate(rows, start)
    judged = utils.gather(judged, world_size)
    return [row for _, row in sorted(judged, key=lambda pair: pair[0])]


def references_of(setup, judges, items, sides):
    """{name: features} of what images are compared with: the base's with other seeds, real ones."""
    judges = {name: judge for name, judge in judges.items() if name in judging.FEATURES}
    references = {}
    if judges and setup.pipe:
        others = [item._replace(seed=item.seed + OTHER) for item in items]
        label = "base, other seeds"
        references["base"] = judge_all(setup, judges, others, sides["base"], label, setup.batch)
    if setup.options.real:
        files = pictures.find_real(setup.options.real)
        real = [Item("real", *key) for key in files]
        draw = partial(pictures.draw, files)
        references["real"] = judge_all(setup, judges, real, draw, "real", batch=1)
    return references


def evaluate(setup, items, protocol, folder, finished=None):
    """Scores the base, the adapter `comat` if there is one, and both with each method, or pictures;
    all ranks together. Rank 0 writes the files and prints the table."""
    options = setup.options
    judges = {score: judging.JUDGES[score](setup) for score in protocol["scores"]}
    if finished:
        sides = {side: partial(pictures.draw, files) for side, files in finished.items()}
    else:
        adapters = models.adapters_of(options.base_only)
        made = training_free.sides(adapters, options.method, setup.config.parser)
        sides = {side: partial(draw_model, setup, *how) for side, how in made.items()}
    judged = {}
    for side, draw in sides.items():
        judged[side] = judge_all(setup, judges, items, draw, side, setup.batch)
    references = references_of(setup, judges, items, sides)
    if setup.ranks[0] > 0:
        return
    images = protocol["images_per_prompt"]
    scores = numbers.summarise(judged, images, references)
    results = {"n": len(items) // images, "sides": scores, "protocol": protocol}
    utils.write(folder / "scores.jsonl", report.as_lines(judged))
    report.write(results, folder / "results")

    def redraw(side, indices):
        return sides[side]([items[i] for i in indices]).images

    report.write_sheets(judged, redraw, folder / "sheets")


# --------------------------------------------------------------------------------------------------
# The command


def compare(options):
    """One table of the images' scores of several results, differences to the first side of the
    first. A base that scores as the first one is not shown again."""
    first, base, judged = {}, [], {}
    for folder in options.compare:
        results, rows = report.read(folder)
        own = {key: value for key, value in results["protocol"].items() if key not in WHO}
        first = first or own
        both = {key: value for key, value in own.items() if key in first}
        if different := utils.differences(both, first):
            raise ValueError(f"--compare {folder}: another protocol (its, the first): {different}")
        for side, of_side in rows.items():
            if side != "base" or not numbers.alike(base, of_side):
                judged[f"{folder.name}: {side}"] = of_side
        base = base or next(iter(judged.values()))
    scores = numbers.summarise(judged, first["images_per_prompt"])
    table = {"n": results["n"], "sides": scores, "protocol": first}
    report.write(table, options.to and options.to / "compare")


def main(options):
    from shapes import world

    if options.compare:
        return compare(options)
    if not options.out:
        raise ValueError("give a PATH to score: a run, a preset, a hub id, pictures; or --compare")
    base_only = options.base_only or (str(options.out) in PRESETS and not options.lora)
    options = replace(options, base_only=base_only)
    source = options.out, options.checkpoint, options.lora, base_only
    is_run = (options.out / "config.json").is_file()
    finished = {} if is_run else pictures.find(options.out)
    if finished:
        source = pictures.preset_of(finished, world), "latest", (), True
    config, *adapter = models.read_run(*source, **options.overrides())
    config = replace(config, clip=options.clip)
    items, protocol = plan_scoring(options, config, world, finished)
    folder = folder_of(options, protocol)
    setup = Setup(options, config, utils.choose_device(config), world)
    if not finished:
        setup.pipe, setup.plan = models.load_run(config, *adapter)
    setup.ranks = utils.join(setup.device, minutes=8 * 60)  # they meet at the end only
    on_cpu = setup.device.type == "cpu"  # there last digits depend on the number of threads
    torch.set_num_threads(1 if on_cpu else os.cpu_count())
    evaluate(setup, items, protocol, folder, finished)
    utils.leave(setup.ranks[1])


if __name__ == "__main__":
    with utils.one_line_errors("evaluate.py"):
        main(options)
