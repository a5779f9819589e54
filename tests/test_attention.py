"""Captured maps equal a softmax computed by hand, and capturing leaves no trace."""

import dataclasses
import re

import pytest
import torch
from conftest import BLOCKS, PROMPTS, tiny_pipeline

import attention
import config
import diffusion


@pytest.fixture(scope="module")
def world():
    pipe, _ = tiny_pipeline()
    text = diffusion.encode(pipe, PROMPTS)
    z = torch.randn(
        2, 4, 16, 8, generator=torch.Generator().manual_seed(0)
    )  # 32 x 16 pixels: not square
    return pipe, text, z


def guided_pass(pipe, text, z):
    with torch.no_grad():
        return diffusion.predict(pipe, torch.cat([z, z]), 500, *text.guided())


def weight(linear):
    """A projection's weight with its LoRA (alpha = rank) added."""
    up, down = linear.lora_B[diffusion.ADAPTER].weight, linear.lora_A[diffusion.ADAPTER].weight
    return linear.base_layer.weight + up @ down


def by_hand(layer, hidden, words):
    """softmax(Q K^T / sqrt(d)), one head at a time: (batch, heads, queries, tokens)."""
    d = layer.to_q.base_layer.out_features // layer.heads
    q, k = hidden @ weight(layer.to_q).T, words @ weight(layer.to_k).T
    return torch.stack(
        [
            (q[..., h * d : (h + 1) * d] @ k[..., h * d : (h + 1) * d].mT / d**0.5).softmax(-1)
            for h in range(layer.heads)
        ],
        1,
    )


def test_maps_equal_a_plain_softmax_of_the_conditional_half(world):
    pipe, text, z = world
    layers = attention.cross_attention_layers(pipe.unet, BLOCKS)
    seen, handles = {}, []
    for name, layer in layers.items():

        def see(module, args, kwargs, name=name):
            seen[name] = args[0], kwargs["encoder_hidden_states"]

        handles.append(layer.register_forward_pre_hook(see, with_kwargs=True))
    with attention.capture(pipe.unet, BLOCKS) as captured:
        guided_pass(pipe, text, z)
    for handle in handles:
        handle.remove()
    maps = attention.attention_maps(captured, 2, aspect=0.5)
    assert list(captured) == list(layers) and len(maps) >= 3
    for found, (name, layer) in zip(maps, layers.items()):
        hidden, words = seen[name]
        expected = by_hand(layer, hidden, words).detach()
        assert found.shape == (2, layer.heads, 8, 4, 77)
        torch.testing.assert_close(found.flatten(2, 3), expected[2:], rtol=1e-5, atol=1e-6)
        assert (expected[:2] - expected[2:]).abs().max() > 1e-3  # the other half is not the same
        torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1]))


def test_rows_and_columns_are_the_images(world):
    """A query far down in the image is far down in the map: the map of the first layer follows its hidden states."""
    pipe, text, z = world
    (name, layer), *_ = attention.cross_attention_layers(pipe.unet, ("up_blocks.0",)).items()
    changed = z.clone()
    changed[:, :, -2:] += 3  # the last rows
    both = []
    for latents in (z, changed):
        with attention.capture(pipe.unet, ("up_blocks.0",)) as captured:
            guided_pass(pipe, text, latents)
        both.append(attention.attention_maps(captured, 2, aspect=0.5)[0])
    moved = (both[1] - both[0]).abs().sum((0, 1, 3, 4))  # per row
    assert moved.argmax() >= len(moved) - 2


def test_output_is_the_same_with_and_without_capture(world):
    pipe, text, z = world
    plain = guided_pass(pipe, text, z)
    with attention.capture(pipe.unet, BLOCKS) as captured:
        assert torch.equal(guided_pass(pipe, text, z), plain)
    assert captured


def hooks(unet):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())


def test_no_hook_is_left(world):
    pipe, text, z = world
    before = hooks(pipe.unet)
    with pytest.raises(RuntimeError), attention.capture(pipe.unet, BLOCKS):
        assert hooks(pipe.unet) > before
        raise RuntimeError
    assert hooks(pipe.unet) == before
    with attention.capture(pipe.unet, BLOCKS) as captured:
        pass
    guided_pass(pipe, text, z)
    assert hooks(pipe.unet) == before and all(record[0] is None for record in captured.values())


def test_only_the_named_blocks_are_captured(world):
    pipe, text, z = world
    with attention.capture(pipe.unet, ("mid_block",)) as captured:
        guided_pass(pipe, text, z)
    assert captured and all(name.startswith("mid_block.") for name in captured)
    with attention.capture(pipe.unet, ()) as captured:
        guided_pass(pipe, text, z)
    assert captured == {}


def test_a_block_without_cross_attention_is_named_with_what_there_is(world):
    with pytest.raises(ValueError, match=r"up_blocks\.1.*mid_block.*up_blocks\.0"):
        attention.cross_attention_layers(world[0].unet, ("up_blocks.1",))


def test_the_message_names_a_flag_that_exists(world):
    flags = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(config.Config)}
    with pytest.raises(ValueError) as caught:
        attention.cross_attention_layers(world[0].unet, ("nope",))
    assert set(re.findall(r"--[a-z-]+", str(caught.value))) <= flags


def test_gradient_flows_through_the_maps(world):
    pipe, text, z = world
    with attention.capture(pipe.unet, BLOCKS) as captured:
        diffusion.predict(pipe, torch.cat([z, z]), 500, *text.guided())
    attention.attention_maps(captured, 2, aspect=0.5)[-1][..., 3].sum().backward()
    touched = [
        n for n, p in pipe.unet.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
    ]
    pipe.unet.zero_grad()
    assert any("to_q" in n for n in touched) and all(f".{diffusion.ADAPTER}." in n for n in touched)


def test_token_activation_sums_to_one(world):
    pipe, text, z = world
    with attention.capture(pipe.unet, BLOCKS) as captured:
        guided_pass(pipe, text, z)
    activation = attention.token_activation(attention.attention_maps(captured, 2, aspect=0.5))
    assert activation.shape == (2, 77)
    torch.testing.assert_close(activation.sum(-1), torch.ones(2))
