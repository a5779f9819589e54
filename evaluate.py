"""Scores a run: base against tuned, and training-free methods, from the same noise.

    python evaluate.py out/shapes                         the run's own held-out prompts
    torchrun --nproc_per_node 2 evaluate.py out/shapes    the same numbers from two CPU cores
    torchrun --nproc_per_node 8 evaluate.py out/sdxl      T2I-CompBench: 900 prompts, 10 images each
    python evaluate.py out/sdxl --count 20 --to out/look  a quick look
    python evaluate.py out/shapes --method structured     also both with a training-free method
    python evaluate.py shapes --method attend-and-excite  a preset: the base without and with it

prints means, intervals of the differences to the base, and the protocol; writes results.json and
scores.jsonl (one line an image). The scores (without --scores: all, but oracle for prompts of the
shapes world and vqa for others):

    oracle       the shapes world's oracle
    vqa          BLIP-VQA attribute binding as T2I-CompBench computes it, a row for each list
    blip         log p(prompt | image) of the run's captioner, in nats; so any reward of rewards.py
    activation   percent of cross-attention on the tokens of entities (paper, section 3)
    fidelity     Frechet distance of the captioner's image features to those of the base with
                 other seeds; that of the base itself is the floor
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import tyro

from config import PRESETS, Overrides, portable, unet_and_vae

LISTS = tuple(Path(f"data/t2i_compbench/{kind}_val.txt") for kind in ("color", "shape", "texture"))


@dataclass
class Options(Overrides):
    out: tyro.conf.Positional[Path]
    """Output folder of train.py, or a preset's name for its base alone."""
    checkpoint: str = "latest"
    """Folder name below OUT/checkpoints."""
    base_only: bool = False
    """Only the base; needs no checkpoint."""
    method: tuple[str, ...] = ()
    """Training-free methods of baselines/training_free.py, each on each model."""
    scores: tuple[str, ...] = ()
    """oracle, vqa, activation, fidelity, and names of rewards."""
    prompts: tuple[Path, ...] = ()
    """Prompt lists; empty: the run's --eval-prompts, else T2I-CompBench's three lists."""
    images: int = 0
    """Images per prompt; 0: 10 with vqa (T2I-CompBench), else 1."""
    count: int = 0
    """The first prompts of each list; 0: the run's --eval-count."""
    to: Path | None = None
    """Folder for the results; None: OUT, for a preset out/NAME-scores. It may not hold results of
    another protocol."""
    batch: int = 0
    """Images at a time; 0: the run's --batch. Changes no more than last digits."""
    vqa: str = "Salesforce/blip-vqa-base"
    """Model of the score vqa: a hub id or a folder."""


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)  # before the heavy imports

import json
import os
import re
from collections import Counter
from functools import cache, partial

import torch
import torchvision.transforms.functional as TF
from tqdm import tqdm
from transformers import BlipForQuestionAnswering

import attention
import diffusion
import entities
import images as imaging
import models
import prompts
import rewards
import utils
from baselines import training_free

SETTINGS = (
    "model scheduler num_steps guidance_scale resolution dtype captioner caption_prefix parser"
)
OTHER = 700_000_001  # added to a seed for the base's image with another seed
RESAMPLES, RESAMPLES_FRECHET = 10_000, 200


class Items(NamedTuple):
    """Images to be made and judged."""

    lists: list[str]  # names of the lists that the prompts are from
    prompts: list[str]
    seeds: list[int]

    def part(self, chosen):
        return Items(*(column[chosen] for column in self))


@dataclass(eq=False)
class Setup:
    """What is scored. oracle: shapes/world.py, or what has its SIZE, objects_of and score."""

    options: Options
    config: object
    pipe: object
    plan: object
    oracle: object


# --------------------------------------------------------------------------------------------------
# Judges: judge(setup, Items of a batch, images (B, 3, H, W) in [0, 1], latents z (B, 4, h, w)) ->
# {column: value} for each image; the adapter that made them is active


def judge_oracle(setup, items, images, z):
    return list(map(setup.oracle.score, images, items.prompts))


