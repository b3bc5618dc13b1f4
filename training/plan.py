"""What a training run would need, worked out without making a weight or touching a device.

    python train.py --plan 8 --config configs/b200.json

The network is built of fake tensors, which have shapes and types but no data, and one forward pass
through it notes every tensor that the backward pass will read. So weights, gradients and optimizer
states are exact, and activations are those that autograd keeps, each storage once, plus what the
loss holds at a time. What is left out: temporaries of the backward pass, buffers of kernels and of
communication, and what the allocator loses to fragments. On a CPU a network of 31M parameters took
1.25 times what is planned for gradients, activations and loss."""

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from common.command import InputError
from config import Config
from data.tokenizer import planned_vocab_size
from layers.loss import GPU_LOGITS
from model import build_model
from training.optimizers import is_hidden_matrix

GIB = 2**30


def optimizer_numbers(name: str, p: nn.Parameter, config: Config) -> int:
    """How many fp32 numbers the optimizer keeps for each number of a parameter."""
    if config.optimizer == "SGD":
        return int(config.momentum > 0)
    if config.optimizer == "AdamW" or (
        config.optimizer == "Muon" and not is_hidden_matrix(name, p)
    ):
        return 2
    return 1


class SavedTensors:
    """Within it, notes the storages that autograd keeps for the backward pass, but not those of
    `known` tensors."""

    def __init__(self, known: list[Tensor]):
        self.known = {t.untyped_storage()._cdata for t in known}
        self.kept: dict[int, Tensor] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    def _note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.kept[storage._cdata] = tensor  # held, so that no other storage takes its place
        return tensor

    def __enter__(self) -> "SavedTensors":
        self.hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.hooks.__exit__(*error)

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.kept.values())


def memory_of(device: str) -> int | None:
    """Bytes of memory of the GPU, or of this machine or container; None where the system does not
    say (Windows)."""
    if device == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):  # Windows
        return None
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a Linux container: a number, or "max"
    text = limit.read_text().strip() if limit.is_file() else ""
    # A container's limit ends the process before the machine's memory is full.
    return min(memory, int(text)) if text.isdecimal() else memory


def check_memory(config: Config, vocab_size: int, device: str, processes: int) -> None:
    """Raises `InputError` where a run cannot fit in memory, before anything is made: a system that
    runs out of it ends the process without a word. Counted is what is certain: weights, gradients,
    what the optimizer keeps, and of the activations the residual stream before each block, in 2
    bytes a number."""
    with torch.device("meta"):  # shapes without memory
        named = dict(build_model(config, vocab_size).named_parameters())
    shards = processes if config.parallel == "fsdp" else 1
    # 2: a weight and its gradient
    fixed = (
        sum(4 * p.numel() * (2 + optimizer_numbers(name, p, config)) for name, p in named.items())
        // shards
    )
    tokens = config.micro_batch_size // processes * config.block_size
    blocks = config.loop_iterations * (1 if config.gradient_checkpointing else config.applications)
    # 2 bytes a number: under autocast the stream is in bf16. In fp32 it takes twice as much.
    needed = fixed + 2 * tokens * config.C * blocks
    there = memory_of(device)
    if there is not None and needed > there:
        raise InputError(
            f"out of memory: {sum(p.numel() for p in named.values()):,} parameters and {tokens:,}"
            f" tokens at a time take at least {needed / GIB:,.1f} GiB, and there are"
            f" {there / GIB:,.1f}; lower C, layers, vocab_size, block_size or micro_batch_size"
        )


def plan(config: Config, gpus: int, vocab_size: int, cast: torch.dtype | None) -> dict[str, int]:
    """Bytes on each of `gpus` GPUs, parameters, tokens and floating point operations of a step."""
    if gpus < 1 or config.micro_batch_size % gpus:
        raise InputError(
            f"micro_batch_size: {config.micro_batch_size} windows do not divide among {gpus} GPUs"
            " (--plan)"
        )
    rows = config.micro_batch_size // gpus
    shards = gpus if config.parallel == "fsdp" else 1
    with FakeTensorMode():
        model = build_model(config, vocab_size).train()
        named = dict(model.named_parameters())
        # 4 bytes: weights stay in fp32, whatever they are multiplied in
        sizes = {name: 4 * p.numel() for name, p in named.items()}
        ids = torch.zeros(rows, config.block_size, dtype=torch.int64)
        with (
            SavedTensors([*named.values(), *model.buffers()]) as saved,
            torch.autocast("cpu", cast, enabled=cast is not None),
        ):
            model.loss(ids, ids)
        head = next(
            name for name in named if name.endswith(("lm_head.weight", "token_embedding.weight"))
        )
        # the loss keeps its head's gradient, counted below
        activations = saved.nbytes - sizes[head]
        saved.kept.clear()
        with (
            FlopCounterMode(display=False) as counter,
            torch.autocast("cpu", cast, enabled=cast is not None),
        ):
            model.loss(ids, ids)[0].backward()
        blocks = [
            sum(4 * p.numel() for p in block.parameters()) for block in getattr(model, "layers", [])
        ]
    weights = sum(sizes.values())
    largest = max(blocks, default=0)  # several cells have no list of blocks, and no FSDP
    outside = weights - sum(blocks)
    states = sum(sizes[name] * optimizer_numbers(name, p, config) for name, p in named.items())
    figures = {
        "parameters": weights // 4,
        "weights": weights // shards,
        "gradients": weights // shards,
        "optimizer": states // shards,
        "average": weights // shards if config.ema_decay else 0,
        # FSDP: what is outside the blocks stays together, and two blocks at a time are, with one
        # block's gradients
        "gathered": outside + 3 * largest if shards > 1 else 0,
        "activations": activations,
        # a chunk of logits in fp32 and the head's gradient, and under autocast the chunk and the
        # weight in the product's type
        "loss": (
            (4 * min(GPU_LOGITS, ids.numel() * vocab_size) + sizes[head]) * (3 if cast else 2) // 2
        ),
    }
    figures["total"] = sum(figures.values()) - figures["parameters"]
    figures["tokens_per_step"] = config.micro_batch_size * config.grad_accum * config.block_size
    figures["flops_per_token"] = counter.get_total_flops() // ids.numel()
    return figures


def print_plan(config: Config, gpus: int, memory: float | None = None) -> None:
    """Prints the plan as a block of `key: value` lines, and whether it fits GPUs of `memory` GiB
    each, with what margin."""
    kinds = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.bfloat16}
    cast = kinds[config.amp_dtype] if config.use_amp else None
    vocab_size = planned_vocab_size(config)
    figures = plan(config, gpus, vocab_size, cast)
    how = "sharded by FSDP" if config.parallel == "fsdp" and gpus > 1 else "whole on each"
    print(
        f"plan: {gpus} GPUs, weights {how}, {config.optimizer}, autocast {cast}, vocabulary"
        f" {vocab_size:,}; GiB on each GPU"
    )
    for key, value in figures.items():
        whole = key in ("parameters", "tokens_per_step", "flops_per_token")
        print(f"{key}: {value:,}" if whole else f"{key}_gib: {value / GIB:.2f}")
    if memory is not None:
        margin = memory - figures["total"] / GIB
        # What is not planned (temporaries, libraries, fragments) took up to a GiB beside 11 on an
        # H200.
        verdict = (
            "yes"
            if margin > 1
            else (
                "barely"
                if margin > 0
                else "no; lower micro_batch_size, or take gradient_checkpointing"
            )
        )
        print(f"memory_gib: {memory:.2f}\nmargin_gib: {margin:.2f}\nfits: {verdict}")
