"""The command line of masks.py: prints the entities of a prompt and draws their masks over an image; see there."""
import sys
from pathlib import Path
from typing import Literal

import tyro

import config as configuration
import masks

DEFAULT = configuration.Config()
PALETTE = ((230, 60, 60), (60, 120, 240), (40, 180, 80), (240, 180, 30), (170, 80, 220), (30, 190, 200), (240, 120, 40))


def arguments(
        prompt: tyro.conf.Positional[str] = "", prompts: Path | None = None, image: Path | None = None,
        to: Path = Path("masks.png"), segmenter: str = DEFAULT.segmenter, dino: str = "",
        dino_tokenizer: str = DEFAULT.dino_tokenizer, sam: str = "", sam_type: Literal["vit_h", "vit_l", "vit_b"] = "vit_h",
        box_threshold: float = DEFAULT.box_threshold, text_threshold: float = DEFAULT.text_threshold,
        parser: str = DEFAULT.parser, device: Literal["auto", "cuda", "cpu"] = "auto"):
    """The entities of a prompt, their CLIP tokens, and where they are in an image.

    Args:
        prompt: A prompt.
        prompts: A list of prompts instead: prints how much of it becomes entities.
        image: An image to look for the prompt's nouns in.
        to: Where to write it with the masks drawn over.
        segmenter: "grounded-sam", or the folder of a segmenter of shapes.py.
        dino: GroundingDINO's checkpoint file (Swin-T OGC); empty downloads it once.
        dino_tokenizer: GroundingDINO's tokenizer: a hub id or a folder.
        sam: SAM's checkpoint file; empty downloads it once.
        sam_type: SAM's image encoder; vit_b is seven times smaller.
        box_threshold: Least score of a box of GroundingDINO.
        text_threshold: Least score of a word for its box.
        parser: spaCy pipeline that finds nouns and attributes.
        device: cuda, cpu or auto.
    """
    return dict(locals())


def show_entities(prompt, nlp):
    """Prints a prompt's entities, a line each: noun, attributes, CLIP tokens by index. Returns them."""
    tokenizer, entities = masks.load_tokenizer(), masks.find_entities(prompt, nlp)
    ids = tokenizer(prompt)["input_ids"]
    for entity in entities:
        tokens = "  ".join(f"{i} {tokenizer.decode(ids[i]).strip()}" for i in entity.tokens)
        print(f"{entity.noun:16}{', '.join(entity.attributes) or '-':32}{tokens}")
    for lemma in masks.repeated_nouns(prompt, nlp):
        print(f"{lemma:16}left out: it occurs more than once")
    if not entities:
        print("no entity")
    return entities


def read_image(path):
    """An RGB image, turned upright. Raises ValueError naming the file."""
    from PIL import Image, ImageOps
    try:
        return ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except OSError as error:
        raise ValueError(f"--image {path}: {error.strerror or 'not an image that can be read'}") from error


def draw(image, found, labels):
    """A PIL image with masks (N, H, W) drawn over it, each in its colour with its label; one not found is named at the top."""
    from PIL import Image, ImageDraw, ImageFont
    enlarge = max(1, 384 // min(image.size))  # the shapes world has 32 pixels
    size = (image.width * enlarge, image.height * enlarge)
    image = image.resize(size, Image.Resampling.NEAREST)
    areas = [Image.fromarray((mask * 255).byte().cpu().numpy()).resize(size, Image.Resampling.NEAREST) for mask in found]
    colours = [PALETTE[k % len(PALETTE)] for k in range(len(areas))]
    for area, colour in zip(areas, colours):
        image.paste(Image.new("RGB", size, colour), mask=area.point(lambda value: value // 2))
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(16)
    for k, (area, colour, label) in enumerate(zip(areas, colours, labels)):
        if box := area.getbbox():
            place, anchor = ((box[0] + box[2]) // 2, (box[1] + box[3]) // 2), "mm"
        else:
            place, anchor, label = (6, 6 + 20 * k), "la", f"{label}: not found"
        pen.text(place, label, colour, font, anchor, stroke_width=3, stroke_fill="white")
    return image


def show_masks(image, nouns, to, config):
    """Finds the nouns in a PIL image, writes it with their masks, and prints their share of it."""
    import torch
    from torchvision.transforms.functional import pil_to_tensor
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this torch sees no GPU; use --device cpu")
    segmenter = masks.load_segmenter(config, device)
    found, = segmenter.masks(pil_to_tensor(image)[None].to(device) / 255, [nouns])
    draw(image, found, nouns).save(to)
    for noun, mask in zip(nouns, found):
        print(f"{noun:16}{100 * mask.mean():.1f} % of the image")
    print(to)


def run(prompt, prompts, image, to, **fields):
    if bool(prompt) == bool(prompts):
        raise ValueError('give one prompt, python masks.py "a red car", or a list of them, --prompts FILE')
    if image and not prompt:
        raise ValueError("--image: its masks are those of a prompt's nouns; give the prompt instead of --prompts")
    if image and not to.parent.is_dir():
        raise ValueError(f"--to {to}: no such folder")
    picture, nlp = read_image(image) if image else None, masks.load_parser(fields["parser"])
    if prompts:
        import prompts as prompt_lists
        for name, value in masks.statistics(prompt_lists.read(prompts), nlp).items():
            print(f"{name:24}{value:.3f}".removesuffix(".000"))
        return
    nouns = [entity.noun for entity in show_entities(prompt, nlp)]
    if picture and nouns:
        show_masks(picture, nouns, to, configuration.Config(**fields, dtype="float32"))


def main():
    try:
        run(**tyro.cli(arguments))
    except (ValueError, OSError) as error:
        sys.exit(f"masks.py: {str(error).splitlines()[0]}")