@cache
def load_reward(setup, name):
    config = replace(setup.config, caption_reduction="sum", label_smoothing=0.0)
    return rewards.REWARDS[name](config, setup.pipe.device)


def judge_reward(setup, items, images, z, name):
    reward = load_reward(setup, name)
    values = reward(images.to(setup.pipe.device), items.prompts)
    column = "caption_log_likelihood" if name == "blip" else name
    return [{column: value} for value in values.tolist()]


def judge_features(setup, items, images, z):
    """The captioner's image features, for `fidelity`."""
    captioner = load_reward(setup, "blip")
    features = captioner.features(images.to(setup.pipe.device))
    return [{"features": row.clone()} for row in features.cpu()]  # a view would be sent whole


def judge_activation(setup, items, images, z):
    """Mean share of attention on the tokens of entities (paper, section 3), in percent."""
    pipe = setup.pipe
    parser = entities.load_parser(setup.config.parser)
    named = entities.find_all(items.prompts, parser, pipe.tokenizer)
    blocks = attention.all_blocks(pipe.unet)
    text = diffusion.encode(pipe, items.prompts)
    shares = imaging.token_activations(pipe, setup.plan, text, z, blocks, items.seeds)
    percent = 100 * attention.entity_activation(shares, named)
    return [{"entity_activation_percent": value} for value in percent.tolist()]


ENC, DEC, YES, NO = 30523, 30522, 2748, 2053  # BLIP-VQA: first tokens of question, answer; answers
PLACES = ("top", "the side", "the left", "the right")  # noun phrases of no thing
load_vqa = cache(partial(models.load_blip_model, "vqa", BlipForQuestionAnswering, tolerated=0))


def judge_vqa(setup, items, images, z):
    """T2I-CompBench's attribute binding (Huang et al. 2023, section 4.1): the product of p(yes) for
    the questions "a red car?", one a noun phrase.

    As their BLIPvqa_eval (Karine-Huang/T2I-CompBench, commit bfe6300), in float32, but nothing is
    rounded to 4 decimals, transformers' position embeddings (384 px) are interpolated back to 480,
    and the parser is a newer en_core_web_sm."""
    model, tokenizer = load_vqa(setup.options.vqa, setup.pipe.device, torch.float32)
    rows = []
    for name, prompt, image in zip(items.lists, items.prompts, images):
        questions = vqa_questions(prompt)
        p = vqa_probabilities(model, tokenizer, image, questions)
        rows.append({f"blip_vqa_{name}": p.prod().item()})
    return rows


def vqa_questions(prompt):
    """A prompt's first 8 noun phrases, but for places, as questions in BLIP's spelling."""
    parse = entities.load_parser()
    phrases = [chunk.text for chunk in parse(prompt).noun_chunks]
    asked = [f"{phrase}?".lower() for phrase in phrases if phrase not in PLACES]
    return [re.sub(r'[.!"()*#:;~]', "", question) for question in asked[:8]]


@utils.without_tf32()
def vqa_probabilities(model, tokenizer, image, questions):
    """p(yes) / (p(yes) + p(no)) of questions about one image (3, H, W): (questions,)."""
    if not questions:
        return torch.ones(0)
    image = imaging.to_pil(image)  # 8 bits, as in the PNG files that they score
    image = TF.resize(image, [480, 480], TF.InterpolationMode.BICUBIC)
    pixels = TF.to_tensor(image)[None].to(model.device)
    pixels = TF.normalize(pixels, rewards.CLIP_MEAN, rewards.CLIP_STD)
    how = {"padding": True, "truncation": True, "max_length": 35, "return_tensors": "pt"}
    text = tokenizer(questions, **how).to(model.device)
    ids, mask = text.input_ids, text.attention_mask
    ids[:, 0] = ENC  # transformers' own processor leaves [CLS]
    seen = model.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
    seen = seen.expand(len(questions), -1, -1)
    read = model.text_encoder(ids, mask, encoder_hidden_states=seen).last_hidden_state
    context = {"encoder_hidden_states": read, "encoder_attention_mask": mask}
    start = torch.full_like(ids[:, :1], DEC)
    logits = model.text_decoder(start, **context).logits[:, 0]
    answers = logits[:, [YES, NO]].softmax(-1)
    return answers[:, 0]


