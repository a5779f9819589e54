"""Capture of cross-attention maps, by module and by name, in one forward pass.

Nothing is swapped and nothing slows down: two forward hooks keep a layer's queries and keys while SDPA computes its output as
always, and the probabilities softmax(QK^T / sqrt(d)) are made from them afterwards, by whoever asks. Outside the context no
hook exists. Layers are found by the name of their block, so any resolution and any UNet works.
"""
from contextlib import contextmanager, nullcontext

import torch


def all_blocks(unet):
    """Names of the UNet's blocks that have cross-attention, sorted."""
    return sorted({name.split(".attentions")[0] for name, _ in unet.named_modules() if name.endswith("attn2")})


def cross_attention_layers(unet, blocks):
    """The cross-attention modules of the named blocks ("mid_block", "up_blocks.0"), as {name: module}, in the UNet's order.

    Raises ValueError if a block has none."""
    layers = {name: module for name, module in unet.named_modules() if name.endswith("attn2")}
    for block in blocks:
        if not any(name.startswith(f"{block}.") for name in layers):
            raise ValueError(f"--attention-blocks: {block!r} has no cross-attention; this UNet has it in "
                             f"{', '.join(all_blocks(unet))}")
    return {name: m for name, m in layers.items() if name.startswith(tuple(f"{block}." for block in blocks))}


def uncompiled():
    """Within the context nothing is compiled: graphs of torch.compile do not notice hooks that came later (pytorch #117758)."""
    return torch.compiler.set_stance("force_eager")


@contextmanager
def capture(unet, blocks):
    """Within the context, every forward pass of `unet` refills the yielded dict {layer name: (query, key, heads, scale)}."""
    captured, handles = {}, []
    for name, layer in cross_attention_layers(unet, blocks).items():
        record = captured.setdefault(name, [None, None, layer.heads, layer.scale])
        for slot, projection in enumerate((layer.to_q, layer.to_k)):
            def keep(module, inputs, output, record=record, slot=slot):
                record[slot] = output
            handles.append(projection.register_forward_hook(keep))
    try:
        with uncompiled() if handles else nullcontext():
            yield captured
    finally:
        for handle in handles:
            handle.remove()


def attention_maps(captured, batch, aspect=1.0):
    """Per layer the attention probabilities (batch, heads, h, w, tokens) in fp32 of the last `batch` samples of the pass (with
    guidance: the conditional half), normalised over all text tokens. `aspect` is the image's width / height."""
    maps = []
    for query, key, heads, scale in captured.values():
        q, k = (x[-batch:].float().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key))  # (b, heads, n, d)
        probabilities = (q @ k.transpose(-1, -2) * scale).softmax(-1)
        height = round((q.shape[2] / aspect) ** 0.5)
        maps.append(probabilities.unflatten(2, (height, -1)))
    return maps


@torch.no_grad()
def token_activation(maps):
    """Mean cross-attention per token over space, heads and layers: (batch, tokens). Sums to 1 over the tokens."""
    return torch.stack([m.mean((1, 2, 3)) for m in maps]).mean(0)
