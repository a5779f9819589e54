"""Images of prompts: base beside tuned, from the same noise, as a labelled grid and one by one.

    python sample.py out/shapes --prompt "a red circle and a blue square" --prompt "a white ring and a black cross"
    python sample.py out/shapes --prompts weights/shapes/prompts/heldout.txt --n 8 --seed 1
"""
import sys
import textwrap
from pathlib import Path

if __name__ == "__main__":
    from typing import Annotated

    import tyro

    def arguments(
            out: tyro.conf.Positional[Path], prompt: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], None] = (),
            prompts: Path | None = None, n: int = 8, seed: int = 0, steps: int = 0, guidance_scale: float = 0.0,
            checkpoint: str = "latest", to: Path | None = None):
        """Images of prompts: base beside tuned, from the same noise, as a labelled grid and one by one.

        Args:
            out: Output folder of train.py.
            prompt: A prompt; may be given several times.
            prompts: A text file of prompts, one a line.
            n: Take the first n prompts of --prompts.
            seed: Seed of the first image; the next has the next.
            steps: Denoising steps; 0 takes the run's.
            guidance_scale: Of classifier-free guidance; 0 takes the run's.
            checkpoint: Folder name below out/checkpoints.
            to: Folder for the images; by default OUT/images.
        """
        return dict(locals())

    parsed = tyro.cli(arguments)

import torch  # noqa: E402
from PIL import Image, ImageDraw, ImageFont  # noqa: E402
from PIL.PngImagePlugin import PngInfo  # noqa: E402
from tqdm import tqdm  # noqa: E402

import config as configuration  # noqa: E402
import diffusion  # noqa: E402
import prompts as prompt_lists  # noqa: E402

SEED = 1_000_000_007  # of the fixed noise of grids and scores, apart from every training seed's
CELL = 160  # side of a picture in a grid, pixels


def open_run(out, checkpoint="latest", num_steps=0):
    """(config, pipeline with the run's adapter `comat`, schedule) of an output folder. Raises ValueError if there is none."""
    folder = out / "checkpoints" / checkpoint
    if not (out / "config.json").is_file():
        raise ValueError(f"{out}: not an output folder of train.py (no config.json)")
    if not (folder / "pytorch_lora_weights.safetensors").is_file():
        raise ValueError(f"{folder}: no finished checkpoint there; train first, or name one of {out / 'checkpoints'}")
    config = configuration.load(out / "config.json")
    config.num_steps = num_steps or config.num_steps
    pipe, plan = diffusion.open_pipeline(config)
    pipe.load_lora_weights(folder, adapter_name=diffusion.ADAPTER)
    return config, pipe, plan


def generate(pipe, plan, prompts, guidance_scale, resolution, adapters=(diffusion.ADAPTER, None), seeds=None, batch=50,
             progress=""):
    """Images (N, 3, H, W) in [0, 1] of prompts for each adapter (None: the original model), all from the same noise: one
    seed per image, so that it depends on neither batch nor order."""
    seeds = seeds or [SEED + i for i in range(len(prompts))]
    size, images = (resolution, resolution), {name: [] for name in adapters}
    for start in tqdm(range(0, len(prompts), batch), desc=progress, disable=not progress):
        text = diffusion.encode(pipe, prompts[start:start + batch])
        for name in adapters:
            generators = [torch.Generator().manual_seed(s) for s in seeds[start:start + batch]]
            noise = diffusion.initial_noise(pipe, size, generators)
            with diffusion.adapter(pipe.unet, name), torch.no_grad():
                z, _ = diffusion.sample(pipe, plan, text, noise, generators, guidance_scale)
            images[name].append(decode_all(pipe, z))
    return [torch.cat(images[name]) for name in adapters]


@torch.no_grad()
def decode_all(pipe, z):
    return torch.cat([diffusion.decode(pipe, part).float().cpu() for part in z.split(8)])


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def to_pil(image):
    """(3, H, W) in [0, 1] -> a PIL image."""
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def grid(prompts, rows, notes=None):
    """A labelled grid: a column per prompt, a row per entry of rows {label: images (N, 3, H, W)}, the prompts on top.
    notes: {label: one short string per image}, written below the pictures."""
    font, small, label_width = ImageFont.load_default(14), ImageFont.load_default(12), 70
    titles = ["\n".join(textwrap.wrap(p, 24)[:4]) for p in prompts]
    top = 8 + 16 * max(t.count("\n") + 1 for t in titles)
    row_height = CELL + (22 if notes else 6)
    canvas = Image.new("RGB", (label_width + len(prompts) * (CELL + 6), top + len(rows) * row_height), "white")
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        draw.multiline_text((label_width + column * (CELL + 6), 4), title, fill="black", font=small)
    for row, (label, images) in enumerate(rows.items()):
        y = top + row * row_height
        draw.text((6, y + CELL // 2 - 8), label, fill="black", font=font)
        for column, image in enumerate(images):
            x, picture = label_width + column * (CELL + 6), to_pil(image)
            enlarge = Image.Resampling.NEAREST if picture.width < CELL else Image.Resampling.LANCZOS
            canvas.paste(picture.resize((CELL, CELL), enlarge), (x, y))
            if notes:
                draw.text((x, y + CELL + 2), notes[label][column], fill="black", font=small)
    return canvas


def save_png(image, path, **metadata):
    """Writes one image with its prompt, seed and so on as PNG text."""
    info = PngInfo()
    for key, value in metadata.items():
        info.add_text(key, str(value))
    to_pil(image).save(path, pnginfo=info)


def main(out, prompt, prompts, n, seed, steps, guidance_scale, checkpoint, to):
    asked = [*prompt, *(prompt_lists.read(prompts)[:n] if prompts else [])]
    if not asked:
        raise ValueError("no prompts: give --prompt TEXT, once or several times, or --prompts FILE")
    config, pipe, plan = open_run(out, checkpoint, steps)
    seeds = [seed + i for i in range(len(asked))]
    tuned, base = generate(pipe, plan, asked, guidance_scale or config.guidance_scale, config.resolution, seeds=seeds,
                           batch=8, progress="sampling")
    folder = to or out / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for name, images in (("base", base), ("tuned", tuned)):
        for i, image in enumerate(images):
            save_png(image, folder / f"{i:03d}-{name}.png", prompt=asked[i], seed=seeds[i], model=config.model, adapter=name)
    grid(asked, {"base": base, "tuned": tuned}).save(folder / "grid.png")
    print(f"{len(asked)} prompts: {folder / 'grid.png'}")


if __name__ == "__main__":
    try:
        main(**parsed)
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {str(error).splitlines()[0]}")
