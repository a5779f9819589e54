"""Rewards: what judges an image against its prompt, `reward(images, prompts) -> (B,)`,
differentiable, larger is better. `--rewards blip=1 pickscore=0.5` names those that a run uses:

    blip         log p(prompt | image) of a captioner, the paper's (section 3.2)
    clip         cosine of CLIP's embeddings of image and prompt (Radford et al. 2021)
    pickscore    PickScore's, times its logit scale (Kirstain et al. 2023, arXiv 2305.01569)
    hpsv2        HPSv2's cosine; its tables show it times 100 (Wu et al. 2023, arXiv 2306.09341)

The models' flags are --captioner, --clip, --pickscore, --hpsv2. docs/extend.md adds a reward.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from transformers import BlipForConditionalGeneration, CLIPModel, CLIPProcessor

from config import reward_weights
from models import check_tokenizer, load_blip_model, load_whole, naming

BICUBIC = TF.InterpolationMode.BICUBIC
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PROCESSORS = {  # model -> processor, as its card says; for all others, the model's own
    "yuvalkirstain/PickScore_v1": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "adams-story/HPSv2-hf": "openai/clip-vit-base-patch32",
}


def tokenize(model, tokenizer, texts):
    """Texts, padded to the longest of them and cut at the model's context."""
    context = model.config.text_config.max_position_embeddings
    how = {"padding": True, "truncation": True, "max_length": context, "return_tensors": "pt"}
    return tokenizer(texts, **how)


