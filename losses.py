"""CoMat's formulas (arXiv 2404.03653): token and pixel attention losses, adversarial losses.

The caption likelihood is a reward (rewards.py). All are computed in fp32. The attention losses take
the maps of one image, {layer name: (heads, h, w, text tokens)}; per entity the token indices of its
noun and attributes; and the entities' masks (entities, H, W) of any resolution.
"""

from collections import defaultdict

import torch
import torch.nn.functional as F

# --------------------------------------------------------------------------------------------------
# Attribute concentration (section 3.3): attention belongs into the entity's mask


def token_loss_paper(attention, tokens, masks):
    """Maps averaged over heads; per entity the sum over its tokens of the share of attention that
    falls outside its mask; mean over entities, then over layers."""
    layers = []
    for maps in attention.values():
        average = maps.float().mean(0, keepdim=True)
        shares = shares_outside(average, tokens, masks)
        per_entity = torch.stack([share.sum() for share in shares])
        layers.append(per_entity.mean())
    return torch.stack(layers).mean()


def token_loss_official(attention, tokens, masks):
    """The share inside averaged over heads; the share outside squared; mean over an entity's tokens
    and over entities; sum over layers."""
    layers = []
    for maps in attention.values():
        shares = shares_outside(maps.float(), tokens, masks)
        per_entity = torch.stack([share.square().mean() for share in shares])
        layers.append(per_entity.mean())
    return torch.stack(layers).sum()


def shares_outside(maps, tokens, masks):
    """Per entity the share of each of its tokens' attention outside its mask, mean over heads."""
    shares = []
    resized = resize_masks(masks, maps.shape[1:3])
    for mask, indices in zip(resized, tokens):
        a = maps[..., list(indices)]  # (heads, h, w, tokens of the entity)
        total = a.sum((1, 2)).clamp(min=1e-8)
        inside = (a * mask[..., None]).sum((1, 2))
        shares.append(1 - (inside / total).mean(0))
    return shares


def pixel_loss_paper(attention, tokens, masks):
    """Binary cross-entropy of an entity's summed attention against its mask, mean over pixels and
    entities; maps of one resolution are averaged first, and the mean is over resolutions. An absent
    entity has an empty mask and counts."""
    groups = average_by(attention, lambda name, maps: maps.shape[1:3])
    terms = [cross_entropy(maps, tokens, masks) for maps in groups]
    return torch.stack(terms).mean()


def pixel_loss_official(attention, tokens, masks):
    """The same, with a group per resolution and place (mid, up), summed over groups."""
    groups = average_by(attention, lambda name, maps: (name.split("_")[0], maps.shape[1:3]))
    terms = [cross_entropy(maps, tokens, masks) for maps in groups]
    return torch.stack(terms).sum()


def average_by(attention, key):
    """Maps averaged over heads and over the layers of one key: a list of (h, w, text tokens)."""
    groups = defaultdict(list)
    for name, maps in attention.items():
        average = maps.float().mean(0)
        groups[key(name, maps)].append(average)
    return [torch.stack(group).mean(0) for group in groups.values()]


def cross_entropy(maps, tokens, masks):
    summed = [maps[..., list(indices)].sum(-1) for indices in tokens]
    p = torch.stack(summed).clamp(1e-6, 1 - 1e-6)
    mask = resize_masks(masks, p.shape[1:])
    log_likelihood = torch.where(mask > 0, p.log(), (1 - p).log())
    return -log_likelihood.mean()


def resize_masks(masks, size):
    """Masks (N, H, W) -> (N, *size), 0 or 1: area-averaged and cut at one half; a mask smaller than
    a cell keeps the cell where it covers most."""
    area = F.adaptive_avg_pool2d(masks.float()[:, None], size)[:, 0]
    peak = area.amax((1, 2), keepdim=True)
    tiny = (peak > 0) & (peak < 0.5)
    best_cell = tiny & (area == peak)
    return ((area >= 0.5) | best_cell).float()


ATTENTION_LOSSES = {  # --attention-reduction -> name, whose weight is the field <name>_weight
    "paper": {"token": token_loss_paper, "pixel": pixel_loss_paper},
    "official": {"token": token_loss_official, "pixel": pixel_loss_official},
}


# --------------------------------------------------------------------------------------------------
# Fidelity preservation (section 3.4): logits of the discriminator, any shape


def discriminator_loss(real, fake):
    """-log D(z0) - log(1 - D(z0')), mean over images and pixels."""
    loss_real = F.softplus(-real.float()).mean()
    loss_fake = F.softplus(fake.float()).mean()
    return loss_real + loss_fake


def generator_loss(fake):
    """-log D(z0'), non-saturating (Goodfellow 2014, section 3), mean over images and pixels."""
    return F.softplus(-fake.float()).mean()
