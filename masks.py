"""Where a prompt's nouns are in an image: GroundingDINO boxes what a noun names, Segment Anything cuts it out of the box.

    python masks.py "a red car and a tall green tree"                                  its entities and their CLIP tokens
    python masks.py "a red car and a tall green tree" --image photo.jpg --to masks.png        and their masks (Grounded-SAM)
    python masks.py "a red circle" --image circle.png --segmenter weights/shapes/segmenter    in the shapes world
    python masks.py --prompts data/train.txt                                           how much of a list becomes entities

The two together are Grounded-SAM (arXiv 2401.14159), the segmenter of the paper's attention losses (section 3.3). The models
are the published ones, by the packages groundingdino-py and segment-anything; two bugs of the packages are fixed here,
each explained where it is fixed.
entities.py finds the nouns.
"""
import sys
from pathlib import Path

import config as configuration

if __name__ == "__main__":
    from typing import Literal

    import tyro

    default = configuration.Config

    def arguments(
            prompt: tyro.conf.Positional[str] = "", prompts: Path | None = None, image: Path | None = None,
            to: Path = Path("masks.png"), segmenter: str = default.segmenter, dino: str = "",
            dino_tokenizer: str = default.dino_tokenizer, sam: str = "", sam_type: Literal["vit_h", "vit_l", "vit_b"] = "vit_h",
            box_threshold: float = default.box_threshold, text_threshold: float = default.text_threshold,
            parser: str = default.parser, device: Literal["auto", "cuda", "cpu"] = "auto"):
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

    parsed = tyro.cli(arguments)

import warnings  # noqa: E402
from types import SimpleNamespace  # noqa: E402
from unittest import mock  # noqa: E402

import torch  # noqa: E402
from filelock import FileLock  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402
from torchvision.ops import box_convert  # noqa: E402

import prompts as prompt_lists  # noqa: E402
from entities import (  # noqa: E402, F401 (who imports masks finds both halves here)
    PARSER,
    Entity,
    find_all,
    find_entities,
    load_parser,
    load_tokenizer,
    repeated_nouns,
    show_entities,
    statistics,
)

DINO_SIDE, DINO_LONGEST = 800, 1333  # short side, and longest side allowed, of GroundingDINO's input (its demo)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, of GroundingDINO's input
MAX_CAPTION = 256  # GroundingDINO cuts its caption there, whatever its configuration says
MAX_BOXES = 64  # of an image, the best ones: bounds SAM's memory where a low threshold lets all 900 through

DINO_HUB = {"repo_id": "ShilongLiu/GroundingDINO", "filename": "groundingdino_swint_ogc.pth",
            "revision": "a94c9b567a2a374598f05c584e96798a170c56fb"}
DINO_SPARE = {"label_enc.weight", "bert.embeddings.position_ids"}  # in its file, in no forward pass: training, a counter
SAM_SITE = "https://dl.fbaipublicfiles.com/segment_anything/"
SAM_FILES = {  # file, sha256 of the file (the hexadecimal in the name is not its beginning), width of the image encoder
    "vit_h": ("sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e", 1280),
    "vit_l": ("sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622", 1024),
    "vit_b": ("sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912", 768),
}


# ---------------------------------------------------------------------------------------------------------------------
# Segmenter

class GroundedSAM(nn.Module):
    """GroundingDINO and SAM, frozen. SAM's image encoder, nearly all the work, runs in `dtype`; the rest in float32."""

    def __init__(self, dino, sam, box_threshold=0.3, text_threshold=0.25, dtype=torch.float32):
        from groundingdino.datasets import transforms
        from segment_anything import SamPredictor
        super().__init__()
        self.dino, self.sam = dino.float(), sam
        for part in sam.children():
            part.to(dtype if part is sam.image_encoder else torch.float32)
        self.eval().requires_grad_(False)
        self.box_threshold, self.text_threshold, self.dtype = box_threshold, text_threshold, dtype
        self.predictor = SamPredictor(sam)
        self.dino_input = transforms.Compose([transforms.RandomResize([DINO_SIDE], DINO_LONGEST), transforms.ToTensor(),
                                              transforms.Normalize(MEAN, STD)])

    @torch.no_grad()
    def masks(self, images, nouns):
        """Images (B, 3, H, W) in [0, 1] and a list of nouns per image -> a list of masks (len(nouns[b]), H, W), 0 or 1. A noun
        that is not found has an empty mask; an image without nouns costs nothing, one without boxes only its share of DINO."""
        height, width = images.shape[-2:]
        found = [torch.zeros(len(names), height, width, device=images.device) for names in nouns]
        captions = [caption_of(names, self.dino.tokenizer) for names in nouns]
        asked = [b for b, (text, _) in enumerate(captions) if text]
        if not asked:
            return found
        pixels = {b: to_bytes(images[b]) for b in asked}
        inputs = torch.stack([self.dino_input(Image.fromarray(pixels[b]), None)[0] for b in asked]).to(images.device)
        with warnings.catch_warnings(action="ignore"):  # of its calls by names that torch will rename
            out = self.dino(inputs, captions=[captions[b][0] for b in asked])
        for b, scores, boxes in zip(asked, out["pred_logits"].sigmoid(), out["pred_boxes"]):
            chosen, noun = boxes_of_nouns(scores, captions[b][1], self.box_threshold, self.text_threshold)
            if len(chosen):
                corners = box_convert(boxes[chosen], "cxcywh", "xyxy") * boxes.new_tensor([width, height, width, height])
                pieces = self.cut_out(pixels[b], corners)
                for k in noun.unique().tolist():
                    found[b][k] = pieces[noun == k].any(0)
        return found

    def cut_out(self, pixels, boxes):
        """What SAM sees in each box: pixels (H, W, 3) uint8, boxes (N, 4) as x0, y0, x1, y1 in pixels -> (N, H, W) bool. One
        pass of the image encoder, then all boxes at once."""
        with torch.autocast(boxes.device.type, self.dtype, enabled=self.dtype != torch.float32):
            self.predictor.set_image(pixels)
        self.predictor.features = self.predictor.features.float()
        boxes = self.predictor.transform.apply_boxes_torch(boxes, pixels.shape[:2])
        return self.predictor.predict_torch(None, None, boxes, multimask_output=False)[0][:, 0]


