"""What a run learned: images of prompts, base beside tuned from the same noise, and what their words attend to.

    python sample.py out/shapes --prompt "a red circle and a blue square" --prompt "a white ring and a black cross"
    python sample.py out/shapes --prompts weights/shapes/prompts/heldout.txt --n 100 --activation    attention per token
    python sample.py out/shapes --prompt "a red circle and a blue square" --attention                heat maps of the words
    python sample.py sdxl --lora me/my-lora --prompt "a red car and a blue bird"     a LoRA on a preset's base
    python sample.py sdxl --base-only --prompt "a red car and a blue bird"           the base alone

The preset sdxl's base has 512 px and the UNet of hotshotco/SDXL-512. Writes to OUT/images (for a preset: out/NAME-images):
grid.png, each image with its prompt, seed and models as PNG text, the figures.
"""
import gc
import sys
from pathlib import Path

if __name__ == "__main__":
    from typing import Annotated, Literal

    import tyro

    def arguments(
            out: tyro.conf.Positional[Path], prompt: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], None] = (),
            prompts: Path | None = None, n: int = 8, seed: int = 0, steps: int = 0, guidance_scale: float = 0.0,
            checkpoint: str = "latest", lora: str = "", base_only: bool = False, activation: bool = False,
            attention: bool = False, to: Path | None = None, batch: int = 8, device: Literal["", "auto", "cuda", "cpu"] = ""):
        """Images of prompts, base beside tuned from the same noise, and what their words attend to.

        Args:
            out: Output folder of train.py; with --base-only or --lora also a preset: sdxl, sd15, shapes.
            prompt: A prompt; may be given several times.
            prompts: A list of prompts: a text file, one a line, or .jsonl with a field "prompt".
            n: Take the first n prompts of --prompts.
            seed: Seed of the first image; the next has the next.
            steps: Denoising steps; 0 takes the run's.
            guidance_scale: Of classifier-free guidance; 0 takes the run's.
            checkpoint: Folder name below OUT/checkpoints.
            lora: Use this LoRA (diffusers' format) as the tuned model in place of the checkpoint: a folder, a .safetensors file
                or a hub id.
            base_only: Only the base; needs no checkpoint.
            activation: Also activation.png: attention per token and its mean over the entities of all prompts, with interval.
            attention: Also NNN-attention.png: heat maps of the words, with the segmenter's outlines of the entities.
            to: Folder for the images; default OUT/images, for a preset out/NAME-images.
            batch: Images at a time.
            device: auto, cuda or cpu; empty: the run's.
        """
        return dict(locals())

    parsed = tyro.cli(arguments, description=__doc__)
    gc.disable()  # what the imports make stays: a second of eleven

import re  # noqa: E402
from contextlib import ExitStack, contextmanager  # noqa: E402
from dataclasses import replace  # noqa: E402
from types import SimpleNamespace  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from diffusers.utils import convert_unet_state_dict_to_peft  # noqa: E402
from diffusers.utils.torch_utils import randn_tensor  # noqa: E402
from PIL.PngImagePlugin import PngInfo  # noqa: E402
from tqdm import tqdm  # noqa: E402

import attention  # noqa: E402
import config as configuration  # noqa: E402
import diffusion  # noqa: E402
import masks  # noqa: E402
import prompts as prompt_lists  # noqa: E402
from entities import MAX_TOKENS  # noqa: E402
from figures import activation_chart, attention_chart, grid, to_pil  # noqa: E402

SEED = 1_000_000_007  # of the fixed noise of grids and scores, apart from every training seed's
RENOISE = 500_000_003  # added to an image's seed for the noise under which its attention is measured
PANELS = 4  # prompts whose tokens activation.png shows one by one
MOST_WORDS = 14  # of a longer prompt NNN-attention.png shows only the entities' words


# ---------------------------------------------------------------------------------------------------------------------
# Models

