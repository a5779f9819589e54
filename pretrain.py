"""Trains the shapes world's models from scratch and writes them to OUT (about 80 minutes on 2 cores, resumable):

    python pretrain.py                       # all five stages, in order
    python pretrain.py --only unet           # one of them, from the other stages' saved results

What comes out are the true classes in their own formats: a StableDiffusionXLPipeline, a BlipForConditionalGeneration with
its processor, a segmenter, and prompt lists. The base is trained on images that do not always show what their caption says
(an object faded or missing, the colour of its neighbour mixed in), so that it draws the textbook failures of the big models.
Every stage ends with the oracle's figures on prompts that were never trained on; they go to OUT/scores.json.
"""
import functools
import json
import math
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass
class Config:
    only: tuple[Literal["prompts", "vae", "segmenter", "captioner", "unet"], ...] = (
        "prompts", "vae", "segmenter", "captioner", "unet")
    """Stages to run, in this order."""
    out: Path = Path("out/weights")
    """Where the finished models go; those of this repository are in weights/shapes."""
    work: Path = Path("out/pretrain")
    """Where unfinished stages keep their state; delete it to start afresh."""
    steps_scale: float = 1.0
    """Multiplies every stage's number of steps; 0.01 for a quick look."""
    seed: int = 0
    """Seed of the data, the initial weights and the noise."""
    threads: int = 2
    """CPU threads."""


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)  # before the heavy imports: --help answers at once

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel  # noqa: E402
from tokenizers.pre_tokenizers import ByteLevel  # noqa: E402
from tqdm import tqdm  # noqa: E402

import losses  # noqa: E402
import shapes  # noqa: E402
from config import first_line  # noqa: E402

WORDS = ["a", "an", "and", "the", "of", "photography", "photo", "with", "next", "to", *shapes.COLOURS, *shapes.SHAPES]


# ---------------------------------------------------------------------------------------------------------------------
# Data

def corrupt(rng, things, share):
    """With probability `share`, one thing is faded towards the background or takes on another's colour, by 30 to 100 %.

    Returns the things and what remains of each: a list of (visibility, own share of the colour, index of the other colour)."""
    states = [[1.0, 1.0, i] for i in range(len(things))]
    if rng.random() < share:
        i, amount = rng.randrange(len(things)), rng.uniform(0.3, 1.0)
        if len(things) == 1 or rng.random() < 0.5:
            target, states[i][0] = (shapes.GREY,) * 3, 1 - amount
        else:
            other = rng.choice([j for j in range(len(things)) if j != i])
            target, states[i][1:] = things[other].rgb, (1 - amount, other)
        things[i].mix(target, amount)
    return things, states


def perceive(rng, objects, states):
    """What a viewer would say of a corrupted scene: a thing half faded, or half of another colour, is a coin toss, so that a
    captioner's likelihood changes smoothly as the image does."""
    def sees(amount):
        return rng.random() < 1 / (1 + math.exp(-(amount - 0.5) / 0.12))
    colours = [objects[i][0] if sees(own) else objects[other][0] for i, (_, own, other) in enumerate(states)]
    return [(c, shape) for c, (_, shape), (visible, *_) in zip(colours, objects, states) if sees(visible)]


def scenes(rng, count, share):
    """`count` random training scenes as (objects, states, images)."""
    objects, things = zip(*(shapes.random_scene(rng) for _ in range(count)))
    things, states = zip(*(corrupt(rng, t, share) for t in things))
    return objects, states, torch.stack([shapes.render(t) for t in things])


def crowded_scenes(rng, count):
    """Scenes of one or two objects and one too many, faded by up to 70 %, in a colour and a shape that are there already."""
    rows = []
    for _ in range(count):
        objects = shapes.random_objects(rng, rng.choice((1, 2, 2)))
        objects += ((rng.choice(objects)[0], rng.choice(objects)[1]),)
        things, states = corrupt(rng, shapes.place(rng, objects), share=0.3)
        amount = rng.uniform(0, 0.7)
        things[-1].mix((shapes.GREY,) * 3, amount)
        states[-1][0] *= 1 - amount
        rows.append((objects, states, shapes.render(things)))
    objects, states, images = zip(*rows)
    return objects, states, torch.stack(images)


def trained_vae(config):
    folder = config.out / "pipeline/vae"
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no VAE there; train it first, with --only vae")
    return AutoencoderKL.from_pretrained(folder)


def held_out_scenes(seed, count):
    """Clean scenes of held-out two-object prompts, as (objects, images)."""
    rng = random.Random(f"held-out {seed}")
    objects = [tuple(shapes.objects_of(p)) for p in rng.sample(shapes.all_prompts(2, held_out=True), count)]
    return objects, torch.stack([shapes.render(shapes.place(rng, o)) for o in objects])