def to_bytes(image):
    """(3, H, W) in [0, 1] -> (H, W, 3) uint8 array: what both models' own preparation starts from."""
    return (image.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def caption_of(nouns, tokenizer):
    """GroundingDINO's caption "noun . noun ." and each noun's token indices in it, by its place in the text. The caption is
    empty if there is nothing to look for. Nouns beyond MAX_CAPTION are left out with a warning: their indices are empty."""
    text, spans = "", []
    for noun in nouns:
        noun = noun.encode("utf-8", "replace").decode()  # lone surrogates become "?"
        spans.append((len(text), len(text) + len(noun)))
        text += f"{noun} . "
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    tokens = [[i for i, (a, b) in enumerate(offsets) if start < b and a < stop] for start, stop in spans]
    too_long = [k for k, own in enumerate(tokens) if own and own[-1] > MAX_CAPTION - 3]  # a full stop and [SEP] follow
    if too_long:
        cut = too_long[0]
        warnings.warn(f"GroundingDINO reads {MAX_CAPTION} tokens: {len(nouns) - cut} of {len(nouns)} nouns are left out",
                      stacklevel=3)
        text, tokens = text[:spans[cut][0]], tokens[:cut] + [[]] * (len(nouns) - cut)
    return text.rstrip() if any(tokens) else "", tokens


def boxes_of_nouns(scores, tokens, box_threshold, text_threshold):
    """Which boxes to keep, best first, and whose they are: scores (boxes, MAX_CAPTION) in [0, 1], token indices of each noun ->
    (indices of boxes, indices of nouns).

    As in GroundingDINO's demo a box is kept if any token scores `box_threshold`. It belongs to the noun that has the highest
    token, if that scores `text_threshold`. The demo joins all words above that threshold to a phrase, and who compares it
    with the noun loses half-found words ("##board") and boxes between two nouns.
    """
    missing = scores.new_full((len(scores),), -1.0)  # a noun without tokens is never the best
    by_noun = torch.stack([scores[:, own].amax(1) if own else missing for own in tokens], 1)  # (boxes, nouns)
    best, noun = by_noun.max(1)
    order = scores.amax(1).argsort(descending=True, stable=True)
    kept = order[((scores.amax(1) >= box_threshold) & (best >= text_threshold))[order]][:MAX_BOXES]
    return kept, noun[kept]


# ---------------------------------------------------------------------------------------------------------------------
# GroundingDINO on current libraries

class TextEncoder(nn.Module):
    """BERT's embeddings and encoder under GroundingDINO's mask, by which a noun sees only itself.

    Stands for groundingdino's BertModelWarper, which needs methods of BertModel that transformers 5 no longer has. Equal to it
    on transformers 4 (tests/test_grounded_sam.py); the attribute names are the checkpoint's.
    """

    def __init__(self, bert_model):
        super().__init__()
        self.config, self.embeddings = bert_model.config, bert_model.embeddings
        self.encoder, self.pooler = bert_model.encoder, bert_model.pooler

    def forward(self, input_ids, attention_mask, token_type_ids, position_ids):
        """Token, type and position indices (B, L), and who sees whom (B, L, L), bool."""
        hidden = self.embeddings(input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids)
        closed = (~attention_mask[:, None]) * torch.finfo(hidden.dtype).min  # (B, 1, L, L), added to the attention logits
        return {"last_hidden_state": self.encoder(hidden, attention_mask=closed.to(hidden.dtype))[0]}


def mask_per_head(layer, arguments, keywords):
    """groundingdino repeats the batch's masks as 1, 2, 1, 2 where torch's attention wants 1, 1, 2, 2: in a batch, captions were
    read under each other's masks. This hook repeats them in the right order, and the layer then leaves them alone."""
    return arguments, {**keywords, "src_mask": keywords["src_mask"].repeat_interleave(layer.nhead, 0)}


def build_dino(tokenizer, bert=None, **changes):
    """GroundingDINO (Swin-T OGC's configuration, except for `changes`) with random weights, float32, in eval mode.

    tokenizer: a fast BERT tokenizer; bert: a BertConfig, by default bert-base-uncased's. The package would download BERT's
    weights first, only for its own checkpoint to overwrite them.
    """
    from transformers import BertConfig, BertModel
    with warnings.catch_warnings(action="ignore"):  # of imports by old names
        import groundingdino.models.GroundingDINO.groundingdino as package
        from groundingdino.config import GroundingDINO_SwinT_OGC as swin_t
    bert = bert or BertConfig()
    special = tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]", ".", "?"])
    if not tokenizer.is_fast or len(tokenizer) > bert.vocab_size or len({*special, tokenizer.unk_token_id} - {None}) < 5:
        raise ValueError("--dino-tokenizer: GroundingDINO needs the tokenizer of bert-base-uncased")
    changes = {"use_checkpoint": False, "use_transformer_ckpt": False, **changes}  # gradient checkpointing, for training
    settings = {name: value for name, value in vars(swin_t).items() if not name.startswith("_")}
    parts = SimpleNamespace(get_tokenlizer=lambda name: tokenizer, get_pretrained_language_model=lambda name: BertModel(bert))
    with mock.patch.multiple(package, BertModelWarper=TextEncoder, get_tokenlizer=parts):  # only while it is built
        dino = package.build_groundingdino(SimpleNamespace(**{**settings, **changes}))
    for layer in dino.transformer.encoder.text_layers:
        layer.register_forward_pre_hook(mask_per_head, with_kwargs=True)
    return dino.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Weights

