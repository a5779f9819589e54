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
    for maps in grouped(mean_over_heads(attention), shape):
        shares = shares_outside(maps, tokens, masks)
        per_entity = torch.stack([share.sum(-1) for share in shares])
        layers.append(per_entity.mean(0))
    return torch.cat(layers).mean()


def token_loss_official(attention, tokens, masks):
    """The share inside averaged over heads; the share outside squared; mean over an entity's tokens
    and over entities; sum over layers."""
    layers = []
    for maps in grouped(attention, shape):
        shares = shares_outside(maps, tokens, masks)
        per_entity = torch.stack([share.square().mean(-1) for share in shares])
        layers.append(per_entity.mean(0))
    return torch.cat(layers).sum()


def shares_outside(maps, tokens, masks):
    """Per entity the share of its tokens' attention outside its mask, mean over heads: (layers,
    tokens of the entity). maps: (layers, heads, h, w, text tokens)."""
    shares = []
    resized = resize_masks(masks, maps.shape[2:4])
    for mask, indices in zip(resized, tokens):
        a = maps[..., list(indices)]
        total = a.sum((2, 3)).clamp(min=1e-8)
        inside = (a * mask[..., None]).sum((2, 3))
        shares.append(1 - (inside / total).mean(1))
    return shares


def pixel_loss_paper(attention, tokens, masks):
    """Binary cross-entropy of an entity's summed attention against its mask, mean over pixels and
    entities; maps of one resolution are averaged first, and the mean is over resolutions. An absent
    entity has an empty mask and counts."""
    groups = grouped(mean_over_heads(attention), shape)
    terms = [cross_entropy(maps, tokens, masks) for maps in groups]
    return torch.stack(terms).mean()


def pixel_loss_official(attention, tokens, masks):
    """The same, with a group per resolution and place (mid, up), summed over groups."""
    groups = grouped(mean_over_heads(attention), place_and_shape)
    terms = [cross_entropy(maps, tokens, masks) for maps in groups]
    return torch.stack(terms).sum()


def mean_over_heads(attention):
    averages = {}
    for name, maps in attention.items():
        averages[name] = maps.float().mean(0, keepdim=True)
    return averages


def grouped(attention, key):
    """The maps of the layers of one key, stacked: a list of (layers, heads, h, w, text tokens)."""
    groups = defaultdict(list)
    for name, maps in attention.items():
        groups[key(name, maps)].append(maps.float())
    return [torch.stack(group) for group in groups.values()]


def shape(name, maps):
    return maps.shape


def place_and_shape(name, maps):
    return name.split("_")[0], maps.shape


def cross_entropy(maps, tokens, masks):
    average = maps.mean((0, 1))  # (h, w, text tokens)
    summed = []
    for indices in tokens:
        own = average[..., list(indices)]
        summed.append(own.sum(-1))
    p = torch.stack(summed).clamp(1e-6, 1 - 1e-6)
    mask = resize_masks(masks, p.shape[1:])
    log_likelihood = torch.where(mask > 0, p.log(), (1 - p).log())
    return -log_likelihood.mean()


def resize_masks(masks, size):
    """Masks (N, H, W) -> (N, *size), 0 or 1: area-averaged and cut at one half; a mask smaller than
    a cell keeps the cell where it covers most."""
    area = F.adaptive_avg_pool2d(masks.float(), size)
    peak = area.amax((1, 2), keepdim=True)
    is_tiny = (peak > 0) & (peak < 0.5)
    best_cell = is_tiny & (area == peak)
    covered = area >= 0.5
    return (covered | best_cell).float()


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