# ---------------------------------------------------------------------------------------------------------------------
# The loop that every stage shares

def fit(config, name, modules, loss_of, steps, lr, ema_decay=None):
    """AdamW with warm-up and cosine decay on loss_of(rng, generator); state in config.work/<name>.pt every 500 steps. The data
    of a step depends on (seed, step) alone, so a resumed run sees what an uninterrupted one would have seen."""
    steps = max(1, int(steps * config.steps_scale))
    for m in modules:
        m.train().requires_grad_(True)
    parameters = [p for m in modules for p in m.parameters()]
    weights = [p.detach() for p in parameters]  # the same memory
    average = [w.clone() for w in weights]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / 200, 0.5 + 0.5 * math.cos(math.pi * min(1, i / steps)) + 1e-3))
    path, start, recipe = config.work / f"{name}.pt", 0, {"seed": config.seed, "steps_scale": config.steps_scale}
    if path.exists():
        state = torch.load(path, weights_only=True)
        if state.get("recipe") != recipe:
            raise ValueError(f"{path}: made with another --seed or --steps-scale; delete it, or choose another --work")
        start = state["step"]
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch._foreach_copy_(weights + average, state["parameters"] + state["average"])
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=10)
    for step in bar:
        rng = random.Random(f"{name} {config.seed} {step}")
        loss = loss_of(rng, torch.Generator().manual_seed(rng.getrandbits(62)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step(), schedule.step()
        torch._foreach_lerp_(average, weights, 1 - min(ema_decay or 0, (step + 1) / (step + 10)))
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % 500 == 0 or step + 1 == steps:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"recipe": recipe, "step": step + 1, "optimizer": optimizer.state_dict(), "parameters": weights,
                        "schedule": schedule.state_dict(), "average": average}, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)
    torch._foreach_copy_(weights, average)
    for m in modules:
        m.eval().requires_grad_(False)


def report(config, name, **figures):
    """Prints a stage's figures and keeps them in scores.json."""
    path = config.out / "scores.json"
    scores = json.loads(path.read_text()) if path.exists() else {}
    scores[name] = {k: round(v, 4) for k, v in figures.items()}
    path.write_text(json.dumps(scores, indent=2) + "\n")
    print(f"{name}: " + "  ".join(f"{k} {v:.3f}" for k, v in scores[name].items()), flush=True)


def oracle(images, prompts):
    """Means of the oracle's scores over images."""
    rows = [shapes.score(image, prompt) for image, prompt in zip(images, prompts)]
    return {k: torch.tensor([r[k] for r in rows]).nanmean().item() for k in rows[0]}


# ---------------------------------------------------------------------------------------------------------------------
# Stages

def train_prompts(config):
    """The lists: two-object prompts, as in T2I-CompBench's attribute binding; training and held-out share no object set."""
    folder = config.out / "prompts"
    folder.mkdir(parents=True, exist_ok=True)
    for name, held_out in (("train", False), ("heldout", True)):
        prompts = shapes.all_prompts(2, held_out)
        random.Random(0).shuffle(prompts)
        (folder / f"{name}.txt").write_text("\n".join(prompts) + "\n")
        print(f"prompts: {len(prompts)} in {folder / name}.txt")


def train_vae(config):
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(16, 32),
        layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=shapes.SIZE, mid_block_add_attention=False)

    def loss_of(rng, generator):
        images = scenes(rng, 32, share=0.5)[2] * 2 - 1
        posterior = vae.encode(images).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        return F.mse_loss(decoded, images) + 0.3 * F.l1_loss(decoded, images) + 1e-3 * posterior.kl().mean() / 1024

    fit(config, "vae", [vae], loss_of, steps=4000, lr=3e-3)
    images = torch.cat([scenes(random.Random(i), 100, share=0.5)[2] for i in range(5)])
    vae.register_to_config(scaling_factor=1 / vae.encode(images * 2 - 1).latent_dist.mean.std().item())
    vae.save_pretrained(config.out / "pipeline/vae")
    objects, images = held_out_scenes(0, 300)
    decoded = reconstruct(vae, images)
    prompts = [shapes.prompt_of(o) for o in objects]
    report(config, "vae", mean_squared_error=F.mse_loss(decoded, images).item(),
           fully_right_clean=oracle(images, prompts)["fully_right"],
           fully_right_reconstructed=oracle(decoded, prompts)["fully_right"])


@torch.no_grad()
def reconstruct(vae, images):
    return vae.decode(vae.encode(images * 2 - 1).latent_dist.mean).sample.div(2).add(0.5).clamp(0, 1)


