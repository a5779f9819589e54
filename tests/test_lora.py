"""LoRA files as other tools write them: each layer's weight changes by strength x alpha / rank x
B A, or one line says why not."""

import json
import re

import pytest
import torch
from conftest import randomise, same, tiny_sd15
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya
from huggingface_hub import constants
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

import config as configuration
import diffusion
import models
from tools import lora

PIPELINE = str(configuration.SHAPES / "pipeline")


@pytest.fixture(scope="module")
def sd15(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd15")
    tiny_sd15(folder)
    return str(folder)


def layers_of(pipe):
    """(part.layer, module) of all layers with a matrix or a convolution, or a LoRA around it."""
    for part in lora.PARTS:
        model = getattr(pipe, part, None)
        for name, module in model.named_modules() if model else ():
            if (
                not re.search("lora_|base_layer", name)
                and getattr(module, "weight", None) is not None
            ):
                if module.weight.dim() > 1 and "embeddings" not in name:
                    yield f"{part}.{name}", module


def make(pipe, chosen=".", seed=0):
    """{layer: (A, B, alpha)} of the chosen layers; ranks and alphas differ from layer to layer."""
    generator, made = torch.manual_seed(seed), {}
    for i, (layer, module) in enumerate(layers_of(pipe)):
        outputs, *inputs = module.weight.shape
        rank, ones = 2 + i % 3, [1] * (len(inputs) - 1)
        a = torch.randn(rank, *inputs, generator=generator)
        b = torch.randn(outputs, rank, *ones, generator=generator)
        if re.search(chosen, layer):
            made[layer] = a, b, [1.0, 4.0, 0.5, 8.0][i % 4]
    assert made
    return made


def assert_changed(pipe, *sums):
    """Every weight is changed by the sum of scale B A over {layer: (scale, A, B)}, no other is."""
    for layer, module in layers_of(pipe):
        expected = torch.zeros_like(module.weight)
        for scale, a, b in [layers[layer] for layers in sums if layer in layers]:
            expected += (scale * b.flatten(1) @ a.flatten(1)).view_as(expected)
        found = torch.zeros_like(expected)
        if isinstance(module, LoraLayer):
            found = module.get_delta_weight(diffusion.ADAPTER)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=layer)


def write(path, made, name=str, a=".lora_A", b=".lora_B", alphas=False, metadata=None):
    """A file of what `make` made, a layer under its name in this form."""
    state = {}
    for layer, (down, up, alpha) in made.items():
        state[f"{name(layer)}{a}.weight"], state[f"{name(layer)}{b}.weight"] = down, up
        if alphas:
            state[f"{name(layer)}.alpha"] = torch.tensor(alpha)
    save_file(state, path, metadata)
    return str(path)


def scaled(made, alphas, strength=1.0):
    scales = {layer: alpha / len(a) if alphas else 1 for layer, (a, _, alpha) in made.items()}
    return {layer: (strength * scales[layer], a, b) for layer, (a, b, _) in made.items()}


# --------------------------------------------------------------------------------------------------
# Forms


def kohya(layer):
    """kohya's name of a layer."""
    for part, short in (("text_encoder_2", "te2"), ("text_encoder", "te1")):
        layer = re.sub(rf"^{part}\.(text_model\.)?", f"{short}.text_model.", layer)
    return "lora_" + layer.replace(".", "_")


def stability(layer):
    """The name of an attention layer of the shapes world's UNet in Stability's code."""
    layer = layer.removeprefix("unet.").replace("mid_block.attentions.0", "middle_block.1")
    layer = layer.replace("down_blocks.1.attentions.0", "input_blocks.3.1")
    return re.sub(r"up_blocks.0.attentions.(\d)", r"output_blocks.\1.1", layer)


def processor(layer):
    """The name of an attention layer when attention processors held the LoRA."""
    return re.sub(r"(attn\d)", r"\1.processor", layer).removesuffix(".0")