def open_run(out, checkpoint="latest", num_steps=0, lora="", base_only=False, device=""):
    """(config, pipeline, schedule) of an output folder, or of a preset's name if lora or base_only is given. The pipeline's
    adapter `comat` is the checkpoint, or lora (folder, file or hub id); with base_only there is none.
    num_steps, device: 0 and "" take the run's.

    Raises ValueError, one line, if there is no such run, no finished checkpoint, or a LoRA that does not fit the base."""
    out = Path(out)
    if (out / "config.json").is_file():
        config = configuration.load(out / "config.json")
    elif str(out) not in configuration.PRESETS:
        raise ValueError(f"{out}: not an output folder of train.py (no config.json), nor a preset: "
                         f"{', '.join(configuration.PRESETS)}")
    elif not (lora or base_only):
        raise ValueError(f"{out}: a preset has no checkpoint; give --base-only, or --lora, or the output folder of train.py")
    else:
        config = configuration.PRESETS[str(out)][1]
    source = None if base_only else lora or find_checkpoint(out, checkpoint)
    config = replace(config, num_steps=num_steps or config.num_steps, device=device or config.device)
    pipe, plan = diffusion.open_pipeline(config)
    if source:
        load_lora(pipe, source, f"--lora {lora}" if lora else f"{source}: no finished checkpoint")
    return config, pipe, plan


def find_checkpoint(out, name):
    """The folder of a whole checkpoint of a run; ValueError says what there is instead."""
    folder = out / "checkpoints" / name
    if (folder / "pytorch_lora_weights.safetensors").is_file() and not name.startswith("."):
        return folder
    have = sorted(p.name for p in (out / "checkpoints").glob("step-*"))
    cut = sorted(p.name for p in (out / "checkpoints").glob(".*.unfinished"))
    raise ValueError(f"{folder}: no finished checkpoint there; {out / 'checkpoints'} has {', '.join(have) or 'none'}"
                     + (f" (interrupted while being written: {', '.join(cut)})" if cut else "")
                     + ("" if have else "; train first"))


def load_lora(pipe, source, complaint):
    """Loads a LoRA (folder, file or hub id; diffusers' and kohya's formats) as the pipeline's adapter `comat`, in fp32.

    diffusers loads what fits and only warns of the rest: here every tensor must have its layer in the UNet, of its shape, or
    ValueError(complaint ...) is raised."""
    if not Path(source).exists() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        raise ValueError(f"{complaint}: no such file or folder, nor a hub id (user/name)")
    try:
        state = pipe.lora_state_dict(str(source), unet_config=pipe.unet.config)
        state = state[0] if isinstance(state, tuple) else state
    except Exception as error:  # diffusers, safetensors, the hub's client: each raises its own
        raise ValueError(f"{complaint}: cannot be read as a LoRA ({configuration.first_line(error)})") from error
    state = {k.removeprefix("unet."): v for k, v in state.items() if k.startswith("unet.")}
    if not any("lora_A" in k for k in state):
        state = convert_unet_state_dict_to_peft(state)
    layers, matrices = dict(pipe.unet.named_modules()), 0
    for key, value in state.items():
        name, dot, part = key.rpartition(".lora_")
        if dot and part in ("A.weight", "B.weight"):
            axis, matrices = int(part[0] == "A"), matrices + 1  # A: (rank, in, ...), B: (out, rank, ...)
            have = layers[name].weight.shape[axis] if hasattr(layers.get(name), "weight") else None
            if have != value.shape[axis]:
                wanted = f"{value.shape[axis]} {'inputs' if axis else 'outputs'}"
                raise ValueError(f"{complaint}: made for another architecture: its {name} has {wanted}, this base's "
                                 + (f"{have}" if have else "does not exist"))
    if not matrices:
        raise ValueError(f"{complaint}: holds no LoRA for a UNet")
    try:
        pipe.load_lora_weights(str(source), adapter_name=diffusion.ADAPTER)
    except Exception as error:
        raise ValueError(f"{complaint}: does not fit this base ({configuration.first_line(error)})") from error
    for name, parameter in pipe.unet.named_parameters():
        if f".{diffusion.ADAPTER}." in name:
            parameter.data = parameter.data.float()  # as in training


@contextmanager
def using(pipe, name):
    """Within the context the whole pipeline runs with an adapter, or, if name is None, as the original model: a LoRA may have
    parts for the text encoders too."""
    with ExitStack() as stack:
        stack.enter_context(diffusion.adapter(pipe.unet, name))
        for part in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)):
            if name in (None, *getattr(part, "peft_config", ())):
                stack.enter_context(diffusion.adapter(part, name))
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Images

@torch.no_grad()
def over_batches(pipe, prompts, adapters, work, batch=8, progress=""):
    """work(name, part, text) under each adapter for each slice `part` of the prompts; per adapter the results in one tensor."""
    done = {name: [] for name in adapters}
    with tqdm(total=len(prompts) * len(done), desc=progress, disable=not progress) as bar:
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            for name in done:
                with using(pipe, name):
                    done[name].append(work(name, part, diffusion.encode(pipe, prompts[part])))
                bar.update(len(done[name][-1]))
    return [torch.cat(done[name]) for name in adapters]


