"""Where a prompt's nouns are in an image: GroundingDINO boxes what a noun names, SAM cuts it out.

    python masks.py "a red car and a tall green tree"      its entities and their CLIP tokens
    python masks.py "a red car and a tall green tree" --image photo.jpg --to masks.png
    python masks.py "a red circle" --image circle.png --segmenter shapes/weights/segmenter
    python masks.py --prompts data/train.txt               how much of a list becomes entities

The two together are Grounded-SAM (arXiv 2401.14159), the paper's choice (section 3.3).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from config import Config, Share, check_numbers


@dataclass
class Options:
    prompt: tyro.conf.Positional[str] = ""  # A prompt.
    prompts: Path | None = None  # A list of prompts in its place: statistics.
    image: Path | None = None  # An image to look for the prompt's nouns in.
    to: Path = Path("masks.png")  # Where to write it with the masks over it.
    segmenter: str = Config.segmenter  # This and the flags below: as in train.py.
    dino: str = Config.dino
    sam: str = Config.sam
    box_threshold: Share = Config.box_threshold
    text_threshold: Share = Config.text_threshold
    parser: str = Config.parser
    device: Literal["auto", "cuda", "cpu"] = Config.device
    dtype: Literal["bfloat16", "float32"] = "float32"


if __name__ == "__main__":
    options = tyro.cli(Options, description=__doc__)

import torch
import transformers
from PIL import Image, ImageOps
from torchvision.ops import box_convert
from torchvision.transforms.functional import pil_to_tensor

import entities
import prompts as prompt_lists
import utils
from models import check_tokenizer, load_whole, naming

MAX_CAPTION = 256  # tokens that GroundingDINO reads; nouns beyond them are not found
MAX_RATIO = 16  # of an image's sides: GroundingDINO would shrink the shorter one to nothing
MAX_BOXES = 64  # an image, the best: bounds SAM's memory if a threshold lets all 900 through


def bytes_of(images):
    """Images in [0, 1] -> the bytes that the processors of transformers take."""
    return (images.clamp(0, 1) * 255).round().byte()


class GroundingDINO(torch.nn.Module):
    """GroundingDINO, frozen: the boxes that nouns name."""

    def __init__(self, dino, tokenizer, box_threshold, text_threshold):
        super().__init__()
        self.dino = dino.float()
        self.tokenizer = tokenizer
        self.box_threshold = box_threshold
        self.text_threshold = text_threshold
        self.dino_input = transformers.GroundingDinoImageProcessor()
        self.eval().requires_grad_(False)

    def detect(self, pixels, nouns):
        """A picture (3, H, W), bytes -> boxes (N, 4), best first, as x0, y0, x1, y1 in shares of
        the width and height; the index of each one's noun (N,); its score for the noun (N,).

        As in its demo a box counts if any token scores box_threshold. It is the noun's with the
        highest token, if that scores text_threshold; the demo joins all words above it."""
        caption, of_noun = caption_of(nouns, self.tokenizer)
        image = self.dino_input(pixels, return_tensors="pt")
        out = self.dino(**image, **caption.to(pixels.device))
        tokens = of_noun.shape[1]
        scores = out.logits[0, :, :tokens].sigmoid()  # (boxes, tokens)
        of_others = ~of_noun.to(pixels.device)
        of_nouns = scores[:, None].masked_fill(of_others, -1)
        best_of_noun, owners = of_nouns.amax(2).max(1)
        best, order = scores.amax(1).sort(descending=True, stable=True)
        is_box = best >= self.box_threshold
        is_nouns = best_of_noun[order] >= self.text_threshold
        kept = order[is_box & is_nouns][:MAX_BOXES]
        boxes = box_convert(out.pred_boxes[0, kept], "cxcywh", "xyxy")
        return boxes, owners[kept], best_of_noun[kept]

    @torch.no_grad()
    def features(self, images):
        """Images (B, 3, H, W) in [0, 1] -> (B, dim): the mean of the backbone's last map."""
        pixels = bytes_of(images)
        inputs = self.dino_input(list(pixels), return_tensors="pt")
        maps, _ = self.dino.model.backbone(**inputs)
        last, _ = maps[-1]
        return last.mean((2, 3))