JUDGES = {
    "oracle": judge_oracle,
    "vqa": judge_vqa,
    **{name: partial(judge_reward, name=name) for name in rewards.REWARDS},
    "activation": judge_activation,
    "fidelity": judge_features,
}


@torch.no_grad()
def judge_all(setup, judges, items, side, rank, world_size, label="base, other seeds"):
    """Makes and judges images of a side (adapter, sampler): a row {column: value} for each, on
    every rank. Batches are dealt out whole, so that no number depends on world_size."""
    config = setup.config
    pipe = setup.pipe
    adapter, sampler = side
    batch = setup.options.batch or config.batch
    starts = range(rank * batch, len(items.prompts), world_size * batch)
    judged = []
    for start in tqdm(starts, desc=label, disable=rank > 0):
        part = items.part(slice(start, start + batch))
        drawing = config.guidance_scale, config.resolution, [adapter], part.seeds, batch
        (z,) = imaging.latents(pipe, setup.plan, part.prompts, *drawing, sampler=sampler)
        images = imaging.decode_all(pipe, z)
        rows = [{} for _ in part.prompts]
        with models.using(pipe, adapter):
            for judge in judges:
                values = judge(setup, part, images, z)
                for row, scores in zip(rows, values):
                    row.update(scores)
        judged += enumerate(rows, start)
    judged = utils.gather(judged, world_size)
    return [row for _, row in sorted(judged)]


# --------------------------------------------------------------------------------------------------
# Numbers


def entry(mean, base, interval):
    """What results.json holds of a side's score."""
    return {"mean": mean, "difference": mean - base, "interval": interval}


def compare(sides):
    """{side: entry} for scores {side: (runs, prompts)}, NaN left out: differences to the first side
    with 95 % intervals, percentiles over resamples of runs and of prompts, the same for all."""
    scores = list(sides.values())
    runs, prompts = scores[0].shape
    generator = torch.Generator().manual_seed(0)
    columns = torch.randint(prompts, (RESAMPLES, 1, prompts), generator=generator)
    rows = torch.randint(runs, (RESAMPLES, runs, 1), generator=generator)
    ends = torch.tensor([0.025, 0.975])
    means = [values.nanmean().item() for values in scores]
    resampled = [values[rows, columns].nanmean((1, 2)) for values in scores]
    entries = {}
    for side, mean, own in zip(sides, means, resampled):
        differences = own - resampled[0]
        interval = differences.nanquantile(ends).tolist()
        entries[side] = entry(mean, means[0], interval)
    return entries


def gaussian(features):
    """(mean, R) of features (n, dim); R'R is their covariance, R is from a QR decomposition."""
    mean = features.mean(0)
    r = torch.linalg.qr(features - mean, mode="r").R
    degrees = max(len(features) - 1, 1)
    return mean, r / degrees**0.5


def frechet_distance(x, y):
    """Squared Frechet distance of the Gaussians of features (n, dim) and (m, dim) (Heusel et al.
    2017, eq. 6): |mu_x - mu_y|^2 + tr(S_x) + tr(S_y) - 2 tr((S_x S_y)^1/2).

    With S = R'R the last trace is the sum of the singular values of R_x R_y'. No root of a matrix:
    exact even where n < dim."""
    mu_x, r_x = gaussian(x.double())
    mu_y, r_y = gaussian(y.double())
    shift = (mu_x - mu_y).square().sum()
    traces = r_x.square().sum() + r_y.square().sum()
    common = torch.linalg.matrix_norm(r_x @ r_y.T, "nuc")
    distance = shift + traces - 2 * common
    return distance.clamp(min=0).item()


