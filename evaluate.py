"""Scores a run: base against tuned, from the same noise, by several judges.

    python evaluate.py out/shapes                         the run's own held-out prompts
    torchrun --nproc_per_node 2 evaluate.py out/shapes    the same numbers from two CPU cores
    torchrun --nproc_per_node 8 evaluate.py out/sdxl      T2I-CompBench: 900 prompts, 10 images each
    python evaluate.py out/sdxl --count 20 --images 2     a quick look

prints the means, the interval of their difference, and the protocol; writes results.json,
scores.jsonl (one line an image) and before_after.png. The scores (without --scores: all, but oracle
for prompts of the shapes world and vqa for others):

    oracle       the shapes world's oracle
    vqa          BLIP-VQA attribute binding as T2I-CompBench computes it, a row for each list
    blip         log p(prompt | image) of the run's captioner, summed over tokens, in nats; so
                 every reward of rewards.py, by its name
    activation   percent of cross-attention on the tokens of entities (paper, section 3)
    fidelity     Frechet distance of the captioner's image features to those of the base with
                 other seeds; that of the base itself is the floor
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

LISTS = tuple(Path(f"data/t2i_compbench/{kind}_val.txt") for kind in ("color", "shape", "texture"))


@dataclass
class Options:
    """What is scored, and how. Empty values depend on the run."""

    out: tyro.conf.Positional[Path]
    """Output folder of train.py."""
    checkpoint: str = "latest"
    """Folder name below OUT/checkpoints."""
    scores: tuple[str, ...] = ()
    """oracle, vqa, activation, fidelity, and names of rewards."""
    prompts: tuple[Path, ...] = ()
    """Prompt lists; empty: the run's --eval-prompts, else T2I-CompBench's three lists."""
    images: int = 0
    """Images per prompt; 0: 10 with vqa (T2I-CompBench), else 1."""
    count: int = 0
    """The first prompts of each list; 0: the run's --eval-count."""
    seed: int | None = None
    """Of the first image; None: 42 with vqa (T2I-CompBench), else 1000000007."""
    to: Path | None = None
    """Folder for the results; None: OUT. Results of another protocol in it are renamed."""
    batch: int = 0
    """Images at a time; 0: the run's --batch. Changes no more than last digits."""
    device: Literal["", "auto", "cuda", "cpu"] = ""
    """Empty: the run's."""
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
from config import unet_and_vae

SETTINGS = (
    "model scheduler num_steps guidance_scale resolution dtype captioner caption_prefix parser"
)
PARTS = "base", "tuned", "difference", "interval"
SIDES = {"base": None, "tuned": diffusion.ADAPTER}
SHOWN = 8  # prompts in before_after.png
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

    def latents(self, items, adapters):
        """Finished latents (B, 4, h, w) of the items, for each adapter."""
        c = self.config
        settings = {"adapters": adapters, "seeds": items.seeds, "batch": len(items.seeds)}
        return imaging.latents(
            self.pipe, self.plan, items.prompts, c.guidance_scale, c.resolution, **settings
        )


# --------------------------------------------------------------------------------------------------
# Judges: judge(setup, Items of a batch, images (B, 3, H, W) in [0, 1], latents z (B, 4, h, w), the
# adapter that made them) -> {column: value} for each image


def judge_oracle(setup, items, images, z, adapter):
    return [setup.oracle.score(image, prompt) for image, prompt in zip(images, items.prompts)]


@cache
def load_reward(setup, name):
    config = replace(setup.config, caption_reduction="sum", label_smoothing=0.0)
    return rewards.REWARDS[name](config, setup.pipe.device)


def judge_reward(setup, items, images, z, adapter, name):
    values = load_reward(setup, name)(images.to(setup.pipe.device), items.prompts)
    column = "caption_log_likelihood" if name == "blip" else name
    return [{column: value} for value in values.tolist()]


def judge_features(setup, items, images, z, adapter):
    """The captioner's image features, for `fidelity`."""
    features = load_reward(setup, "blip").features(images.to(setup.pipe.device)).cpu()
    return [{"features": row.clone()} for row in features]  # a view would be sent with all rows


def judge_activation(setup, items, images, z, adapter):
    """Mean share of attention on the tokens of entities (paper, section 3), in percent."""
    pipe, parser = setup.pipe, entities.load_parser(setup.config.parser)
    blocks = attention.all_blocks(pipe.unet)
    with models.using(pipe, adapter):
        text = diffusion.encode(pipe, items.prompts)
        tokens = imaging.token_activations(pipe, setup.plan, text, z, blocks, items.seeds)
    named = entities.find_all(items.prompts, parser, pipe.tokenizer)
    shares = 100 * attention.entity_activation(tokens, named)
    return [{"entity_activation_percent": share} for share in shares.tolist()]