def latents(pipe, plan, prompts, guidance_scale, resolution, adapters=(diffusion.ADAPTER, None), seeds=None, batch=8,
            progress=""):
    """Finished latents (N, 4, h, w) of prompts for each adapter (None: the original model), all from the same noise: one
    seed per image, so that it depends on neither batch nor order."""
    seeds, size = seeds or [SEED + i for i in range(len(prompts))], (resolution, resolution)

    def draw(name, part, text):
        generators = [torch.Generator().manual_seed(s) for s in seeds[part]]
        return diffusion.sample(pipe, plan, text, diffusion.initial_noise(pipe, size, generators), generators,
                                guidance_scale)[0]
    return over_batches(pipe, prompts, adapters, draw, batch, progress)


def generate(pipe, plan, prompts, guidance_scale, resolution, adapters=(diffusion.ADAPTER, None), seeds=None, batch=8,
             progress=""):
    """Images (N, 3, H, W) in [0, 1] of the same `latents`, one tensor for each adapter."""
    return [decode_all(pipe, z) for z in latents(pipe, plan, prompts, guidance_scale, resolution, adapters, seeds, batch,
                                                 progress)]


@torch.no_grad()
def decode_all(pipe, z, batch=8):
    return torch.cat([diffusion.decode(pipe, part).float().cpu() for part in z.split(batch)])


def save_png(image, path, **metadata):
    """Writes one image with its prompt, seed and so on as PNG text."""
    info = PngInfo()
    for key, value in metadata.items():
        info.add_itxt(key, str(value))
    to_pil(image).save(path, pnginfo=info)


# ---------------------------------------------------------------------------------------------------------------------
# What words attend to

@torch.no_grad()
def noised_attention(pipe, plan, text, z, blocks, seeds, steps):
    """Cross-attention of finished latents z (B, 4, h, w), noised again to each of the schedule's `steps` (indices) and given
    to the UNet once with their prompts: yields per step a list of maps (B, heads, h, w, tokens), one a layer of `blocks`.

    The UNet's active adapter is measured. seeds: the images' own, the same for every adapter; the noise is another than the
    one that the image was made from."""
    generators = [torch.Generator().manual_seed(s + RENOISE) for s in seeds]
    for i in steps:
        t = plan.timesteps[i]
        kept = pipe.scheduler.alphas_cumprod[round(t)].item()
        noise = randn_tensor(z.shape, generators, z.device, z.dtype)
        with attention.capture(pipe.unet, blocks) as captured:
            diffusion.predict(pipe, kept ** 0.5 * z + (1 - kept) ** 0.5 * noise, t, *text.conditional)
        yield attention.attention_maps(captured, len(z), z.shape[-1] / z.shape[-2])


def token_activations(pipe, plan, text, z, blocks, seeds, times=5):
    """How much each token is attended to (paper, section 3: the analysis that motivates CoMat): finished latents z (B, 4, h, w)
    are noised to `times` evenly spread steps of the schedule and denoised once with their prompts; the cross-attention is
    averaged over space, heads, the layers of `blocks` and the steps. (B, tokens), sums to 1 over all 77 tokens."""
    steps = [int((k + 0.5) * len(plan.timesteps) / times) for k in range(times)]
    maps = noised_attention(pipe, plan, text, z, blocks, seeds, steps)
    return torch.stack([attention.token_activation(m) for m in maps]).mean(0)


def token_maps(pipe, plan, text, z, blocks, seeds, parts=(0.4, 0.55, 0.7, 0.85)):
    """Where each token is attended to: (B, tokens, h, w), as `token_activations` but over the middle and late steps, where
    places are settled, and averaged over heads, layers (at the finest one's size) and steps only."""
    total = 0
    for maps in noised_attention(pipe, plan, text, z, blocks, seeds, [int(p * len(plan.timesteps)) for p in parts]):
        size = max(tuple(m.shape[2:4]) for m in maps)
        for m in maps:
            total = total + F.interpolate(m.mean(1).movedim(-1, 1), size, mode="bilinear") / len(maps) / len(parts)
    return total