def load_grounded_sam(config, device):
    """GroundedSAM with the published weights, from --dino, --dino-tokenizer, --sam and --sam-type, or downloaded once. Raises
    ValueError, one line naming the flag and the fix, for a file or a download that cannot be used."""
    for flag, path in (("--dino", config.dino), ("--sam", config.sam)):
        if path and not Path(path).is_file():
            raise ValueError(f"{flag} {path}: no such file; leave the flag out to download it once")
    dino = load_dino(config.dino or fetch_dino(), load_dino_tokenizer(config.dino_tokenizer))
    sam = load_sam(config.sam or fetch_sam(config.sam_type), config.sam_type)
    dtype = encoder_dtype(config, device)
    return GroundedSAM(dino, sam, config.box_threshold, config.text_threshold, dtype).to(device)


def encoder_dtype(config, device):
    """What SAM's image encoder should run in: --dtype on a GPU, float32 on a CPU. Without the instructions for bfloat16, which
    most CPUs lack, its matrix products are 4 to 25 times slower there and its first convolution 70 times."""
    return torch.float32 if torch.device(device).type == "cpu" else getattr(torch, config.dtype)


def load_dino_tokenizer(source):
    from transformers import AutoTokenizer
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"--dino-tokenizer {source}: no tokenizer there, or no network; name a folder that holds "
                         "bert-base-uncased's vocab.txt and tokenizer_config.json") from error


def load_dino(path, tokenizer):
    """GroundingDINO (Swin-T OGC) with the weights of a file."""
    state = read_checkpoint(path, "--dino").get("model")
    state = {name.removeprefix("module."): value for name, value in state.items()} if isinstance(state, dict) else {}
    return fill(build_dino(tokenizer), {name: value for name, value in state.items() if name not in DINO_SPARE},
                f"--dino {path}: not GroundingDINO's checkpoint {DINO_HUB['filename']}")


def load_sam(path, kind):
    """Segment Anything of the type `kind` with the weights of a file."""
    from segment_anything import sam_model_registry
    state = read_checkpoint(path, "--sam")
    embedding = state.get("image_encoder.pos_embed")  # (1, H, W, width)
    width = embedding.shape[-1] if isinstance(embedding, torch.Tensor) else 0
    is_of = next((name for name, (_, _, w) in SAM_FILES.items() if w == width), None)
    if is_of and is_of != kind:
        raise ValueError(f"--sam {path}: its weights are of type {is_of}, not {kind}; add --sam-type {is_of}")
    return fill(sam_model_registry[kind](), state, f"--sam {path}: not Segment Anything's checkpoint {SAM_FILES[kind][0]}")