def fidelity(sides, other):
    """{side: entry} of the distances to `other` for features {side: (prompts, images, dim)}.
    Resampled prompts repeat images, which raises any Frechet distance: only the spread is taken
    from them, and the interval is +- 1.96 standard deviations."""
    count = len(other)
    generator = torch.Generator().manual_seed(0)
    resamples = torch.randint(count, (RESAMPLES_FRECHET, count), generator=generator)
    draws = [torch.arange(count), *resamples]
    distances = []
    for features in sides.values():
        pairs = [(features[drawn].flatten(0, 1), other[drawn].flatten(0, 1)) for drawn in draws]
        distances.append(torch.tensor([frechet_distance(*pair) for pair in pairs]))
    entries = []
    for own in distances:
        difference, *resampled = own - distances[0]
        spread = 1.96 * torch.stack(resampled).std()
        interval = [(difference - spread).item(), (difference + spread).item()]
        entries.append(entry(own[0].item(), distances[0][0].item(), interval))
    return dict(zip(sides, entries))


def summarise(judged, other=(), images=1):
    """{side: {column: entry}} from the rows of each side, `images` consecutive ones a prompt. A
    column that only some rows have is compared over these."""

    def values_of(column, rows):
        values = [torch.as_tensor(row[column]) for row in rows if column in row]
        return torch.stack(values).unflatten(0, (-1, images))

    columns = {}
    for row in next(iter(judged.values())):
        columns |= row
    results = {side: {} for side in judged}
    for column in columns:
        values = {side: values_of(column, rows) for side, rows in judged.items()}
        if column == "features":
            column = "frechet_distance"
            entries = fidelity(values, values_of("features", other))
        else:
            entries = compare({side: scores.nanmean(1)[None] for side, scores in values.items()})
        for side, found in entries.items():
            results[side][column] = found
    return results


# --------------------------------------------------------------------------------------------------
# The command


def read_lists(options, config):
    """[(name of its list, prompt)]. Raises ValueError naming the file."""
    paths = options.prompts or LISTS
    if config.eval_prompts and not options.prompts:
        paths = (Path(config.eval_prompts),)
    if paths == LISTS and not LISTS[0].exists():
        raise ValueError(f"{LISTS[0]}: no such file; fetch it: python prompts.py")
    count = options.count or config.eval_count
    asked = []
    for path in paths:
        name = path.stem.removesuffix("_val")
        asked += [(name, prompt) for prompt in prompts.read(path)[:count]]
    return asked


def choose_scores(options, readable):
    """Names of JUDGES in their order. readable: whether the oracle can read the images."""
    default = ["oracle" if readable else "vqa", "blip", "activation", "fidelity"]
    scores = options.scores or default
    if unknown := set(scores) - set(JUDGES):
        raise ValueError(f"--scores {min(unknown)}: unknown, there are {', '.join(JUDGES)}")
    if "oracle" in scores and not readable:
        raise ValueError("--scores oracle: it reads prompts and images of the shapes world only")
    return [name for name in JUDGES if name in scores]


def plan_scoring(options, config, oracle):
    """(Items, protocol). Raises ValueError naming the file or flag."""
    training_free.check(options.method)
    if min(options.images, options.count, options.batch) < 0:
        raise ValueError("--images, --count, --batch: cannot be negative")
    asked = read_lists(options, config)
    of_the_world = all(oracle.objects_of(prompt) for _, prompt in asked)
    scores = choose_scores(options, of_the_world and config.resolution == oracle.SIZE)
    images, seed = (10, 42) if "vqa" in scores else (1, imaging.SEED)
    images = options.images or images
    items = Items([], [], [])
    for place, (name, prompt) in enumerate(asked):
        first = seed + place if images == 1 else seed
        items.lists.extend([name] * images)
        items.prompts.extend([prompt] * images)
        items.seeds.extend(range(first, first + images))
    checkpoint = options.out / "checkpoints" / options.checkpoint
    unet, _ = unet_and_vae(config)
    protocol = {
        "scores": scores,
        "prompts": dict(Counter(name for name, _ in asked)),
        "images_per_prompt": images,
        "seeds": f"{seed} to {items.seeds[-1]}",
        "checkpoint": "none" if options.base_only else checkpoint.resolve().name,
        "methods": {name: training_free.METHODS[name].keywords for name in options.method},
        **{name: portable(getattr(config, name)) for name in SETTINGS.split()},
        "unet": portable(unet or config.model),
        "vqa": portable(options.vqa),
        "intervals": f"95 %, {RESAMPLES} bootstrap resamples of prompts, paired by prompt and seed",
    }
    return items, protocol