def train_segmenter(config):
    vae = trained_vae(config)
    segmenter = shapes.Segmenter()

    def batch(rng, generator, count):
        things = [shapes.random_scene(rng)[1] for _ in range(count)]
        labels = torch.zeros(count, shapes.SIZE, shapes.SIZE, dtype=torch.long)
        for label, ts in zip(labels, things):
            for thing, cover in zip(ts, shapes.coverage(ts)):
                label[cover > 0.5] = 1 + shapes.SHAPES.index(thing.shape)
        images = torch.stack([shapes.render(corrupt(rng, ts, share=0.5)[0]) for ts in things])
        images[::2] = reconstruct(vae, images[::2])
        return images + 0.05 * torch.randn(images.shape, generator=generator), labels

    def loss_of(rng, generator):
        images, labels = batch(rng, generator, 32)
        return F.cross_entropy(segmenter(images), labels)

    fit(config, "segmenter", [segmenter], loss_of, steps=2000, lr=3e-3)
    segmenter.save(config.out / "segmenter")
    objects, images = held_out_scenes(1, 300)
    found = segmenter(images).argmax(1) > 0
    truth = (images - shapes.GREY).abs().amax(1) > 0.2
    report(config, "segmenter", foreground_iou=((found & truth).sum() / (found | truth).sum()).item())


def build_captioner():
    """An untrained BLIP with its processor; its tokenizer knows this world's words."""
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", *dict.fromkeys(WORDS)]
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(vocab)}, model_max_length=40)
    text = dict(vocab_size=len(vocab), hidden_size=96, encoder_hidden_size=96, intermediate_size=384, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=40, projection_dim=96, bos_token_id=5, eos_token_id=3,
                sep_token_id=3, pad_token_id=0, label_smoothing=0.0)
    vision = dict(hidden_size=96, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
                  image_size=shapes.SIZE, patch_size=4)
    config = transformers.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=96)
    size = {"height": shapes.SIZE, "width": shapes.SIZE}
    processor = transformers.BlipProcessor(transformers.BlipImageProcessor(size=size), tokenizer)
    return transformers.BlipForConditionalGeneration(config), processor


def train_captioner(config):
    """Also trained on noise, blur, reconstructions and half-corrupted scenes: a captioner that saw clean renders alone gives
    speckle as the gradient of its likelihood, one that saw these gives patches in the missing object's colour."""
    vae = trained_vae(config)
    captioner, processor = build_captioner()
    loss = functools.partial(losses.caption_loss, captioner, processor.tokenizer)

    def loss_of(rng, generator, crowded=0):
        objects, states, images = scenes(rng, 48 - crowded, share=0.6)
        if crowded:
            more = crowded_scenes(rng, crowded)
            objects, states, images = objects + more[0], states + more[1], torch.cat([images, more[2]])
        seen = [rng.sample(p, len(p)) for p in (perceive(rng, o, s) for o, s in zip(objects, states))]
        images[::2] = reconstruct(vae, images[::2])
        blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
        images = torch.where(torch.rand(48, 1, 1, 1, generator=generator) < 0.3, blurred, images)
        sigma = 0.45 * torch.rand(48, 1, 1, 1, generator=generator).square()
        images = images + sigma * torch.randn(images.shape, generator=generator)
        return loss(images, [shapes.prompt_of(o) for o in seen], label_smoothing=0.05).sum() / 48 / 8

    fit(config, "captioner", [captioner], loss_of, steps=12000, lr=1.5e-3)
    # A captioner that never saw an object twice is blind to it, and the model that it teaches soon draws everything twice.
    fit(config, "captioner_crowded", [captioner], functools.partial(loss_of, crowded=16), steps=2500, lr=5e-4)
    captioner.save_pretrained(config.out / "captioner")
    processor.save_pretrained(config.out / "captioner")
    rng, (objects, images) = random.Random(0), held_out_scenes(2, 300)
    for name, pictures in (("captioner", images), ("captioner_on_reconstructions", reconstruct(vae, images))):
        right = loss(pictures, [shapes.prompt_of(o) for o in objects])
        wrong = loss(pictures, [shapes.prompt_of(one_edit(rng, o)) for o in objects])
        report(config, name, ranks_true_caption_first=(right < wrong).float().mean().item(), loss=right.mean().item())


def one_edit(rng, objects):
    """The objects with one colour or one shape replaced by one that is not in the scene."""
    objects, i = list(objects), rng.randrange(len(objects))
    colour, shape = objects[i]
    if rng.random() < 0.5:
        objects[i] = (rng.choice([c for c in shapes.COLOURS if c not in dict(objects)]), shape)
    else:
        objects[i] = (colour, rng.choice([s for s in shapes.SHAPES if s not in {s for _, s in objects}]))
    return objects


