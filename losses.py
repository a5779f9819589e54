"""CoMat's formulas (arXiv 2404.03653): caption likelihood, token and pixel attention losses, adversarial losses.

All are computed in fp32, whatever the models' dtype.
"""
from pathlib import Path

import torch
import torch.nn.functional as F

import config as configuration
import diffusion

# ---------------------------------------------------------------------------------------------------------------------
# Concept matching (section 3.2)

def caption_loss(captioner, tokenizer, images, prompts, prefix="a photography of", reduction="sum", label_smoothing=0.0):
    """-log p(prompt | image) of a BlipForConditionalGeneration, one value per image: (B,), in nats.

    images (B, 3, H, W) in [0, 1]. The prefix is context and is not scored; the end token is (it says that there is nothing
    more to say). reduction: "sum" over tokens (the paper) or "mean" (the official code); no label smoothing unless asked.
    """
    text = tokenizer([f"{prefix} {p}".strip() for p in prompts], padding=True, truncation=True,
                     max_length=captioner.config.text_config.max_position_embeddings, return_tensors="pt").to(images.device)
    ids = text.input_ids.clone()
    ids[:, 0] = captioner.config.text_config.bos_token_id  # BLIP's decoder was trained with [DEC] first, not [CLS]
    scored = text.attention_mask[:, 1:].float()
    scored[:, :len(tokenizer(prefix, add_special_tokens=False).input_ids)] = 0
    features = captioner.vision_model(pixel_values=captioner_input(captioner, images)).last_hidden_state
    logits = captioner.text_decoder(input_ids=ids, attention_mask=text.attention_mask, encoder_hidden_states=features).logits
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none",
                             label_smoothing=label_smoothing)
    total = (losses * scored).sum(1)
    return total if reduction == "sum" else total / scored.sum(1)


def load_captioner(source, device, dtype):
    """(frozen captioner, its tokenizer) from a hub id or a folder of a BlipForConditionalGeneration."""
    from transformers import BlipForConditionalGeneration
    if source.startswith((".", "/")) and not (Path(source) / "config.json").is_file():
        raise ValueError(f"--captioner {source}: no captioner there (no config.json)")
    return load_judge("captioner", BlipForConditionalGeneration, source, device, dtype)


def load_judge(flag, cls, source, device, dtype, tolerated=0.1):
    """(frozen model, its tokenizer) of a BLIP class. Raises ValueError, naming the flag, if they cannot be loaded or more
    than a share `tolerated` of the weights is missing."""
    from transformers import AutoTokenizer
    try:
        model = diffusion.load_whole(cls, source, tolerated, dtype=dtype).to(device)
        tokenizer = AutoTokenizer.from_pretrained(source)
        diffusion.check_tokenizer(tokenizer, model.config.text_config.vocab_size)
    except Exception as error:  # of a damaged folder transformers and safetensors raise nearly anything
        raise ValueError(f"--{flag} {source}: cannot be loaded ({configuration.first_line(error)})") from error
    return model.requires_grad_(False).eval(), tokenizer


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def captioner_input(captioner, images):
    """Images in [0, 1] -> what BLIP's vision model receives: bicubic to its size, CLIP's mean and deviation, its dtype."""
    size = captioner.config.vision_config.image_size
    if images.shape[-2:] != (size, size):
        images = F.interpolate(images.float(), (size, size), mode="bicubic", antialias=True, align_corners=False)
    mean, std = (torch.tensor(v, device=images.device)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    return ((images - mean) / std).to(captioner.dtype)


def shifted_copies(images, copies, shift, generator=None):
    """`copies` of each image (B, 3, H, W), each moved by up to `shift` of its side with the border repeated:
    (copies * B, 3, H, W). The captioner's gradient averaged over them is less noisy than at one position."""
    height, width = images.shape[-2:]
    y, x = round(shift * height), round(shift * width)
    if copies == 1 and not (x or y):
        return images
    padded = F.pad(images, (x, x, y, y), mode="replicate")
    corners = torch.stack([torch.randint(0, 2 * r + 1, (copies * len(images),), generator=generator) for r in (y, x)], 1)
    return torch.stack([padded[i % len(images), :, top:top + height, left:left + width]
                        for i, (top, left) in enumerate(corners.tolist())])


# ---------------------------------------------------------------------------------------------------------------------
# Attribute concentration (section 3.3)

def resize_masks(masks, size):
    """Masks (N, H, W) -> (N, *size), 0 or 1: area-averaged and cut at one half; a mask that is not empty but smaller than a
    cell keeps the cell where it covers most."""
    if not len(masks):
        return masks.new_zeros((0, *size))
    area = F.adaptive_avg_pool2d(masks.float()[:, None], size)[:, 0]
    peak = area.amax((1, 2), keepdim=True)
    return ((area >= 0.5) | ((peak < 0.5) & (peak > 0) & (area == peak))).float()


def token_loss(attention, tokens, masks, reduction="paper"):
    """Pulls each entity's attention into its mask: the share of a token's attention that falls outside.

    attention: the maps of one image, one (heads, h, w, text tokens) per layer; tokens: per entity the indices of its noun and
    attributes; masks: (entities, H, W), any resolution. "paper" (section 3.3): maps averaged over heads, mean over
    entities of the sum over tokens of (1 - share inside), mean over layers. "official": the share averaged over heads,
    squared, mean over tokens, sum over layers. No entity: 0.
    """
    if not tokens:
        return attention[0].sum() * 0
    layers = []
    for maps in attention:
        maps = maps.float().mean(0, keepdim=True) if reduction == "paper" else maps.float()
        mask = resize_masks(masks, maps.shape[1:3])
        terms = []
        for m, k in zip(mask, tokens):
            a = maps[..., list(k)]  # (heads, h, w, tokens of the entity)
            outside = 1 - ((a * m[..., None]).sum((1, 2)) / a.sum((1, 2)).clamp(min=1e-8)).mean(0)
            terms.append(outside.sum() if reduction == "paper" else outside.square().mean())
        layers.append(torch.stack(terms).mean())
    return torch.stack(layers).mean() if reduction == "paper" else torch.stack(layers).sum()


def pixel_loss(attention, tokens, masks, reduction="paper"):
    """Binary cross-entropy, mean over all pixels and entities, of an entity's summed attention against its mask. An absent
    entity has an empty mask and counts.

    Arguments as token_loss. Maps of one resolution are averaged over heads and layers first; over several resolutions
    the "paper" reduction is the mean, the "official" one the sum.
    """
    if not tokens:
        return attention[0].sum() * 0
    terms = []
    for size in dict.fromkeys(maps.shape[1:3] for maps in attention):
        maps = torch.stack([m.float().mean(0) for m in attention if m.shape[1:3] == size]).mean(0)
        summed = torch.stack([maps[..., list(k)].sum(-1) for k in tokens])
        inside, mask = summed.clamp(1e-6, 1 - 1e-6), resize_masks(masks, size)
        terms.append(-torch.where(mask > 0, inside.log(), (1 - inside).log()).mean())
    return torch.stack(terms).mean() if reduction == "paper" else torch.stack(terms).sum()


# ---------------------------------------------------------------------------------------------------------------------
# Fidelity preservation (section 3.4)

def discriminator_loss(real, fake):
    """Binary cross-entropy of the discriminator's logits: -log D(z0) - log(1 - D(z0')), mean over images and pixels."""
    return F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean()


def generator_loss(fake):
    """The generator's side, non-saturating (Goodfellow 2014, section 3): -log D(z0'), mean over images and pixels."""
    return F.softplus(-fake.float()).mean()