ENC, DEC, YES, NO = 30523, 30522, 2748, 2053  # BLIP-VQA: first tokens of question, answer; answers
load_vqa = cache(partial(models.load_blip_model, "vqa", BlipForQuestionAnswering, tolerated=0))


def judge_vqa(setup, items, images, z, adapter):
    """T2I-CompBench's attribute binding (Huang et al. 2023, section 4.1): the product of p(yes) for
    the questions "a red car?", one a noun phrase.

    As their BLIPvqa_eval (Karine-Huang/T2I-CompBench, commit bfe6300), in float32, but nothing is
    rounded to 4 decimals, transformers' position embeddings (384 px) are interpolated back to 480,
    and the parser is a newer en_core_web_sm."""
    loaded, rows = load_vqa(setup.options.vqa, setup.pipe.device, torch.float32), []
    for name, prompt, image in zip(items.lists, items.prompts, images):
        p = vqa_probabilities(*loaded, image, vqa_questions(prompt))
        rows.append({f"blip_vqa_{name}": p.prod().item()})
    return rows


def vqa_questions(prompt):
    """A prompt's first 8 noun phrases, but for places, as questions in BLIP's spelling."""
    phrases = [chunk.text for chunk in entities.load_parser()(prompt).noun_chunks]
    asked = [p for p in phrases if p not in ("top", "the side", "the left", "the right")][:8]
    return [re.sub(r'[.!"()*#:;~]', "", f"{phrase}?".lower()) for phrase in asked]


def vqa_probabilities(model, tokenizer, image, questions):
    """p(yes) / (p(yes) + p(no)) of questions about one image (3, H, W): (questions,)."""
    if not questions:
        return torch.ones(0)
    image = imaging.to_pil(image)  # 8 bits, as in the PNG files that they score
    image = TF.resize(image, [480, 480], TF.InterpolationMode.BICUBIC)
    pixels = TF.normalize(TF.to_tensor(image), rewards.CLIP_MEAN, rewards.CLIP_STD)
    pixels = pixels[None].to(model.device)
    cut = {"padding": True, "truncation": True, "max_length": 35}
    text = tokenizer(questions, return_tensors="pt", **cut).to(model.device)
    ids, mask = text.input_ids, text.attention_mask
    ids[:, 0] = ENC  # transformers' own processor leaves [CLS]
    seen = model.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
    seen = seen.expand(len(questions), -1, -1)
    read = model.text_encoder(ids, mask, encoder_hidden_states=seen).last_hidden_state
    context = {"encoder_hidden_states": read, "encoder_attention_mask": mask}
    start = torch.full_like(ids[:, :1], DEC)
    logits = model.text_decoder(start, **context).logits[:, 0]
    return logits[:, [YES, NO]].softmax(-1)[:, 0]


JUDGES = {
    "oracle": judge_oracle,
    "vqa": judge_vqa,
    **{name: partial(judge_reward, name=name) for name in rewards.REWARDS},
    "activation": judge_activation,
    "fidelity": judge_features,
}


@torch.no_grad()
def judge_all(setup, judges, items, adapter, rank, world_size):
    """Makes and judges images: a row {column: value} for each, on every rank. Batches are dealt out
    whole, so that no number depends on world_size."""
    batch, judged = setup.options.batch or setup.config.batch, []
    starts = range(rank * batch, len(items.prompts), world_size * batch)
    for start in tqdm(starts, desc=adapter or "base", disable=rank > 0):
        part = items.part(slice(start, start + batch))
        (z,) = setup.latents(part, [adapter])
        images = imaging.decode_all(setup.pipe, z)
        rows = [{} for _ in part.prompts]
        for judge in judges:
            for row, values in zip(rows, judge(setup, part, images, z, adapter)):
                row.update(values)
        judged.append((start, rows))
    judged = sorted(utils.gather(judged, world_size))
    return [row for _, rows in judged for row in rows]


# --------------------------------------------------------------------------------------------------
# Numbers


def compare(base, tuned):
    """(mean of base, of tuned, 95 % interval of their difference) for scores (prompts,), NaN left
    out: percentiles over resamples of the prompts, the same for both."""
    n, generator = len(base), torch.Generator().manual_seed(0)
    drawn = torch.randint(n, (RESAMPLES, n), generator=generator)
    differences = tuned[drawn].nanmean(1) - base[drawn].nanmean(1)
    interval = differences.nanquantile(torch.tensor([0.025, 0.975])).tolist()
    return base.nanmean().item(), tuned.nanmean().item(), interval


