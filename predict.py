"""What a training step needs, without running it: arithmetic and peak memory of each phase, on any computer, in minutes.

    python bench.py sdxl --predict --batch 2 --checkpointing     one configuration, phase by phase; any field is a flag
    python predict.py                                            the README's table, in Markdown

The step is train.py's own, in one process, on models of the true sizes whose tensors have no data (torch's meta device); Memory
follows every storage from its making to its end. What a GPU adds it does not see; the margin of `summary`, not checked on one,
stands for it.
"""
import contextlib
import sys
import tempfile
import warnings
import weakref
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch.fx.experimental import _config as shapes
from torch.overrides import TorchFunctionMode
from torch.utils._device import set_device
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

import bench
import config as configuration
import diffusion
import train

META, CPU, aten = torch.device("meta"), torch.device("cpu"), torch.ops.aten
CARDS = {24: 23.6, 40: 39.4, 80: 79.1}  # GB in a card's name: GiB that CUDA reports


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Memory(TorchDispatchMode):
    """Bytes of all storages of one device type ("meta", "cpu") that were made within and live, their peak, and the arithmetic
    of matrix products, convolutions and attention. `phase` stands in for Run.phase."""

    def __init__(self, device):
        super().__init__()
        self.device, self.live, self.peak, self.flop, self.sizes, self.phases = device, 0, 0, 0, {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func.overloadpacket in bench.FORMULAS:
            self.flop += bench.FORMULAS[func.overloadpacket](*args, **(kwargs or {}), out_val=output)
        for storage in (x.untyped_storage() for x in tensors(output)):
            if storage.device.type == self.device and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = -(-storage.nbytes() // 512) * 512  # the blocks of CUDA's allocator
                self.live += self.sizes[storage._cdata]
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.forget, storage._cdata)
        return output

    def forget(self, storage):
        self.live -= self.sizes.pop(storage)

    @contextlib.contextmanager
    def phase(self, name):
        before, self.peak = self.flop, self.live
        yield
        sums = self.phases.setdefault(name, {"tflop": 0.0, "peak_gib": 0.0})
        sums["tflop"] += (self.flop - before) / 1e12
        sums["peak_gib"] = max(sums["peak_gib"], self.peak / 2 ** 30)


class Values(TorchDispatchMode):
    """Lets code that looks into tensors run on those without data. Those up to `small` elements that are made of known numbers
    (token indices, sizes of feature maps) are computed beside, in `known`. Of others each element of a mask is True, but a
    condition is False, all() is True (finite), any() is False (not finite), and a number is 1."""
    known, made, small = WeakTensorKeyDictionary(), {}, 1024

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, packet, values = kwargs or {}, func.overloadpacket, None
        inputs = tensors(parts := tree_leaves((args, kwargs)))
        target = kwargs.get("device", inputs[0].device if inputs else CPU)
        if target != META and not any(x.is_meta for x in inputs):
            return func(*args, **kwargs)
        if all(x.numel() <= self.small and (not x.is_meta or x in self.known) for x in inputs) and "empty" not in func.__name__:
            there = tree_map_only((torch.Tensor, torch.device),
                                  lambda x: self.known.get(x, x) if isinstance(x, torch.Tensor) else CPU, (args, kwargs))
            values = func(*there[0], **there[1])
        if packet is aten._local_scalar_dense:
            return values if values is not None else inputs[0].dtype != torch.bool and 1
        if packet is aten._to_copy and target == CPU:  # large ones, the models of --offload, take no memory: none is touched
            new = torch.zeros if inputs[0].numel() <= self.small else torch.empty
            return new(inputs[0].shape, dtype=kwargs.get("dtype") or inputs[0].dtype) if values is None else values.clone()
        if packet is aten._unique2 and values is None:
            return tuple(inputs[0].new_empty(1) for _ in range(3))
        output = values.to(META) if packet is aten.nonzero and values is not None else self.on_meta(func, args, kwargs, parts)
        if packet in (aten.all, aten.any) and values is None:
            values = torch.full(output.shape, packet is aten.all)
        for x in tensors(output) if func._schema.is_mutable else ():
            self.known.pop(x, None)
        self.known.update((x, v) for x, v in zip(tensors(output), tensors(values)) if x.numel() <= self.small)
        return output

    def on_meta(self, func, args, kwargs, parts):
        """func(*args, **kwargs). What makes new tensors is asked once for equal shapes: torch takes long to find theirs."""
        key = func, *kwargs, *((x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else (x, type(x)) for x in parts)
        if key not in self.made:
            output = func(*args, **kwargs)
            if any(x.alias_info for x in (*func._schema.arguments, *func._schema.returns)):
                return output
            self.made[key] = [x if x is None else (x.shape, x.stride(), x.dtype) for x in tree_leaves(output)]
        output = [x and torch.empty_strided(x[0], x[1], dtype=x[2], device=META) for x in self.made[key]]
        return output[0] if len(output) == 1 else tuple(output)


class Autocast(TorchFunctionMode):
    """torch.autocast as CUDA has it and meta lacks: products in `dtype`, softmax, powers and normalisation in fp32."""

    def __init__(self, device_type, dtype=None, enabled=True):
        super().__init__()
        t, f = torch.Tensor, torch.float32
        self.casts = {F.linear: dtype, torch.conv2d: dtype, t.matmul: dtype, t.__matmul__: dtype, torch.einsum: dtype,
                      F.layer_norm: f, t.softmax: f, t.pow: f} if enabled else {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        dtype = self.casts.get(func)
        return func(*(tree_map_only(torch.Tensor, lambda x: x.to(dtype), args) if dtype else args), **(kwargs or {}))


def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """F.scaled_dot_product_attention by a kernel that keeps no maps, as GPUs and CPUs have it; on meta torch's would."""
    mask = attn_mask.to(query.dtype) if attn_mask is not None and attn_mask.dtype == torch.bool else attn_mask
    return bench.ATTENTION(query, key, value, dropout_p, is_causal, attn_mask=mask, scale=scale)[0]


@contextlib.contextmanager
def without_data(memory):
    """Within the context training runs on meta tensors. Of the denoising steps without gradient, which are all alike, only the
    last of a loop is done, and its arithmetic is that of all."""
    guided, as_tensor = diffusion.guided, torch.as_tensor
    add_adapter = set_device(META)(diffusion.add_adapter)  # peft would leave a second one on the CPU

    def last_step_only(pipe, plan, i, z, *rest):
        before, others = memory.flop, 0 if torch.is_grad_enabled() else len(plan.timesteps) - 1
        if i < others:
            return torch.zeros_like(z)
        output = guided(pipe, plan, i, z, *rest)
        memory.flop += others * (memory.flop - before)
        return output

    def numbers_to_tensor(data, *dtype, device=None, **more):  # on the CPU first, where Values sees them
        return as_tensor(data, *dtype, **more).to(device or CPU)
    with (warnings.catch_warnings(action="ignore"), shapes.patch(meta_nonzero_assume_all_nonzero=True), Values(),
          mock.patch.multiple(diffusion, add_adapter=add_adapter, guided=last_step_only),
          mock.patch.multiple(F, scaled_dot_product_attention=attend),
          mock.patch.multiple(torch, autocast=Autocast, as_tensor=numbers_to_tensor)):
        yield


def make_states(run):
    """Makes the optimisers' states, as a first step would, by a step without gradient."""
    for optimizer in filter(None, (run.optimizer, run.discriminator_optimizer)):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.zeros_like(p)
        optimizer.step(), optimizer.zero_grad()


def steps(c, batches):
    """{batch: {phase: {"tflop", "peak_gib"}}} of a training step whose optimisers have their states."""
    memory, found = Memory("meta"), {}
    with tempfile.TemporaryDirectory() as folder, without_data(memory), memory:
        run = bench.prepare(replace(c, random_weights=True, compile=False), Path(folder), META)
        run.phase = memory.phase
        make_states(run)
        for batch in batches:
            memory.phases = found[batch] = {}
            run.config = replace(run.config, batch=batch, references=Path(folder) / str(batch))
            train.train_step(run)
    return found


def summary(phases):
    """(TFLOP of the step, its highest peak in GiB, the phase that has it, GiB of a GPU for it, {GB of a card: "yes" or "no"}).
    The GPU has 5 % and 1 GiB more than the peak: fragmentation, workspaces of cuDNN and cuBLAS, the CUDA context."""
    (peak, phase), tflop = max((p["peak_gib"], name) for name, p in phases.items()), sum(p["tflop"] for p in phases.values())
    needed = 1.05 * peak + 1
    return tflop, peak, phase, needed, {card: "yes" if needed <= gib else "no" for card, gib in CARDS.items()}


def main(c):
    """bench.py --predict: prints the phases; returns them."""
    phases = steps(c, [c.batch])[c.batch]
    tflop, peak, _, needed, fits = summary(phases)
    print(f"{c.preset}, not run but predicted: {c.dtype}, {c.resolution} px, batch {c.batch}, T = {c.num_steps}, "
          f"K = {c.grad_steps}\n{'phase':<14}{'TFLOP':>10}{'peak GiB':>10}")
    for name, p in {**phases, "step": {"tflop": tflop, "peak_gib": peak}}.items():
        print(f"{name:<14}{p['tflop']:10.3f}{p['peak_gib']:10.2f}")
    print(f"{needed:.1f} GiB with 5 % + 1 GiB for fragmentation, workspaces and the CUDA context (not checked on a GPU); fits "
          "a card of " + ", ".join(f"{card} GB: {fit}" for card, fit in fits.items()))
    return phases


def table(batches=(1, 2, 4, 6)):
    """Prints the README's table, row by row as they are found: the peak for each batch, and the largest batch for each card."""
    head = "preset", "options", "TFLOP, 1 prompt", *(f"GiB, batch {n}" for n in batches), *(f"{card} GB" for card in CARDS)
    print(f"| {' | '.join(head)} |\n|" + "---|" * len(head))
    for preset in bench.UNETS:
        for options in ("", "checkpointing", "offload", "checkpointing offload"):
            c = bench.Bench(**vars(configuration.PRESETS[preset][1]), preset=preset)
            found = [summary(p) for p in steps(replace(c, **dict.fromkeys(options.split(), True)), batches).values()]
            largest = [max((n for n, (*_, fits) in zip(batches, found) if fits[card] == "yes"), default="none")
                       for card in CARDS]
            row = preset, options, f"{found[0][0]:.0f}", *(f"{peak:.1f}" for _, peak, *_ in found), *map(str, largest)
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    print(__doc__) if {"-h", "--help"} & set(sys.argv) else sys.exit(__doc__) if sys.argv[1:] else table()