def entity_activation(activations, entities):
    """Mean activation of the tokens of a prompt's entities, nouns and attributes alike, for each prompt: (B,), NaN where a
    prompt has none. activations: (B, tokens); entities: per prompt a list of masks.Entity."""
    tokens = [[t for entity in row for t in entity.tokens] for row in entities]
    return torch.stack([row[chosen].mean() for row, chosen in zip(activations.cpu(), tokens)])


def bootstrap(base, tuned, resamples=10_000, seed=0):
    """95 % interval [low, high] of the mean of tuned minus the mean of base, two tensors (prompts,) or (seeds, prompts), NaN
    left out: percentiles over resamples. Prompts are drawn anew, seeds too if there are several, and the same for both."""
    generator, (seeds, prompts) = torch.Generator().manual_seed(seed), torch.atleast_2d(base).shape
    column = torch.randint(prompts, (resamples, 1, prompts), generator=generator)
    row = torch.randint(seeds, (resamples, seeds, 1), generator=generator)
    before, after = (torch.atleast_2d(values)[row, column].flatten(1).nanmean(1) for values in (base, tuned))
    return (after - before).nanquantile(torch.tensor([0.025, 0.975])).tolist()


def offsets_of(prompt, tokenizer):
    """(start, end) characters of every CLIP token of a prompt, start and end token included as (0, 0)."""
    limit = min(tokenizer.model_max_length, MAX_TOKENS)
    return tokenizer(prompt, truncation=True, max_length=limit, return_offsets_mapping=True)["offset_mapping"]


def words_of(prompt, offsets):
    """The words of a prompt that its tokens reach: [(word, indices of its tokens)], pieces joined."""
    words = [(m.group().strip(",.;:!?") or m.group(), [i for i, (a, b) in enumerate(offsets) if a < m.end() and m.start() < b])
             for m in re.finditer(r"\S+", prompt)]
    return [(word, tokens) for word, tokens in words if tokens]


def draw_activation(run, path):
    """activation.png: bars for the first prompts, the mean over the entity tokens of all; prints that mean."""
    pipe = run.pipe
    values = over_batches(pipe, run.prompts, run.finished, lambda name, part, text: token_activations(
        pipe, run.plan, text, run.finished[name][part], attention.all_blocks(pipe.unet), run.seeds[part]).cpu(),
        run.batch, "activation")
    entities = masks.find_all(run.prompts, run.parser, pipe.tokenizer)
    some = [i for i, row in enumerate(entities) if row]
    if not some:
        raise ValueError("--activation: no prompt names a thing that can be seen")
    means = {label: entity_activation(v[some], [entities[i] for i in some]) for label, v in zip(run.labels, values)}
    interval = bootstrap(means["base"], means["tuned"]) if "tuned" in means and len(some) > 1 else None
    shown = range(min(PANELS, len(run.prompts)))
    offsets = [offsets_of(run.prompts[i], pipe.tokenizer) for i in shown]
    own = [[k for k, (a, b) in enumerate(row) if b > a] for row in offsets]  # without start and end
    activation_chart(
        run.prompts[:PANELS], [[run.prompts[i][slice(*offsets[i][k])] for k in own[i]] for i in shown],
        {label: [v[i, own[i]].numpy() for i in shown] for label, v in zip(run.labels, values)},
        [{own[i].index(t) for entity in entities[i] for t in entity.tokens} for i in shown],
        {label: v.numpy() for label, v in means.items()}, interval).savefig(path)
    said = ", ".join(f"{label} {100 * v.mean():.3f} %" for label, v in means.items())
    if interval:
        low, high = (100 * x for x in interval)
        said += (f", difference {100 * (means['tuned'] - means['base']).mean():+.3f} points, 95 % interval "
                 f"[{low:+.3f}, {high:+.3f}], paired by prompt and seed")
    print(f"activation of entity tokens, n = {len(some)}: {said}: {path}")