@dataclass(eq=False)
class Blip:
    """log p(prompt | image) of a frozen BlipForConditionalGeneration, in nats.

    The prefix is context and is not scored. The end token says that nothing follows, so that an
    object too many costs there; it counts end_factor times. reduction: "sum" over a caption's
    tokens (paper), or "mean" over the batch's tokens (official code; then the mean over images is
    that mean)."""

    model: BlipForConditionalGeneration
    tokenizer: object
    prefix: str = "a photography of"
    reduction: str = "sum"
    label_smoothing: float = 0.0
    end_factor: float = 1.0

    def __call__(self, images, prompts):
        """Images (B, 3, H, W) in [0, 1] and B prompts -> (B,)."""
        log_p, _, scored = self.token_log_likelihood(images, prompts)
        total = (log_p * scored).sum(1)
        return total if self.reduction == "sum" else total * len(total) / scored.sum()

    def size(self, prompts):
        """What the mean over some images of a batch weighs in the batch's mean."""
        return len(prompts) if self.reduction == "sum" else self.tokenize(prompts)[1].sum().item()

    def token_log_likelihood(self, images, prompts):
        """log p of each token given the image and those before it (B, L), label smoothing included;
        the tokens' ids (B, L); and their weights in the score (B, L), 0 for those not scored."""
        text, scored = self.tokenize(prompts)
        text, scored = text.to(images.device), scored.to(images.device)
        ids = text.input_ids.clone()
        ids[:, 0] = self.model.config.text_config.bos_token_id  # [DEC], as in training, not [CLS]
        seen = self.model.vision_model(pixel_values=self.pixels(images))
        logits = self.model.text_decoder(
            input_ids=ids,
            attention_mask=text.attention_mask,
            encoder_hidden_states=seen.last_hidden_state,
            use_cache=False,
        ).logits
        nll = F.cross_entropy(
            logits[:, :-1].float().transpose(1, 2),
            ids[:, 1:],
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        return -nll, ids[:, 1:], scored

    def tokenize(self, prompts):
        """(tokenized captions (B, 1 + L), weights of the last L tokens in the score (B, L))."""
        captions = [f"{self.prefix} {prompt}".strip() for prompt in prompts]
        text = tokenize(self.model, self.tokenizer, captions)
        scored = text.attention_mask[:, 1:].float()
        context = len(self.tokenizer(self.prefix, add_special_tokens=False).input_ids)
        scored[:, :context] = 0
        end = text.attention_mask.sum(1, keepdim=True) - 2  # the last before the padding
        scored.scatter_(1, end, self.end_factor)
        return text, scored

    def pixels(self, images):
        """Images in [0, 1] -> what BLIP's vision model takes: bicubic to its size, CLIP's mean and
        deviation, its dtype."""
        size = [self.model.config.vision_config.image_size] * 2
        images = TF.resize(images, size, BICUBIC, antialias=True)
        return TF.normalize(images, CLIP_MEAN, CLIP_STD).to(self.model.dtype)


def load_blip(config, device):
    dtype, source = getattr(torch, config.dtype), config.captioner
    loaded = load_blip_model("captioner", BlipForConditionalGeneration, source, device, dtype)
    how = config.caption_prefix, config.caption_reduction, config.label_smoothing
    blip = Blip(*loaded, *how, config.caption_end_factor)
    _, scored = blip.tokenize(["a"])
    if scored.count_nonzero() < 2:
        raise ValueError("--caption-prefix: so long that it leaves the captioner no prompt to read")
    return blip


class Clip:
    """Cosine of a frozen CLIPModel's embeddings of image and prompt, times `scale`, in fp32.

    As transformers' CLIPProcessor and CLIPModel; where a gradient is needed, less the processor's
    two roundings to 8 bits."""

    def __init__(self, model, processor, scale=1.0):
        self.model, self.tokenizer, self.scale = model, processor.tokenizer, scale
        self.processor = processor.image_processor

    def __call__(self, images, prompts):
        """Images (B, 3, H, W) in [0, 1] and B prompts -> (B,)."""
        text = tokenize(self.model, self.tokenizer, list(prompts)).to(images.device)
        output = self.model(**text, pixel_values=self.pixels(images))
        image, prompt = output.image_embeds.float(), output.text_embeds.float()
        return self.scale * F.cosine_similarity(image, prompt)

    def pixels(self, images):
        """Images in [0, 1] -> what the vision model takes: the short side bicubic to its size, the
        centre, the processor's mean and deviation, the model's dtype."""
        if not torch.is_grad_enabled():
            pictures = list((255 * images.clamp(0, 1)).round().byte().cpu())
            pixels = self.processor(pictures, return_tensors="pt").pixel_values
            return pixels.to(images.device, self.model.dtype)
        size = self.model.config.vision_config.image_size
        images = TF.resize(images, size, BICUBIC, antialias=True).clamp(0, 1)
        images = TF.center_crop(images, size)
        mean, std = self.processor.image_mean, self.processor.image_std
        return TF.normalize(images, mean, std).to(self.model.dtype)


def load_clip(name, config, device, scaled=False):
    """The Clip of --name. scaled: times the model's logit scale."""
    source = getattr(config, name)
    with naming(name, source):
        model = load_whole(CLIPModel, source, tolerated=0, dtype=torch.float32)
        processor = CLIPProcessor.from_pretrained(PROCESSORS.get(source, source))
        check_tokenizer(processor.tokenizer, model.config.text_config.vocab_size)
    scale = model.logit_scale.exp().item() if scaled else 1.0  # bf16 would make 98.9 of 100
    model = model.to(device, getattr(torch, config.dtype))
    return Clip(model.requires_grad_(False).eval(), processor, scale)


REWARDS = {  # name -> loader(config, device) -> reward(images, prompts) -> (B,)
    "blip": load_blip,
    "clip": partial(load_clip, "clip"),
    "pickscore": partial(load_clip, "pickscore", scaled=True),
    "hpsv2": partial(load_clip, "hpsv2"),
}


def load_rewards(config, device):
    """{name: reward} of --rewards."""
    names = list(reward_weights(config))
    unknown = [name for name in names if name not in REWARDS]
    if unknown:
        raise ValueError(f"--rewards {unknown[0]}: unknown, there are {', '.join(REWARDS)}")
    return {name: REWARDS[name](config, device) for name in names}