def build_tokenizer():
    """A CLIPTokenizer whose merges make each of this world's words one token; other words fall to pieces, not to unknown."""
    letters = sorted(ByteLevel.alphabet())
    words = {w: [*w[:-1], w[-1] + "</w>"] for w in dict.fromkeys(WORDS)}
    merges = []
    while any(len(pieces) > 1 for pieces in words.values()):  # byte-pair encoding on the list, the commonest pair first
        pairs = [pair for pieces in words.values() for pair in zip(pieces, pieces[1:])]
        best = max(dict.fromkeys(pairs), key=pairs.count)
        merges.append(best)
        for word, pieces in words.items():
            for i in range(len(pieces) - 2, -1, -1):
                if tuple(pieces[i:i + 2]) == best:
                    pieces[i:i + 2] = ["".join(best)]
    tokens = [*letters, *(c + "</w>" for c in letters), *dict.fromkeys("".join(m) for m in merges),
              "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, model_max_length=77)


def build_pipeline(vae):
    """An untrained StableDiffusionXLPipeline around a trained VAE."""
    tokenizer = build_tokenizer()
    text = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        projection_dim=64, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)
    unet = UNet2DConditionModel(
        sample_size=shapes.SIZE // 2, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128, attention_head_dim=(2, 4), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 64)
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              prediction_type="v_prediction", timestep_spacing="trailing")
    return StableDiffusionXLPipeline(
        vae=vae, unet=unet, scheduler=scheduler, tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder=transformers.CLIPTextModel(text),
        text_encoder_2=transformers.CLIPTextModelWithProjection(text), add_watermarker=False)


def latent_pool(config, vae, count, share):
    """Latents and prompts of `count` scenes, a share of them corrupted; rendered and encoded once, read many times."""
    latents, prompts = [], []
    for i in tqdm(range(0, count, 500), desc="rendering", mininterval=10):
        objects, _, images = scenes(random.Random(f"pool {config.seed} {i}"), 500, share)
        with torch.no_grad():
            latents.append(vae.encode(images * 2 - 1).latent_dist.mean * vae.config.scaling_factor)
        prompts += [shapes.prompt_of(o) for o in objects]
    return torch.cat(latents), prompts


def train_unet(config):
    vae = trained_vae(config)
    pipe = build_pipeline(vae)
    pipe.set_progress_bar_config(disable=True)
    time_ids = torch.tensor([shapes.SIZE, shapes.SIZE, 0, 0, shapes.SIZE, shapes.SIZE], dtype=torch.float)

    def loss_of(rng, generator):  # reads the pool of the phase that runs
        index = torch.randint(len(latents), (32,), generator=generator)
        first, second = (e(ids[index].long(), output_hidden_states=True) for e in (pipe.text_encoder, pipe.text_encoder_2))
        kept = (torch.rand(32, generator=generator) >= 0.1).float()  # the empty prompt is zeros, as in SDXL
        text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1) * kept[:, None, None]
        t = torch.randint(1000, (32,), generator=generator)
        noise = torch.randn(32, *latents.shape[1:], generator=generator)
        added = {"text_embeds": second.text_embeds * kept[:, None], "time_ids": time_ids.expand(32, -1)}
        noisy = pipe.scheduler.add_noise(latents[index], noise, t)
        predicted = pipe.unet(noisy, t, text, added_cond_kwargs=added).sample
        return F.mse_loss(predicted, pipe.scheduler.get_velocity(latents[index], noise, t))

    # First it learns to draw; then captions that are nearly always a little wrong teach it to neglect them.
    for name, share, steps, lr in (("unet", 0.6, 9000, 1.5e-3), ("unet_noisy_captions", 0.95, 2000, 5e-4)):
        latents, prompts = latent_pool(config, vae, max(1000, int(80000 * config.steps_scale)), share)
        ids = pipe.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids.to(torch.int16)
        fit(config, name, [pipe.unet, pipe.text_encoder, pipe.text_encoder_2], loss_of, steps, lr, ema_decay=0.998)
    pipe.save_pretrained(config.out / "pipeline")
    asked = random.Random(0).sample(shapes.all_prompts(2, held_out=True), 300)
    images = [pipe(asked[i:i + 100], height=shapes.SIZE, width=shapes.SIZE, num_inference_steps=16, guidance_scale=3.0,
                   generator=torch.Generator().manual_seed(i), output_type="pt").images for i in range(0, 300, 100)]
    report(config, "unet", **oracle(torch.cat(images), asked))


STAGES = {"prompts": train_prompts, "vae": train_vae, "segmenter": train_segmenter, "captioner": train_captioner,
          "unet": train_unet}


if __name__ == "__main__":
    torch.set_num_threads(config.threads)
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        for stage in config.only:
            torch.manual_seed(config.seed)
            STAGES[stage](config)
    except (ValueError, OSError) as error:
        sys.exit(f"pretrain.py: {first_line(error)}")