class GroundedSAM(GroundingDINO):
    """GroundingDINO and SAM, frozen; SAM's image encoder, nearly all the work, runs in `dtype`."""

    def __init__(self, dino, tokenizer, sam, box_threshold, text_threshold, dtype):
        super().__init__(dino, tokenizer, box_threshold, text_threshold)
        self.sam = sam.float().eval().requires_grad_(False)
        self.sam.vision_encoder.to(dtype)
        self.dtype = dtype
        side = sam.config.vision_config.image_size
        self.sam_input = transformers.SamImageProcessor(
            size={"longest_edge": side}, pad_size={"height": side, "width": side}
        )

    @torch.no_grad()
    def masks(self, images, nouns):
        """Images (B, 3, H, W) in [0, 1], nouns per image -> list of masks (nouns, H, W), 0 or 1;
        the mask of a noun that is not found is empty. An image without nouns costs nothing."""
        size, masks = images.shape[-2:], []
        pixels = bytes_of(images)
        for image, names in zip(pixels, nouns):
            its_masks = images.new_zeros(len(names), *size)
            boxes, owners, _ = self.detect(image, names) if names else ([], [], [])
            pieces = self.cut_out(image, boxes) if len(boxes) else []
            for owner, piece in zip(owners, pieces):
                its_masks[owner, piece] = 1
            masks.append(its_masks)
        return masks

    def cut_out(self, pixels, boxes):
        """SAM: boxes (N, 4) as above -> what they hold (N, H, W), bool."""
        inputs = self.sam_input(pixels, return_tensors="pt")
        pixel_values = inputs.pixel_values.to(self.dtype)
        embedding = self.sam.get_image_embeddings(pixel_values).float()
        height, width = inputs.reshaped_input_sizes[0].tolist()
        boxes = boxes * boxes.new_tensor([width, height, width, height])
        out = self.sam(image_embeddings=embedding, input_boxes=boxes[None], multimask_output=False)
        sizes = inputs.original_sizes, inputs.reshaped_input_sizes
        (masks,) = self.sam_input.post_process_masks(out.pred_masks, *sizes)
        return masks[:, 0]


def caption_of(nouns, tokenizer):
    """GroundingDINO's caption "noun . noun .", and whose its tokens are: (nouns, tokens) bool."""
    words = []
    for noun in nouns:
        words += [noun, "."]
    options = {"truncation": True, "max_length": MAX_CAPTION, "return_tensors": "pt"}
    caption = tokenizer(words, is_split_into_words=True, **options)
    word_of_token = [-1 if index is None else index for index in caption.word_ids()]
    word_of_noun = 2 * torch.arange(len(nouns))
    return caption, torch.tensor(word_of_token) == word_of_noun[:, None]


def load_dino(source):
    """(GroundingDINO, its tokenizer) of a hub id or a folder. Raises ValueError, naming --dino."""
    with naming("dino", source):
        dino = load_whole(transformers.GroundingDinoForObjectDetection, source, tolerated=0)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        check_tokenizer(tokenizer, dino.config.text_config.vocab_size)
    return dino, tokenizer


def load_detector(config, device):
    """The GroundingDINO of a Config, on a torch.device."""
    parts = load_dino(config.dino)
    return GroundingDINO(*parts, config.box_threshold, config.text_threshold).to(device)


def load_segmenter(config, device):
    """What --segmenter names, on a torch.device; `masks` as in GroundedSAM. Raises ValueError."""
    if config.segmenter != "grounded-sam":
        from shapes import world  # the only segmenter besides

        with naming("segmenter", config.segmenter):
            return world.Segmenter.load(config.segmenter).to(device)
    dino, tokenizer = load_dino(config.dino)
    with naming("sam", config.sam):
        sam = load_whole(transformers.SamModel, config.sam, tolerated=0)
    dtype = torch.float32 if device.type == "cpu" else getattr(torch, config.dtype)
    thresholds = config.box_threshold, config.text_threshold
    return GroundedSAM(dino, tokenizer, sam, *thresholds, dtype).to(device)


def read_image(path):
    """A PIL image, upright. Raises ValueError."""
    with naming("image", path):
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    if max(image.size) > MAX_RATIO * min(image.size):
        width, height = image.size
        raise ValueError(f"--image {path}: {width} x {height}; at most {MAX_RATIO} : 1 is read")
    return image


def main(options):
    from tools import figures  # training does not draw

    if bool(options.prompt) == bool(options.prompts):
        raise ValueError('give one prompt, such as "a red car", or a list of them, --prompts FILE')
    check_numbers(options)
    nlp = entities.load_parser(options.parser)
    if options.prompts:
        for name, value in entities.statistics(prompt_lists.read(options.prompts), nlp).items():
            print(f"{name:24}{value:.3f}".removesuffix(".000"))
        return
    nouns = [entity.noun for entity in entities.show_entities(options.prompt, nlp)]
    if not (options.image and nouns):
        return
    image = read_image(options.image)
    kind = Image.registered_extensions().get(options.to.suffix.lower())
    if options.to.is_dir() or not kind:
        raise ValueError(f"--to {options.to}: a picture's name, such as masks.png, is expected")
    utils.check_writable("--to", options.to.parent)  # known before the work, not after
    device = utils.choose_device(options)
    pixels = pil_to_tensor(image)[None].to(device) / 255
    masks = load_segmenter(options, device).masks(pixels, [nouns])[0]
    picture = figures.mask_overlay(image, masks, nouns)
    with utils.whole_file(options.to) as file:
        picture.save(file, kind)
    for noun, mask in zip(nouns, masks):
        print(f"{noun:16}{100 * mask.mean():.1f} % of the image")
    print(options.to)


if __name__ == "__main__":
    with utils.one_line_errors("masks.py"):
        main(options)