def frechet_distance(x, y):
    """Squared Frechet distance of the Gaussians of features (n, dim) and (m, dim) (Heusel et al.
    2017, eq. 6): |mu_x - mu_y|^2 + tr(S_x) + tr(S_y) - 2 tr((S_x S_y)^1/2).

    With S = R'R, R from the QR decomposition of the centred features, the last trace is the sum of
    the singular values of R_x R_y'. No root of a matrix: exact even where n < dim."""
    x, y = x.double(), y.double()
    r_x = torch.linalg.qr((x - x.mean(0)) / max(len(x) - 1, 1) ** 0.5, mode="r").R
    r_y = torch.linalg.qr((y - y.mean(0)) / max(len(y) - 1, 1) ** 0.5, mode="r").R
    means = (x.mean(0) - y.mean(0)).square().sum()
    traces = r_x.square().sum() + r_y.square().sum()
    root = torch.linalg.matrix_norm(r_x @ r_y.T, "nuc")
    return (means + traces - 2 * root).clamp(min=0).item()


def fidelity(base, tuned, other):
    """(distance of base to other, of tuned to other, interval of their difference) for features
    (prompts, images, dim). Resampled prompts repeat images, which raises any Frechet distance: only
    the spread is taken from them, and the interval is +- 1.96 standard deviations."""
    n, generator = len(base), torch.Generator().manual_seed(0)
    draws = torch.randint(n, (RESAMPLES_FRECHET, n), generator=generator)
    distances = []
    for drawn in (torch.arange(n), *draws):
        b, t, o = (features[drawn].flatten(0, 1) for features in (base, tuned, other))
        distances.append((frechet_distance(b, o), frechet_distance(t, o)))
    floor, distance = distances[0]
    spread = 1.96 * torch.tensor(distances[1:]).diff(dim=1).std().item()
    return floor, distance, [distance - floor - spread, distance - floor + spread]


