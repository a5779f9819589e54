"""LoRA files as other tools write them: diffusers' (new, old, attention processors), kohya's for
A1111, ComfyUI's, peft's folders.

A file adds s B A to the weights of its layers, with s = alpha / rank of the layer (rsLoRA: alpha /
sqrt(rank)), or 1 where it has no alphas. Here s, and the strength that the user gives, is folded
into B. What diffusers would drop without a word, or load with another scale, is refused."""

import json
import math
import os
import re
from pathlib import Path
from pickle import UnpicklingError

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from diffusers.utils.state_dict_utils import StateDictType
from huggingface_hub import hf_hub_download, list_repo_files
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open

FILE = "pytorch_lora_weights.safetensors"  # diffusers' name
PARTS = "unet", "text_encoder", "text_encoder_2"
MATRIX = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](down|up|A|B)\.weight")
KOHYA = {  # another tool's prefix of a layer -> kohya's
    "diffusion_model.": "lora_unet_",
    "lycoris_": "lora_unet_",
    "text_encoders.clip_l.transformer.": "lora_te1_",
    "text_encoders.clip_g.transformer.": "lora_te2_",
}
OTHER_KINDS = {  # part of a key -> what it is in place of a LoRA
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    "hada_": "a LoHa",
    "lokr_": "a LoKr",
    "oft_": "an OFT",
    "lora_mid": "a LoCon in Tucker's form",
    ".diff": "a difference of whole weights",
}


def add(pipe, sources, name):
    """Adds the sum of LoRAs (results of `read`) as one adapter of scale 1: their matrices stand
    side by side, B A + B' A' = (B B') (A A')."""
    sums = {}
    for source in sources:
        for layer, (a, b) in source.items():
            all_a, all_b = sums.get(layer, (a[:0], b[:, :0]))
            sums[layer] = torch.cat([all_a, a]), torch.cat([all_b, b], dim=1)
    state = {}
    for layer, (a, b) in sums.items():
        state[f"{layer}.lora_A.weight"] = a
        state[f"{layer}.lora_B.weight"] = b
    pipe.load_lora_weights(state, adapter_name=name)


def read(pipe, source, strength=1.0):
    """{layer of the pipeline: (A, B)} of a LoRA, fp32, on the CPU. source: a file, a folder, a hub
    id, or a file below one (user/repo/file.safetensors). Raises ValueError for what is no LoRA, or
    not one for this pipeline."""
    path = find(str(source))
    state, metadata = read_tensors(path)
    pairs, alphas = sort_keys(state)
    configs = read_configs(path, pairs, metadata)
    scaled = {}
    for layer, (down, up) in pairs.items():
        rank, config = len(state[down]), configs.get(layer.split(".")[0])
        scale = scale_of(config, layer, rank) if config else alphas.get(layer, rank) / rank
        scaled[rename(layer, down)] = state[down].float()
        scaled[rename(layer, up)] = strength * scale * state[up].float()
    layers = convert(pipe, scaled)
    if len(layers) != len(pairs):
        raise ValueError(f"diffusers knows only {len(layers)} of its {len(pairs)} layers by name")
    return fitted(pipe, layers)


def split_strength(source):
    """The parts of "file:0.8"; without a number the strength is 1."""
    source = str(source)
    path, _, number = source.rpartition(":")
    if not path or os.path.exists(source):
        return source, 1.0
    try:
        return path, float(number)
    except ValueError:
        return source, 1.0


def find(source):
    """The path of the one file that a LoRA's name means."""
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        return path / only_file(os.listdir(path))
    user, name, *inside = [*source.split("/"), ""]
    if user in ("", ".", "..") or not name or name.endswith(".safetensors"):
        raise ValueError("no such file or folder, nor a hub id: user/repo or user/repo/file")
    repo = f"{user}/{name}"
    file = Path(*inside) if any(inside) else Path(only_file(list_repo_files(repo)))
    if file.stem == "adapter_model":
        hf_hub_download(repo, str(file.with_name("adapter_config.json")))
    return Path(hf_hub_download(repo, str(file)))


def only_file(names):
    """The one file of weights among names, or the one that diffusers or peft names so."""
    weights = sorted(name for name in names if name.endswith((".safetensors", ".bin")))
    for usual in (FILE, "adapter_model.safetensors"):
        if usual in weights:
            return usual
    if len(weights) != 1:
        raise ValueError(f"it holds {', '.join(weights) or 'no LoRA file'}; name one file")
    return weights[0]


