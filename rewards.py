"""Rewards: what judges an image against its prompt, `reward(images, prompts) -> (B,)`,
differentiable, larger is better. The first is the paper's: a captioner's likelihood of the prompt
(section 3.2).

`--rewards blip=1` names those that a run uses. docs/extend.md shows how to add one.
"""

import torch
import torch.nn.functional as F
from transformers import BlipForConditionalGeneration

from config import reward_weights
from models import load_blip_model

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Blip:
    """log p(prompt | image) of a frozen BlipForConditionalGeneration, in nats.

    The prefix is context and is not scored; the end token is (it says that nothing follows).
    reduction: "sum" over tokens (paper) or "mean" (official code)."""

    def __init__(
        self, model, tokenizer, prefix="a photography of", reduction="sum", label_smoothing=0.0
    ):
        self.model, self.tokenizer = model, tokenizer
        self.prefix, self.reduction, self.label_smoothing = prefix, reduction, label_smoothing

    def __call__(self, images, prompts):
        """Images (B, 3, H, W) in [0, 1] and B prompts -> (B,)."""
        config = self.model.config.text_config
        text = self.tokenizer(
            [f"{self.prefix} {prompt}".strip() for prompt in prompts],
            padding=True,
            truncation=True,
            max_length=config.max_position_embeddings,
            return_tensors="pt",
        ).to(images.device)
        ids = text.input_ids.clone()
        ids[:, 0] = config.bos_token_id  # BLIP was trained with [DEC] first, not [CLS]
        scored = text.attention_mask[:, 1:].float()
        scored[:, : len(self.tokenizer(self.prefix, add_special_tokens=False).input_ids)] = 0
        logits = self.model.text_decoder(
            input_ids=ids,
            attention_mask=text.attention_mask,
            encoder_hidden_states=self.vision(images).last_hidden_state,
        ).logits
        nll = F.cross_entropy(
            logits[:, :-1].float().transpose(1, 2),
            ids[:, 1:],
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        total = (nll * scored).sum(1)
        return -total if self.reduction == "sum" else -total / scored.sum(1)

    def vision(self, images):
        return self.model.vision_model(pixel_values=self.pixels(images))

    def features(self, images):
        """Pooled features of images (B, 3, H, W) in [0, 1]: (B, dim), fp32."""
        return self.vision(images).pooler_output.float()

    def pixels(self, images):
        """Images in [0, 1] -> what BLIP's vision model takes: bicubic to its size, CLIP's mean and
        deviation, its dtype."""
        size = (self.model.config.vision_config.image_size,) * 2
        if images.shape[-2:] != size:
            images = F.interpolate(images.float(), size, mode="bicubic", antialias=True)
        mean, std = images.new_tensor(CLIP_MEAN), images.new_tensor(CLIP_STD)
        return ((images - mean[:, None, None]) / std[:, None, None]).to(self.model.dtype)


def load_blip(config, device):
    dtype, source = getattr(torch, config.dtype), config.captioner
    loaded = load_blip_model("captioner", BlipForConditionalGeneration, source, device, dtype)
    return Blip(*loaded, config.caption_prefix, config.caption_reduction, config.label_smoothing)


REWARDS = {"blip": load_blip}  # name -> loader(config, device) -> reward(images, prompts) -> (B,)


def load_rewards(config, device):
    """{name: reward} of --rewards."""
    names = list(reward_weights(config))
    unknown = [name for name in names if name not in REWARDS]
    if unknown:
        raise ValueError(f"--rewards {unknown[0]}: unknown, there are {', '.join(REWARDS)}")
    return {name: REWARDS[name](config, device) for name in names}