def comfy(layer):
    for part, encoder in (("text_encoder_2", "clip_g"), ("text_encoder", "clip_l")):
        full = f"text_encoders.{encoder}.transformer.text_model."
        layer = re.sub(rf"^{part}\.(text_model\.)?", full, layer)
    return layer if layer.startswith("text") else f"diffusion_model.{stability(layer)}"


ATTENTION, TEXT = r"^unet.*attn\d\.to_", r"^text_encoder.*(_proj|fc\d)$"
FORMS = {  # which layers; then the arguments of `write`
    "diffusers": (".",),
    "diffusers before peft": (ATTENTION, str, ".lora.down", ".lora.up"),
    "diffusers' text encoders": (TEXT, str, ".lora_linear_layer.down", ".lora_linear_layer.up"),
    "old diffusers": (ATTENTION, processor, "_lora.down", "_lora.up"),
    "attention processors": (ATTENTION, lambda x: processor(x[5:]), "_lora.down", "_lora.up"),
    "unprefixed": ("^unet", lambda x: x[5:]),
    "kohya": ("^((?!add_emb).)*$", kohya, ".lora_down", ".lora_up", True),
    "kohya without alphas": (ATTENTION, kohya, ".lora_down", ".lora_up"),
    "kohya with A and B": (ATTENTION, kohya, ".lora_A", ".lora_B", True),
    "Stability's names": (
        ATTENTION,
        lambda x: kohya(f"unet.{stability(x)}"),
        ".lora_down",
        ".lora_up",
        True,
    ),
    "ComfyUI": (f"{ATTENTION}|{TEXT}", comfy, ".lora_down", ".lora_up", True),
    "ComfyUI with A and B": (ATTENTION, comfy, ".lora_A", ".lora_B", True),
    "LyCORIS": (
        ATTENTION,
        lambda x: kohya(x).replace("lora_unet", "lycoris"),
        ".lora_down",
        ".lora_up",
        True,
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_layer_of_every_form_has_its_own_scale(tmp_path, sd15, form):
    chosen, *arguments = FORMS[form]
    for base in [PIPELINE] if re.search("Stab|Comfy", form) else [PIPELINE, sd15]:
        pipe = models.load(base)
        made = make(pipe, chosen)
        models.add_loras(pipe, [write(tmp_path / "x.safetensors", made, *arguments)], "lora")
        assert_changed(pipe, scaled(made, alphas=True in arguments))


ALPHAS = {"r": 4, "lora_alpha": 2, "alpha_pattern": {"attn2.to_k": 16, "to_q": 3}}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["folder", "file", "metadata"])
def test_alphas_of_peft_stand_in_a_file_of_their_own_or_in_the_metadata(tmp_path, kind, rslora):
    pipe = models.load(PIPELINE)
    made = make(pipe, ATTENTION)
    settings, path = ALPHAS | {"use_rslora": rslora}, tmp_path / "adapter_model.safetensors"
    if kind == "metadata":
        fields = {f"unet.{name}": value for name, value in settings.items()}
        metadata = {LORA_ADAPTER_METADATA_KEY: json.dumps(fields)}
        write(path, made, metadata=metadata)
    else:
        write(path, made, lambda layer: f"base_model.model.{layer[5:]}")
        LoraConfig(**settings).save_pretrained(tmp_path)
    models.add_loras(pipe, [tmp_path if kind == "folder" else path], "lora")
    expected = {}
    for layer, (a, b, _) in made.items():
        alpha = 16 if layer.endswith("attn2.to_k") else 3 if layer.endswith("to_q") else 2
        expected[layer] = alpha / (len(a) ** 0.5 if rslora else len(a)), a, b
    assert_changed(pipe, expected)


def test_several_loras_are_their_sum_with_their_strengths(tmp_path):
    pipe = models.load(PIPELINE)
    first, second = make(pipe, "attn1"), make(pipe, ATTENTION, seed=1)
    (tmp_path / "a:0.3").mkdir()  # a name may end like a strength
    write(tmp_path / "a:0.3/x.safetensors", first)
    two = write(tmp_path / "b.safetensors", second, kohya, ".lora_down", ".lora_up", True)
    models.add_loras(pipe, [tmp_path / "a:0.3", f"{two}:-2"], "lora")
    assert_changed(pipe, scaled(first, False), scaled(second, True, -2))
    names = ["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    assert all(pipe.unet.get_submodule(name).scaling == {"comat": 1} for name in names)


# --------------------------------------------------------------------------------------------------
# Refusals

LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
A, B = (
    {f"unet.{LAYER}.lora_A.weight": torch.ones(2, 64)},
    {f"unet.{LAYER}.lora_B.weight": torch.ones(64, 2)},
)
KOHYA = f"lora_unet_{LAYER.replace('.', '_')}"
K = {f"{KOHYA}.lora_down.weight": torch.ones(2, 64), f"{KOHYA}.lora_up.weight": torch.ones(64, 2)}
NAN, HALF = torch.full((64, 2), float("nan")), torch.full((64, 2), 1e-3).half()
OTHER = "lora_unet_down_blocks_0_attentions_0_proj_in"
FILES = {  # what is in the file, what is said
    "A without B": (A, "A and B are needed"),
    "B without A": (B, "A and B are needed"),
    "kohya's A without B": (K | {f"{OTHER}.lora_down.weight": NAN}, "A and B are needed"),
    "an alpha without matrices": (K | {f"{OTHER}.alpha": torch.tensor(1.0)}, "A and B are needed"),
    "kohya's DoRA": (K | {f"{KOHYA}.dora_scale": torch.ones(64, 1)}, "it is a DoRA"),
    "peft's DoRA": (
        A | B | {f"unet.{LAYER}.lora_magnitude_vector": torch.ones(64)},
        "it is a DoRA",
    ),
    "LoHa": ({f"{KOHYA}.hada_w1_a": torch.ones(64, 2)}, "it is a LoHa"),
    "LoKr": ({f"{KOHYA}.lokr_w1": torch.ones(4, 4)}, "it is a LoKr"),
    "OFT": ({f"{KOHYA}.oft_blocks": torch.ones(4, 4)}, "it is an OFT"),
    "Tucker's LoCon": (K | {f"{KOHYA}.lora_mid.weight": torch.ones(2, 2)}, "in Tucker's form"),
    "whole differences": ({f"diffusion_model.{LAYER}.diff": torch.ones(64, 64)}, "whole weights"),
    "a bias": (
        A | B | {f"unet.{LAYER}.lora_B.bias": torch.ones(64)},
        "no LoRA for a UNet: unet.mid",
    ),
    "a full model": ({"conv_in.weight": torch.ones(4, 4, 3, 3)}, "no LoRA for a UNet: conv_in"),
    "nothing": ({}, "no LoRA for a UNet"),
    "NaN": (A | {f"unet.{LAYER}.lora_B.weight": NAN}, "not finite"),
    "infinity": (K | {f"{KOHYA}.alpha": torch.tensor(float("inf"))}, "not finite"),
    "another rank": (
        A | {f"unet.{LAYER}.lora_B.weight": torch.ones(64, 3)},
        "another architecture",
    ),
    "another width": (
        B | {f"unet.{LAYER}.lora_A.weight": torch.ones(2, 65)},
        "another architecture",
    ),
    "another model": ({f"transformer.{k[5:]}": v for k, v in (A | B).items()}, "no such layer"),
    "no such block": (
        {k.replace("mid_block", "mid"): v for k, v in (A | B).items()},
        "no such layer",
    ),
    "two spellings": (A | B | K, "knows only 1 of its 2 layers"),
    "kohya's and Stability's": (
        K | {k.replace("mid_block_attentions_0", "middle_block_1"): v for k, v in K.items()},
        "diffusers knows only 1 of its 2 layers",
    ),
    "peft without its configuration": (
        {f"base_model.model.{k[5:]}": v for k, v in (A | B).items()},
        "adapter_config.json",
    ),
}


@pytest.fixture(scope="module")
def pipe():
    return models.load(PIPELINE)


@pytest.mark.parametrize("case", FILES)
def test_what_cannot_be_loaded_exactly_is_refused_in_one_line(tmp_path, pipe, caplog, case):
    state, reason = FILES[case]
    path = tmp_path / "x.safetensors"
    save_file({key: value.clone() for key, value in state.items()}, path)
    with pytest.raises(ValueError) as caught:
        models.add_loras(pipe, [f"{path}:0.5"], "lora")
    line = str(caught.value)
    assert line.startswith(f"--lora {path}: cannot be loaded (") and reason in line, line
    assert len(line.splitlines()) == 1 and len(line) < 400 and not caplog.records
    assert not any(isinstance(module, LoraLayer) for module in pipe.unet.modules())


def test_one_file_is_meant_or_all_are_listed(tmp_path, pipe, monkeypatch):
    """Of a folder, and of a repository of the hub, here one in its cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = tmp_path / "hub/models--me--my-lora/snapshots" / ("0" * 40)
    (commit / "sub").mkdir(parents=True)
    (commit.parent.parent / "refs").mkdir()
    (commit.parent.parent / "refs/main").write_text("0" * 40)

    def names(repo):
        return [path.relative_to(commit).as_posix() for path in commit.rglob("*.*")]

    def found(source):
        return lora.find(str(source)).relative_to(commit).as_posix()

    monkeypatch.setattr(lora, "list_repo_files", names)
    for source in (commit, "me/my-lora"):
        with pytest.raises(ValueError, match="it holds no LoRA file; name one file"):
            found(source)
    save_file(A | B, commit / "b.safetensors")
    (commit / "README.md").write_text("hello")
    assert found(commit) == found("me/my-lora") == "b.safetensors"
    save_file(A | B, commit / "a.safetensors")
    save_file(A | B, commit / "sub/c.safetensors")
    with pytest.raises(ValueError, match="it holds a.safetensors, b.safetensors; name one file"):
        found(commit)
    with pytest.raises(ValueError, match="it holds a.*, b.*, sub/c.safetensors; name one file"):
        found("me/my-lora")
    assert found("me/my-lora/sub/c.safetensors") == "sub/c.safetensors"
    save_file(A | B, commit / lora.FILE)  # diffusers' name: that one is meant
    assert found(commit) == found("me/my-lora") == lora.FILE
    for source in ("./x", "/x/y", "x", "x.safetensors", "x/y.safetensors"):
        with pytest.raises(ValueError, match="no such file or folder, nor a hub id"):
            found(source)


def test_pickled_files_hold_tensors_alone(tmp_path, pipe):
    torch.save(A | B, tmp_path / "x.bin")
    torch.save({"a": print}, tmp_path / "y.bin")
    assert lora.read(pipe, tmp_path / "x.bin").keys() == {f"unet.{LAYER}"}
    with pytest.raises(ValueError, match="not a file of tensors alone"):
        lora.read(pipe, tmp_path / "y.bin")


def test_a_saved_adapter_becomes_kohyas_by_diffusers_own_converter(tmp_path, pipe):
    """The command that README gives to users of ComfyUI and A1111."""
    pipe = models.load(PIPELINE)
    parameters = diffusion.add_adapter(pipe.unet, diffusion.ADAPTER, 4)
    randomise(parameters)
    models.save_adapter(pipe, tmp_path, diffusion.ADAPTER)
    state = convert_all_state_dict_to_peft(load_file(tmp_path / lora.FILE))
    state = convert_state_dict_to_kohya(state)
    save_file(state, tmp_path / "kohya.safetensors")
    name = r"lora_unet_(down_blocks_\d|mid_block|up_blocks_\d)_attentions_\d_transformer_blocks_\d_"
    name += r"attn[12]_to_(q|k|v|out_0)\.(lora_down\.weight|lora_up\.weight|alpha)"
    assert all(re.fullmatch(name, key) for key in state) and len(state) == 3 * len(parameters) / 2
    before, after = (lora.read(pipe, tmp_path / file) for file in (lora.FILE, "kohya.safetensors"))
    assert len(before) == len(parameters) / 2 and same(before, after)