def draw_attention(run, folder):
    """NNN-attention.png: heat maps of every prompt's words in each model's own image."""
    c, pipe = run.config, run.pipe
    maps = over_batches(pipe, run.prompts, run.finished, lambda name, part, text: token_maps(
        pipe, run.plan, text, run.finished[name][part], c.attention_blocks, run.seeds[part]).cpu(), run.batch, "attention")
    for i, (prompt, entities) in enumerate(zip(run.prompts, masks.find_all(run.prompts, run.parser, pipe.tokenizer))):
        words = words_of(prompt, offsets_of(prompt, pipe.tokenizer))
        owners = [next((e for e, entity in enumerate(entities) if set(tokens) & set(entity.tokens)), None)
                  for _, tokens in words]
        kept = [k for k, owner in enumerate(owners) if owner is not None or len(words) <= MOST_WORDS]
        kept = kept or range(MOST_WORDS)
        rows = {}
        for label, images, values in zip(run.labels, run.images, maps):
            found = run.segmenter.masks(images[i:i + 1].to(pipe.device), [[e.noun for e in entities]])[0].cpu()
            rows[label] = images[i], torch.stack([values[i, words[k][1]].sum(0) for k in kept]), found
        attention_chart(prompt, [words[k][0] for k in kept], rows, [owners[k] for k in kept]).savefig(
            folder / f"{i:03d}-attention.png")
    print(f"heat maps of the words: {folder / '*-attention.png'}")


# ---------------------------------------------------------------------------------------------------------------------
# The command

def check(a):
    """The prompts asked for. Raises ValueError, one line naming the flag, for values that cannot be."""
    asked = [*a.prompt, *(prompt_lists.read(a.prompts)[:max(a.n, 0)] if a.prompts else [])]
    asked = [p.strip() for p in asked if p.strip()]
    for prompt in asked:
        prompt_lists.check_text(prompt, "--prompt")
    for flag, value in (("--n", a.n), ("--batch", a.batch)):
        if value < 1:
            raise ValueError(f"{flag} {value}: must be at least 1")
    if not asked:
        raise ValueError("no prompts: give --prompt TEXT, once or several times, or --prompts FILE")
    if a.base_only and a.lora or a.checkpoint != "latest" and (a.base_only or a.lora):
        raise ValueError("--base-only, --lora and --checkpoint exclude each other: give one of them")
    for flag, value in (("--steps", a.steps), ("--guidance-scale", a.guidance_scale), ("--seed", a.seed)):
        if value < 0:
            raise ValueError(f"{flag} {value}: must not be negative")
    if a.to and a.to.exists() and not a.to.is_dir():
        raise ValueError(f"--to {a.to}: is a file; name a folder")
    return asked


def main(a):
    asked = check(a)
    config, pipe, plan = open_run(a.out, a.checkpoint, a.steps, a.lora, a.base_only, a.device)
    guidance_scale = a.guidance_scale or config.guidance_scale
    adapters = {"base": None} if a.base_only else {"base": None, "tuned": diffusion.ADAPTER}
    run = SimpleNamespace(config=config, pipe=pipe, plan=plan, prompts=asked, labels=list(adapters), batch=a.batch,
                          seeds=[a.seed + i for i in range(len(asked))])
    if a.activation or a.attention:  # what may be missing, before any work
        attention.cross_attention_layers(pipe.unet, config.attention_blocks)
        run.parser = masks.load_parser(config.parser)
        run.segmenter = masks.load_segmenter(config, pipe.device) if a.attention else None
    finished = latents(pipe, plan, asked, guidance_scale, config.resolution, adapters.values(), run.seeds, a.batch,
                       "sampling")
    run.finished = dict(zip(adapters.values(), finished))
    run.images = [decode_all(pipe, z, a.batch) for z in finished]
    folder = a.to or (Path(a.out) / "images" if (Path(a.out) / "config.json").is_file() else Path(f"out/{a.out}-images"))
    folder.mkdir(parents=True, exist_ok=True)
    tuned = a.lora or f"{a.out}/checkpoints/{a.checkpoint}"
    for label, images in zip(run.labels, run.images):
        for i, image in enumerate(images):
            save_png(image, folder / f"{i:03d}-{label}.png", prompt=asked[i], seed=run.seeds[i], steps=config.num_steps,
                     guidance_scale=guidance_scale, scheduler=config.scheduler, model=config.model,
                     unet=configuration.parts(config)[0] or config.model, lora=tuned if label == "tuned" else "none")
    grid(asked, dict(zip(run.labels, run.images))).save(folder / "grid.png")
    print(f"{len(asked)} prompt{'s' * (len(asked) > 1)}: {folder / 'grid.png'}")
    if a.activation:
        draw_activation(run, folder / "activation.png")
    if a.attention:
        draw_attention(run, folder)


if __name__ == "__main__":
    gc.enable()
    try:
        main(SimpleNamespace(**parsed))
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {configuration.first_line(error)}")
    except torch.OutOfMemoryError:
        sys.exit("sample.py: out of the GPU's memory: give a smaller --batch, or use another GPU, or --device cpu")