def fill(model, state, refusal):
    """The model with these weights; every one has to fit."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:  # torch lists them all
        raise ValueError(f"{refusal} (weights are missing, unknown or of another size)") from error
    return model


def read_checkpoint(path, flag):
    """The dictionary in a file of torch.save; only tensors and plain values are unpickled."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch.load raise nearly anything
        raise ValueError(f"{flag} {path}: not a checkpoint of PyTorch, or not whole ({Path(path).stat().st_size:,} bytes); "
                         "download it again") from error
    return state if isinstance(state, dict) else {}


def fetch_dino():
    """Path of GroundingDINO's checkpoint in the hub's cache; downloads it (694 MB) at first."""
    from huggingface_hub import hf_hub_download
    try:
        return hf_hub_download(**DINO_HUB)
    except (OSError, ValueError) as error:
        address = f"https://huggingface.co/{DINO_HUB['repo_id']}/resolve/{DINO_HUB['revision']}/{DINO_HUB['filename']}"
        raise ValueError(f"{address}: cannot be downloaded; fetch it elsewhere and name it with --dino FILE") from error


def fetch_sam(kind):
    """Path of SAM's checkpoint in torch hub's cache; downloads it (2.6 GB for vit_h) at first. It gets its name when it is
    whole, and of the processes on a machine one downloads and the others wait."""
    name, sha256, _ = SAM_FILES[kind]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.is_file():
                torch.hub.download_url_to_file(SAM_SITE + name, str(path), hash_prefix=sha256)
    except (OSError, RuntimeError) as error:  # RuntimeError: another sha256
        raise ValueError(f"{SAM_SITE}{name}: cannot be downloaded ({error}); get it elsewhere and name it: --sam FILE"
                         ) from error
    return str(path)


def load_segmenter(config, device="cpu"):
    """The noun -> mask model that --segmenter names. Its `masks(images (B, 3, H, W) in [0, 1], nouns per image)` returns per
    image a tensor (nouns, H, W), 0 or 1, empty where the noun was not found. Raises ValueError if it cannot be loaded."""
    if config.segmenter == "grounded-sam":
        return load_grounded_sam(config, device)
    import shapes
    if not (Path(config.segmenter) / "config.json").is_file():
        raise ValueError(f"--segmenter {config.segmenter}: no segmenter there (no config.json)")
    try:
        return shapes.Segmenter.load(config.segmenter).to(device)
    except Exception as error:  # of a damaged folder json, torch and safetensors raise nearly anything
        raise ValueError(f"--segmenter {config.segmenter}: not a segmenter of shapes.py, or not whole "
                         f"({type(error).__name__}: {configuration.first_line(error)})") from error


# ---------------------------------------------------------------------------------------------------------------------
# The command

def read_image(path):
    """An RGB image, turned upright. Raises ValueError naming the file."""
    from PIL import ImageOps
    try:
        if path.is_fifo():  # whose opening may wait for ever
            raise OSError
        return ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except Exception as error:  # of a damaged image Pillow raises nearly anything
        raise ValueError(f"--image {path}: {getattr(error, 'strerror', None) or 'not an image that can be read'}") from error


def show_masks(image, nouns, to, config):
    """Finds the nouns in a PIL image, writes it with their masks, and prints their share of it."""
    from torchvision.transforms.functional import pil_to_tensor

    import diffusion
    import figures
    device = diffusion.choose_device(config)
    found, = load_segmenter(config, device).masks(pil_to_tensor(image)[None].to(device) / 255, [nouns])
    figures.mask_overlay(image, found, nouns).save(to)
    for noun, mask in zip(nouns, found):
        print(f"{noun:16}{100 * mask.mean():.1f} % of the image")
    print(to)


def main(prompt, prompts, image, to, **fields):
    if bool(prompt) == bool(prompts):
        raise ValueError('give one prompt, python masks.py "a red car", or a list of them, --prompts FILE')
    if image and not prompt:
        raise ValueError("--image: its masks are those of a prompt's nouns; give the prompt instead of --prompts")
    if image and not to.parent.is_dir():
        raise ValueError(f"--to {to}: no such folder")
    prompt_lists.check_text(prompt, "prompt")
    picture, nlp = read_image(image) if image else None, load_parser(fields["parser"])
    if prompts:
        for name, value in statistics(prompt_lists.read(prompts), nlp).items():
            print(f"{name:24}{value:.3f}".removesuffix(".000"))
        return
    nouns = [entity.noun for entity in show_entities(prompt, nlp)]
    if picture and nouns:
        show_masks(picture, nouns, to, configuration.Config(**fields, dtype="float32"))


if __name__ == "__main__":
    try:
        main(**parsed)
    except (ValueError, OSError) as error:
        sys.exit(f"masks.py: {configuration.first_line(error)}")