def summarise(base, tuned, other=(), images=1):
    """What results.json holds, from the rows of each side, `images` consecutive ones a prompt. A
    column that only some rows have is compared over these."""

    def values_of(column, rows):
        values = [torch.as_tensor(row[column]) for row in rows if column in row]
        return torch.stack(values).unflatten(0, (-1, images))

    results = {"n": len(base) // images, **{part: {} for part in PARTS}}
    for column in dict.fromkeys(column for row in base for column in row):
        before, after = values_of(column, base), values_of(column, tuned)
        if column == "features":
            column = "frechet_distance"
            before, after, interval = fidelity(before, after, values_of("features", other))
        else:
            before, after, interval = compare(before.nanmean(1), after.nanmean(1))
        for part, value in zip(PARTS, (before, after, after - before, interval)):
            results[part][column] = value
    return results


# --------------------------------------------------------------------------------------------------
# The command


def read_lists(options, config):
    """[(name of its list, prompt)]. Raises ValueError naming the file."""
    heldout = (Path(config.eval_prompts),) if config.eval_prompts else LISTS
    paths = options.prompts or heldout
    if paths == LISTS and not LISTS[0].exists():
        raise ValueError(f"{LISTS[0]}: no such file; fetch it: python prompts.py")
    asked = []
    for path in paths:
        listed = prompts.read(path)[: options.count or config.eval_count]
        asked += [(path.stem.removesuffix("_val"), prompt) for prompt in listed]
    return asked


def plan_scoring(options, config, oracle):
    """(Items, protocol). Raises ValueError naming the file or flag."""
    if min(options.images, options.count, options.batch) < 0:
        raise ValueError("--images, --count, --batch: cannot be negative")
    asked = read_lists(options, config)
    readable = config.resolution == oracle.SIZE and all(oracle.objects_of(p) for _, p in asked)
    scores = ["blip" if name == "caption" else name for name in options.scores]
    scores = scores or ["oracle" if readable else "vqa", "blip", "activation", "fidelity"]
    if unknown := set(scores) - set(JUDGES):
        raise ValueError(f"--scores {min(unknown)}: unknown, there are {', '.join(JUDGES)}")
    if "oracle" in scores and not readable:
        raise ValueError("--scores oracle: it reads prompts and images of the shapes world only")
    images, seed = (10, 42) if "vqa" in scores else (1, imaging.SEED)
    images = options.images or images
    if options.seed is not None:
        seed = options.seed
    items = Items([], [], [])
    for place, (name, prompt) in enumerate(asked):
        for k in range(images):
            items.lists.append(name)
            items.prompts.append(prompt)
            items.seeds.append(seed + (place if images == 1 else k))
    protocol = {
        "scores": [name for name in JUDGES if name in scores],
        "prompts": dict(Counter(name for name, _ in asked)),
        "images_per_prompt": images,
        "seeds": f"{seed} to {items.seeds[-1]}",
        "checkpoint": (options.out / "checkpoints" / options.checkpoint).resolve().name,
        **{name: getattr(config, name) for name in SETTINGS.split()},
        "unet": unet_and_vae(config)[0] or config.model,
        "vqa": options.vqa,
        "intervals": f"95 %, {RESAMPLES} bootstrap resamples of prompts, paired by prompt and seed",
    }
    return items, protocol


def set_aside(folder, protocol):
    """Renames results of another protocol, hours of work perhaps, to results.N.json and so on."""
    results = folder / "results.json"
    text = as_json({"protocol": protocol}, 2)[1:-1]  # as it stands in the file
    if results.exists() and text not in results.read_text():
        number = 1 + len(list(folder.glob("results.*.json")))
        for path in (results, folder / "scores.jsonl", folder / "before_after.png"):
            if path.exists():
                path.rename(path.with_suffix(f".{number}{path.suffix}"))
        print(f"{folder}: results of another protocol are kept as results.{number}.json and so on")


def show(results):
    """Prints a line for each score, then the protocol."""
    title = f"prompts, n = {results['n']}"
    print(f"{title:<27}    base       tuned  difference  95 % interval")
    for column in results["base"]:
        *numbers, interval = [results[part][column] for part in PARTS]
        line = "{:<27} {:7.4f} -> {:8.4f} {:+11.4f}  [{:+.4f}, {:+.4f}]"
        print(line.format(column, *numbers, *interval))
    for key, value in results["protocol"].items():
        print(f"  {key}: {value}")


def as_json(value, indent=None):
    """JSON text with null for NaN: JSON has none."""
    value = json.loads(json.dumps(value), parse_constant=lambda _: None)
    return json.dumps(value, indent=indent)


def evaluate(setup, rank=0, world_size=1):
    """Scores the adapter `comat` against its base, all ranks together. Rank 0 prints the table and
    writes the files."""
    folder = setup.options.to or setup.options.out
    if folder.exists() and not os.access(folder, os.W_OK):  # known before the work, not after
        raise ValueError(f"{folder}: cannot be written; give --to another folder")
    items, protocol = plan_scoring(setup.options, setup.config, setup.oracle)
    judges = [JUDGES[name] for name in protocol["scores"]]
    sides = {}
    for side, adapter in SIDES.items():
        sides[side] = judge_all(setup, judges, items, adapter, rank, world_size)
    if judge_features in judges:
        others = items._replace(seeds=[seed + OTHER for seed in items.seeds])
        sides["other"] = judge_all(setup, [judge_features], others, None, rank, world_size)
    if rank > 0:
        return
    images = protocol["images_per_prompt"]
    results = {**summarise(*sides.values(), images=images), "protocol": protocol}
    show(results)
    set_aside(folder, protocol)
    lines = []
    for i, (name, prompt, seed) in enumerate(zip(*items)):
        for model in SIDES:
            row = {"list": name, "prompt": prompt, "seed": seed, "model": model, **sides[model][i]}
            row.pop("features", None)
            lines.append(as_json(row) + "\n")
    utils.write(folder / "scores.jsonl", "".join(lines))
    utils.write(folder / "results.json", as_json(results, 2) + "\n")
    shown = items.part(slice(0, SHOWN * images, images))
    pictures = [imaging.decode_all(setup.pipe, z) for z in setup.latents(shown, SIDES.values())]
    imaging.grid(shown.prompts, dict(zip(SIDES, pictures))).save(folder / "before_after.png")


def main(options):
    from shapes import world

    rank, world_size = utils.join(options.device, minutes=8 * 60)  # ranks meet at the end only
    run = models.open_run(options.out, options.checkpoint, device=options.device)
    setup = Setup(options, *run, world)
    # on a CPU one thread, as under torchrun: last digits depend on it
    torch.set_num_threads(1 if setup.pipe.device.type == "cpu" else os.cpu_count())
    evaluate(setup, rank, world_size)
    utils.leave(world_size)


if __name__ == "__main__":
    with utils.one_line_errors("evaluate.py"):
        main(options)