def as_json(value, indent=None):
    """JSON text with null for NaN: JSON has none."""
    value = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(value, indent=indent) + "\n"


def show(results):
    """Prints a line for each score and side, then the protocol."""
    sides = results["sides"]
    width = max(map(len, sides))
    title = f"prompts, n = {results['n']}"
    print(f"{title:<27} {'':<{width}}      mean  difference  95 % interval")
    for column in next(iter(sides.values())):
        for side, scores in sides.items():
            mean, difference, (low, high) = scores[column].values()
            numbers = f"{mean:9.4f} {difference:+11.4f}  [{low:+.4f}, {high:+.4f}]"
            print(f"{column:<27} {side:<{width}} {numbers}")
    for key, value in results["protocol"].items():
        print(f"  {key}: {value}")


def as_lines(items, judged):
    """scores.jsonl: the sides of an image one after another."""
    lines = []
    for i, (name, prompt, seed) in enumerate(zip(*items)):
        for side, rows in judged.items():
            row = {"list": name, "prompt": prompt, "seed": seed, "side": side, **rows[i]}
            row.pop("features", None)
            lines.append(as_json(row))
    return "".join(lines)


def evaluate(setup, rank=0, world_size=1):
    """Scores the base, the adapter `comat` if there is one, and both with each method, all ranks
    together. Rank 0 prints the table and writes the files."""
    options = setup.options
    is_preset = str(options.out) in PRESETS
    folder = options.to or (Path(f"out/{options.out}-scores") if is_preset else options.out)
    items, protocol = plan_scoring(options, setup.config, setup.oracle)
    protocol = json.loads(as_json(protocol))
    utils.check_writable("--to", folder)  # known before the work, not after
    results = folder / "results.json"
    if results.exists() and json.loads(results.read_text())["protocol"] != protocol:
        raise ValueError(f"{results}: of another protocol; give --to another folder")
    judges = [JUDGES[name] for name in protocol["scores"]]
    adapters = {"base": None} if options.base_only else {"base": None, "tuned": diffusion.ADAPTER}
    sides = training_free.sides(adapters, options.method, setup.config.parser)
    judged, other = {}, []
    for label, side in sides.items():
        judged[label] = judge_all(setup, judges, items, side, rank, world_size, label)
    if judge_features in judges:
        others = items._replace(seeds=[seed + OTHER for seed in items.seeds])
        other = judge_all(setup, [judge_features], others, sides["base"], rank, world_size)
    if rank > 0:
        return
    utils.write(folder / "scores.jsonl", as_lines(items, judged))
    images = protocol["images_per_prompt"]
    scores = summarise(judged, other, images)
    summary = {"n": len(items.prompts) // images, "sides": scores, "protocol": protocol}
    utils.write(results, as_json(summary, indent=2))
    show(summary)


def main(options):
    from shapes import world

    options = replace(options, base_only=options.base_only or str(options.out) in PRESETS)
    source = options.checkpoint, (), options.base_only
    run = models.open_run(options.out, *source, **options.overrides())
    setup = Setup(options, *run, world)
    rank, world_size = utils.join(setup.pipe.device, minutes=8 * 60)  # they meet at the end only
    on_cpu = setup.pipe.device.type == "cpu"  # there last digits depend on the number of threads
    torch.set_num_threads(1 if on_cpu else os.cpu_count())
    evaluate(setup, rank, world_size)
    utils.leave(world_size)


if __name__ == "__main__":
    with utils.one_line_errors("evaluate.py"):
        main(options)