def read_tensors(path):
    """({key: tensor}, metadata) of a file."""
    if path.suffix != ".safetensors":
        try:
            return torch.load(path, map_location="cpu", weights_only=True), {}
        except UnpicklingError as error:
            raise ValueError("it is not a file of tensors alone") from error
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}


def sort_keys(state):
    """({layer: [key of A, key of B]}, {layer: alpha}), with layers as the file names them."""
    pairs, alphas = {}, {}
    for key, tensor in state.items():
        kinds = [kind for sign, kind in OTHER_KINDS.items() if sign in key]
        if kinds:
            raise ValueError(f"it is {kinds[0]}, not a LoRA: {key}")
        if match := MATRIX.fullmatch(key):
            pairs.setdefault(match[1], []).append(key)
        elif key.endswith(".alpha"):
            alphas[key.removesuffix(".alpha")] = float(tensor)
        else:
            raise ValueError(f"it holds no LoRA for a UNet: {key}")
    if not pairs:
        raise ValueError("it holds no LoRA for a UNet")
    for layer in pairs | alphas:
        keys = pairs.get(layer, [])
        keys.sort(key=lambda key: MATRIX.fullmatch(key)[2] in ("up", "B"))
        if len(keys) != 2:
            raise ValueError(f"{layer}: A and B are needed, there is {keys or 'an alpha'}")
    return pairs, alphas


def read_configs(path, layers, metadata):
    """{first word of layers: LoraConfig} where alphas are no tensors: peft's adapter_config.json,
    or metadata as diffusers' training scripts write it."""
    if any(layer.startswith("base_model.model.") for layer in layers):
        return {"base_model": LoraConfig.from_pretrained(path.parent)}
    fields = {}
    for name, value in json.loads(metadata.get(LORA_ADAPTER_METADATA_KEY, "{}")).items():
        part, _, field = name.partition(".")
        fields.setdefault(part, {})[field] = value
    return {part: LoraConfig(**values) for part, values in fields.items()}


def scale_of(config, layer, rank):
    pattern = get_pattern_key(config.alpha_pattern, layer)
    alpha = config.alpha_pattern.get(pattern, config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def rename(layer, key):
    """A matrix' key as kohya or diffusers spells it; without a prefix it is the UNet's."""
    for prefix, kohya in KOHYA.items():
        if layer.startswith(prefix):
            rest = layer.removeprefix(prefix).replace(".", "_")
            key = kohya + rest + key.removeprefix(layer)
    if key.startswith("lora_"):
        return key.replace(".lora_A.", ".lora_down.").replace(".lora_B.", ".lora_up.")
    key = key.removeprefix("base_model.model.")
    return key if key.startswith(("unet.", "text_encoder")) else f"unet.{key}"


def convert(pipe, state):
    """{layer as diffusers names it: (A, B)}, by diffusers' own converters."""
    state, _ = pipe.lora_state_dict(state, unet_config=pipe.unet.config)
    unet = {key: value for key, value in state.items() if key.startswith("unet.")}
    text = {key: value for key, value in state.items() if key.startswith("text_encoder")}
    text = convert_state_dict_to_peft(text, StateDictType.DIFFUSERS_OLD)
    state = convert_unet_state_dict_to_peft(unet | text)
    layers = {}
    for key, a in state.items():
        layer = key.removesuffix(".lora_A.weight")
        if layer != key:
            layers[layer] = a, state[f"{layer}.lora_B.weight"]
    return layers


def fitted(pipe, layers):
    """The layers by the pipeline's own names. Raises ValueError if they do not fit its weights."""
    weights = {}
    for part in PARTS:
        model = getattr(pipe, part, None)
        for name, module in model.named_modules() if model else ():
            short = name.removeprefix("text_model.")  # it comes and goes with transformers' version
            weights[f"{part}.{short}"] = f"{part}.{name}", getattr(module, "weight", None)
    found = {}
    for layer, (a, b) in layers.items():
        name, weight = weights.get(layer.replace(".text_model.", "."), (layer, None))
        sizes = weight.shape if weight is not None else []
        if [*b.shape[:1], *a.shape[1:]] != list(sizes) or len(a) != b.shape[1]:
            shapes = f"{list(a.shape)} and {list(b.shape)}"
            there = f"a weight {list(sizes)}" if sizes else "no such layer"
            raise ValueError(f"made for another architecture: {layer}: {shapes}, this base {there}")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise ValueError(f"{layer}: numbers that are not finite")
        found[name] = a, b
    return found
