"""Decoding at the speed of memory: the network of model.py with its weights prepared once for
inference.

    decoder = Decoder(model, bits=None | 16 | 8 | 4)
    logits, state = decoder(ids, state)

It computes the model's numbers from fewer and larger products (folded.py), which read memory at
full bandwidth (packed.py). What reaches far back lies on a `Tape` (tape.py), so a step writes one
position and copies nothing. A call has three parts: it reads what it needs of the tapes
(`look_back`), computes with tensors alone (`Decoder.run`), and writes the tapes' new entries. So
torch.compile can make one program of the middle part: `decoder.compile()`. On a CPU with kernels of
our own a block's step of few texts is one call instead, from reading its tapes to writing them
(program.py).

A wavelet branch with a part of layers/variants.py runs as it is in the model, in fp32: see
`OwnBranch`. Its block's MLP and memories are packed all the same.

Letters as in model.py; N = B·T positions.
"""

import itertools
import re
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.command import InputError
from config import Config
from inference import fused, kernels
from inference.folded import (
    MLP,
    FixedWavelet,
    FoldedLifting,
    FoldedMixers,
    FoldedReconstruction,
    Mean,
    Memory,
    Ngrams,
    Recall,
    WrittenMemory,
    counts_after,
)
from inference.packed import MOST_ROWS
from inference.program import BlockProgram, HeadProgram
from inference.tape import DecoderState, Tape, with_fresh_strides
from inference.weights import Bits, PackedWeights
from layers import variants
from layers.state import State, ids_name
from model import Block, Haar, LanguageModel, Lifting, Mixers, RunningMean, WaveletLM, parts_of

# For one token, the count of tokens (B,) and over how many positions the running mean goes (B, 1);
# None in a network without the running mean, for a chunk of several tokens, and for programs.
Counts = tuple[Tensor, Tensor] | None

# ===== Wavelet branches


def can_be_folded(block: Block, wavelet: nn.Module) -> bool:
    """Whether folded.py has every part of the block's wavelet branch."""
    plain_wavelet = isinstance(wavelet, Haar)
    plain_wavelet |= isinstance(wavelet, Lifting) and wavelet.odd_gates is None  # not gated
    plain_mean = block.bypass is None or isinstance(block.bypass.average, RunningMean)
    extras = (block.scale_norm_in, block.scale_norm_out, block.coarse_modulation)
    plain_scales = all(part is None for part in extras)
    return plain_wavelet and plain_mean and plain_scales and isinstance(block.mixers, Mixers)


class FoldedBranch:
    """A block's wavelet branch, folded: running mean, wavelet, mixers, inverse wavelet."""

    def __init__(
        self,
        block: Block,
        source: nn.Module,
        wavelet: FoldedLifting | FixedWavelet,
        name: str,
        weights: PackedWeights,
    ):
        """source: the block's wavelet in the model; wavelet: the prepared one, which several blocks
        may share."""
        self.pad = block.pad  # P − C
        self.wavelet = wavelet
        self.longest = list(wavelet.longest)  # lag of each level, where lags are on a tape
        self.gamma = None
        self.average = None
        self.below = None
        if block.embedding_residual_gamma is not None:
            self.gamma = weights.keep(f"{name}.gamma", block.embedding_residual_gamma)  # (C,)
        if block.bypass is not None:
            self.average = Mean(block.bypass.average)
            mix = block.bypass.cross_layer_mix.weight  # (C, C)
            self.below = weights.matrix(f"{name}.below", mix, "bypass")
            gains = F.pad(block.bypass.history_gains, (0, self.pad))  # of C channels → of P
            self.gains = weights.keep(f"{name}.gains", gains)[:, None]  # (S, 1, P)
        self.norm = weights.norm(f"{name}.ln1", block.ln1)
        self.mixers = FoldedMixers(block, f"{name}.mixers", weights)
        self.reconstruction = FoldedReconstruction(
            block, source, self.mixers.after, f"{name}.reconstruction", weights
        )
        alpha = block.residual_alpha_spectral
        self.alpha = weights.number(f"{name}.alpha_spectral", alpha)
        # Whether our own GPU kernels may change the state of one text where it lies (graphs.py).
        self.in_place = kernels.usable(weights.device) and wavelet.has_kernels

    def adopt(self, block: dict[str, Tensor]) -> dict:
        """A model's state of this branch as the decoder keeps it, with tapes."""
        part = self.wavelet.adopt(block)
        return part if self.average is None else part | self.average.adopt(block)

    def look_back(self, part: dict) -> dict[str, Tensor]:
        """What a step of one token reads of the tapes in `part`."""
        seen = self.wavelet.look_back(part)
        return seen if self.average is None else seen | self.average.look_back(part)

    def __call__(
        self, x: Tensor, e: Tensor, below: Tensor | None, length: int, part: dict, counts: Counts
    ) -> tuple[Tensor, Tensor | None, dict]:
        """One branch over all positions: arguments and results as in `DecoderBlock`."""
        mean = None
        new: dict = {}
        if "position" in part:  # given for one text, whose state is changed where it lies
            rows = self.wavelet.room(x)  # rows[0] becomes the wavelet's input
            window = 0 if self.average is None else self.average.window
            x, mean = fused.open_block(x, e, self.gamma, self.norm, part, window, rows[0])
            # sum and ring were written in place; the count is one for all blocks
            if counts is not None:
                new["count"] = counts[0]
            h = rows[0]  # (N, P)
            c, lags = self.wavelet.step_by_kernels(rows, part["odd"])  # (S, N, P)
        else:
            if self.average is not None:
                mean, new = self.average(x, length, part, counts)  # (N, C)
            if self.gamma is not None:
                x = torch.addcmul(x, e, self.gamma)  # x + gamma·e, the embedding once more
            h = self.padded(F.layer_norm(x, *self.norm))  # (N, P)
            c, lags = self.wavelet.decompose(h, length, part)  # (S, N, P)
        new |= lags
        y = self.mix(c, h, mean, below)  # (S, N, ·)
        return self.reconstruction(y, x, self.alpha), mean, new

    def mix(self, c: Tensor, h: Tensor, mean: Tensor | None, below: Tensor | None) -> Tensor:
        """The coefficients c (S, N, P) of h (N, P) with the bypass added, mixed: (S, N, ·). mean,
        below (N, C): the running means of this block and of the one below it."""
        if self.average is None:
            return self.mixers(c, h)
        context = mean if below is None else self.below(below, mean)  # mean + M·below, (N, C)
        if self.in_place and c.size(1) == 1:
            # one kernel for the sum, and for what the gates read of it
            joined, routed = fused.join(c, context, self.gains, self.mixers.routing)
            return self.mixers(joined, h, routed)
        return self.mixers(torch.addcmul(c, self.padded(context), self.gains), h)

    def padded(self, x: Tensor) -> Tensor:
        """x (N, C) with zeros for the channels up to P."""
        return F.pad(x, (0, self.pad)) if self.pad else x


class OwnBranch:
    """A block's wavelet branch as it is in the model, in fp32: for parts of layers/variants.py."""

    in_place = False
    longest: tuple[int, ...] = ()  # nothing is on a tape

    def __init__(
        self, block: Block, wavelet: nn.Module, config: Config, name: str, weights: PackedWeights
    ):
        """wavelet: the block's, which several blocks may share."""
        # A block with nothing but the wavelet branch, since `DecoderBlock` packs the rest.
        nothing = {"pkm_enabled": False, "fwpkm_enabled": False, "recall_heads": 0}
        config = config.model_copy(update=nothing | {"mlp_expansion": 0, "mlp_taps": 0})
        with torch.device("meta"):  # without memory: the weights are those of `block`
            branch = Block(config, parts_of(config))
            variants.parametrise([branch], config)
        # The branch's names are a part of the block's; `assign` takes the tensors themselves.
        own = block.state_dict()
        branch.load_state_dict({key: own[key] for key in branch.state_dict()}, assign=True)
        self.block = weights.module(f"{name}.branch", branch).eval()
        self.wavelet = wavelet
        # of its state; the tensor is for the type only
        self.names = list(self.block.start(wavelet, 0, torch.empty(0), stream=True))

    def adopt(self, block: dict[str, Tensor]) -> dict:
        """The branch's part of a model's state, as it is (without a ring where the state is not a
        stream's)."""
        return {name: block[name] for name in self.names if name in block}

    def look_back(self, part: dict) -> dict[str, Tensor]:
        """Nothing: there is no tape."""
        return {}

    def __call__(
        self, x: Tensor, e: Tensor, below: Tensor | None, length: int, part: dict, counts: Counts
    ) -> tuple[Tensor, Tensor | None, dict]:
        """One branch over all positions: arguments and results as in `DecoderBlock`."""

        def whole(rows):  # (N, C) or None → (B, T, C); torch 2.9 cannot compile types of it
            return None if rows is None else rows.view(-1, length, rows.size(1))

        x, mean, new = self.block.mix_positions(
            whole(x), whole(e), whole(below), self.wavelet, part
        )  # (B, T, C) each
        return x.flatten(0, 1), None if mean is None else mean.flatten(0, 1), new


# ===== Block


class DecoderBlock:
    """A block: its wavelet branch, then its MLP and its memories."""

    def __init__(
        self,
        block: Block,
        branch: FoldedBranch | OwnBranch,
        name: str,
        weights: PackedWeights,
    ):
        """branch: the block's wavelet branch, prepared; name: begins the names of the weights."""
        self.branch = branch
        self.norm = weights.norm(f"{name}.ln2", block.ln2)
        self.alpha = weights.number(f"{name}.alpha_mlp", block.residual_alpha_mlp)
        self.mlp = None if block.ffwd is None else MLP(block, f"{name}.mlp", weights)
        self.mlp_filter = None  # of what the MLP reads: the model's own module
        if block.mlp_filter is not None:
            self.mlp_filter = weights.module(f"{name}.mlp_filter", block.mlp_filter)
        self.memories: list[Memory | WrittenMemory | Recall] = []
        fusable = []  # memories that one row reads by our own GPU kernels
        score_rows = []  # of each of these, see `fused.MemoryReads`
        # In the order in which the model adds them, which decides the rounding of the sum.
        for kind, module in (("pkm", block.pkm), ("fwpkm", block.fwpkm)):
            if module is None:
                continue
            own = f"{name}.{kind}"
            alpha = block.alpha_pkm if kind == "pkm" else block.alpha_fwpkm
            if kind == "fwpkm" and module.writes:  # it learns from the text that it reads
                self.memories.append(WrittenMemory(module, alpha, own, weights))
                continue
            memory = Memory(module, alpha, own, weights)
            self.memories.append(memory)
            if fused.MemoryReads.takes(memory, weights.device):
                fusable.append(memory)
                score_rows.append(memory.score_rows(module, own, weights))
        if block.recall is not None:
            recall = Recall(block.recall, block.alpha_recall, f"{name}.recall", weights)
            self.memories.append(recall)
        self.reads = fused.MemoryReads(fusable, score_rows) if fusable else None
        self.other_memories = [memory for memory in self.memories if memory not in fusable]
        self.program = BlockProgram(self) if BlockProgram.takes(self) else None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"program": None}  # it is of this block

    def __setstate__(self, attributes: dict) -> None:
        self.__dict__ |= attributes
        self.program = BlockProgram(self) if BlockProgram.takes(self) else None

    def adopt(self, block: dict[str, Tensor]) -> dict:
        """A model's state of this block as the decoder keeps it, with tapes."""
        part = self.branch.adopt(block)
        for memory in self.memories:
            part |= memory.adopt(block)  # their names differ
        if self.mlp_filter is not None:
            part["before_mlp"] = block["before_mlp"]
        return part

    def reads_tapes(self, rows: int) -> bool:
        """Whether a step of one token in so many texts takes the state with its tapes, which have
        become `longer`, and not what `look_back` gives."""
        return self.program is not None and rows <= MOST_ROWS

    def takes(self, rows: int, part: dict) -> bool:
        """Whether it makes a step of one token in so many texts by its program: of a state that has
        not been looked back on."""
        looked_back = "odd" in part or "oldest" in part or torch.compiler.is_compiling()
        return self.reads_tapes(rows) and not looked_back

    def look_back(self, part: dict) -> dict[str, Tensor]:
        """The state `part` for a step of one token: its tensors, and in place of its tapes what the
        step reads of them."""
        held = {name: value for name, value in part.items() if not isinstance(value, Tape)}
        return held | self.branch.look_back(part)

    def __call__(
        self, x: Tensor, e: Tensor, below: Tensor | None, length: int, part: dict, counts: Counts
    ) -> tuple[Tensor, Tensor | None, dict]:
        """The stream x, the token embedding e, the running mean of the block below, all (N, C) →
        the new stream (N, C), this block's running mean (N, C; None without a bypass), and the new
        state.

        length: positions of each text. With several, `part` is the state with its tapes, and so is
        the new one. With one, `part` is what `look_back` gives, and the new state has one entry for
        each tape; or, where the block `reads_tapes`, they are a state before and after.
        """
        if length == 1 and self.takes(x.size(0), part):
            x, h, mean, new = self.program(x, e, below, part)
        else:
            x, h, mean, new = self.by_parts(x, e, below, length, part, counts)
        # Of one row our own kernels read all memories that they can, and add what they read to x.
        by_kernels = self.reads is not None and x.size(0) == 1
        if by_kernels:
            x = self.reads(h, x)
        for memory in self.other_memories if by_kernels else self.memories:
            read, written = memory(h, length, part)  # read (N, C)
            x = x + read
            new |= written
        return x, mean, new

    def by_parts(
        self, x: Tensor, e: Tensor, below: Tensor | None, length: int, part: dict, counts: Counts
    ) -> tuple[Tensor, Tensor, Tensor | None, dict]:
        """The block up to its memories: the new stream, what the memories read (N, C), this block's
        running mean, and the new state."""
        x, mean, new = self.branch(x, e, below, length, part, counts)
        h = F.layer_norm(x, *self.norm)  # (N, C)
        if self.mlp is None:
            return self.alpha * x, h, mean, new
        read = h
        if self.mlp_filter is not None:
            by_text = h.view(-1, length, h.size(1))  # (B, T, C)
            read, new["before_mlp"] = self.mlp_filter(by_text, part["before_mlp"])
            read = read.flatten(0, 1)
        return self.mlp(read, x, self.alpha), h, mean, new


# ===== The network


class DecoderCell:
    """One network of the model, prepared: the embedding, the blocks in the order in which they are
    applied, the last norm."""

    def __init__(self, cell: WaveletLM, name: str, weights: PackedWeights):
        """name: begins the names of the cell's weights."""
        embedding = cell.token_embedding
        # A token's features have vectors of their own, which are added to the token's here.
        table = embedding.whole() if cell.config.token_features else embedding.weight  # (V, C)
        # With stab_embed_scaling embeddings are multiplied by a constant: here once for all.
        self.embedding = weights.table(f"{name}embedding", table * cell.embed_scale, "embedding")
        self.ngrams = None
        if cell.ngrams is not None:
            self.ngrams = Ngrams(cell.ngrams, f"{name}ngrams", weights)
        folds = can_be_folded(*cell.block(0))  # all blocks are of one kind
        wavelets = []
        for i, wavelet in enumerate(cell.wavelets):
            if not folds:  # as it is, for `OwnBranch`
                wavelets.append(weights.module(f"{name}wavelets.{i}", wavelet))
            elif isinstance(wavelet, Haar):
                wavelets.append(FixedWavelet(weights.module(f"{name}wavelets.{i}", wavelet)))
            else:
                wavelets.append(FoldedLifting(wavelet, f"{name}wavelets.{i}", weights))
        blocks = []
        for i, block in enumerate(cell.layers):
            wavelet = wavelets[i % len(wavelets)]  # one for all blocks, or one each
            own = f"{name}layers.{i}"
            if folds:
                branch = FoldedBranch(block, cell.block(i)[1], wavelet, own, weights)
            else:
                branch = OwnBranch(block, wavelet, cell.config, own, weights)
            blocks.append(DecoderBlock(block, branch, own, weights))
        # There are more applications than blocks where blocks share their weights.
        self.blocks = [blocks[i % len(blocks)] for i in range(cell.config.applications)]
        self.norm = weights.norm(f"{name}final_ln", cell.final_ln)

    def embed(self, ids: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """ids (B, T), the ids before them → their embedding (N, C), and the last ids, to be
        remembered where the network has a table of n-grams; else None."""
        e = self.embedding(ids.flatten())  # (N, C)
        return (e, None) if self.ngrams is None else self.ngrams(ids, e, past)


def head_is_embedding(config: Config) -> bool:
    """Whether the head's matrix is the very table that tokens are looked up in, so that a file
    needs it once."""
    changed = config.stab("embed_scaling") or config.token_features or config.multinodal_enabled
    return config.tie_embedding_to_lm_head and not changed


# ===== Compiling

# What a compiled step is given, by the names that torch's guards have: the arguments of
# `Decoder.run`. The empty name is that of torch's own state, such as whether gradients are kept.
GIVEN = re.compile(r"(L\['?)?(ids|parts|past)\b|$")

COPIES = itertools.count()  # numbers the copies that `own_code` makes


def own_code(function: Callable) -> Callable:
    """A copy of `function` with a code object of its own.

    torch.compile keeps its programs by code object, and chooses among those of one by guards. Ours
    have no guards on the decoder that they were made for (`Decoder.compile`), so two decoders that
    shared a code object would run each other's programs.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(COPIES)}")
    return types.FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )


def guards_of_arguments(guards: list) -> list[bool]:
    """Which of a program's guards are checked at each step: those of the step's arguments. A
    decoder does not change, so checks of its weights would only cost time."""
    return [bool(GIVEN.match(guard.name)) for guard in guards]


# ===== The decoder


class Decoder:
    """`model`, ready to read text and write it: `decoder(ids, state)` gives its logits and its next
    state.

    bits: None for the model's own fp32, 16 for bf16, 8 or 4. The model is not kept, but weights
    that nothing is folded into are shared with it, so it must not be trained on. A state of the
    model's is accepted too, and no call changes the state that it is given.
    """

    @torch.no_grad()
    def __init__(
        self, model: LanguageModel, bits: int | None = None, weights: PackedWeights | None = None
    ):
        """weights: where prepared weights come from or go to, in place of `bits`. If they come from
        a file, only the shapes of the model, which may be on the meta device, are used.

        Raises `InputError` for bits that don't exist, and where a file does not fit the model.
        """
        if weights is not None and weights.given is not None:
            model.eval()  # its shapes alone are used, so it is nobody's to train
        if model.training:
            raise ValueError("a Decoder reads with a model in eval mode; call model.eval() first")
        self.config = model.config
        self.vocab_size = model.vocab_size
        weights = PackedWeights(Bits.of(bits)) if weights is None else weights
        if weights.given is None:  # made from the model's, so they go where it is
            weights.device = model.cells[0].token_embedding.weight.device
        count = len(model.cells)  # 1, or several networks side by side (multinodal_enabled)
        names = [""] if count == 1 else [f"cells.{i}." for i in range(count)]
        named = zip(model.cells, names, strict=True)
        self.cells = [DecoderCell(cell, name, weights) for cell, name in named]
        loops = range(self.config.loop_iterations)
        # In the order of the state's blocks: by cell, then by pass through the stack.
        self.blocks = [block for cell in self.cells for _ in loops for block in cell.blocks]
        self.gates = None
        if self.config.multinodal_enabled and model.gates is not None:
            self.gates = weights.module("gates", model.gates)
        # A head that is the embedding has its name and its bits, so that a file holds it once.
        component = "embedding" if head_is_embedding(self.config) else "head"
        # (V, C), or (V, cells·C) with each cell's share of the logits multiplied in
        head = model.head_weight() if count == 1 else model.head_weight() * model.share
        self.head = weights.matrix(component, head, component)
        self.device = self.cells[0].norm[1].device
        self.end = None
        if count == 1 and self.head.kernel is not None:
            self.end = HeadProgram(self.cells[0].norm, self.head)
        # The state at the start of one text, not a stream's and a stream's. Every start is all
        # zeros, so that a model on the meta device can tell it by its shapes.
        self.starts = [
            model.start(1, stream).map(
                lambda t: torch.zeros(t.shape, dtype=t.dtype, device=self.device)
            )
            for stream in (False, True)
        ]
        # what its states look like, by whether they are a stream's: see `check`
        self.layouts: dict[bool, list[dict[str, tuple]]] = {}
        self.program: Callable | None = None  # a compiled `run`, for steps of one token
        self.rows = 0  # texts at once that `program` is for
        self.graphs: dict = {}  # kept for graphs.py: by rows and kind of state
        self.compiles_graphs = False  # whether graphs.py compiles a step before it captures it
        weights.check()

    def compile(self, rows: int = 1, stream: bool = True) -> None:
        """Has torch.compile make one program of the step of one token in `rows` texts, which may
        take a minute. Steps of other numbers of rows stay as they are. stream: the kind of state,
        as in `start`; for the other kind a program is made when a step first needs it.

        Raises `InputError` where a memory writes, which is not one program, and RuntimeError for
        what torch cannot compile: where there is no C++ compiler, say, or for bf16 weights on a CPU
        that multiplies them.
        """
        if any(isinstance(m, WrittenMemory) for block in self.blocks for m in block.memories):
            raise InputError("compile: not with fwpkm_inference_updates; leave one of the two out")
        options: dict = {"guard_filter_fn": guards_of_arguments}
        if self.device.type == "cpu":
            # Kernels are then called from C++, which costs less than from Python.
            options["cpp_wrapper"] = True
        ids = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)
        # An ordinary step first, by parts as the compiled one: while it is traced no product's ways
        # can be timed.
        for block in self.blocks:
            if block.program is not None:
                block.program.chosen[rows] = "by_parts"
        self(ids, self.start(rows, stream))
        run = types.MethodType(own_code(Decoder.run), self)
        # One program for exactly these shapes: no Python between its parts, no checks of sizes.
        self.program = torch.compile(run, fullgraph=True, dynamic=False, options=options)
        self.rows = rows
        # The first call compiles.
        self(ids, self.start(rows, stream))

    def start(self, rows: int, stream: bool = False) -> DecoderState:
        """The state at the start of `rows` texts; stream as in `WaveletLM.start`."""
        return self.adopt(self.starts[stream].select([0] * rows))  # the one row, so many times

    def adopt(self, state: State) -> DecoderState:
        """A state of the model's as this decoder keeps it, with tapes."""
        pairs = zip(self.blocks, state.blocks, strict=True)
        parts = [block.adopt(shown) for block, shown in pairs]
        # so that the state can be shown as the model's again
        lags = [list(block.branch.longest) for block in self.blocks]
        return DecoderState(parts, lags, state.embedding)

    @torch.no_grad()
    def __call__(
        self, ids: Tensor, state: State | None = None, last_only: bool = True
    ) -> tuple[Tensor, DecoderState]:
        """Reads ids (B, T) int64 → fp32 logits after the last token, (B, 1, V), or with last_only
        False after each token, (B, T, V); and the state after them.

        state: the model's or a decoder's, of B rows; None: at the start of a text.
        """
        state = self.start(ids.size(0)) if state is None else state
        state = state if isinstance(state, DecoderState) else self.adopt(state)
        self.check(state, ids.size(0))
        if ids.size(1) > 1:  # a chunk: the parts read whole tapes and give new ones
            logits, parts, past = self.run(ids, state.parts, state.embedding, last_only)
            return logits, DecoderState(parts, state.lags, past, self.layouts)
        is_compiled = self.program is not None and ids.size(0) == self.rows
        seen = []
        for block, part in zip(self.blocks, state.parts, strict=True):
            if is_compiled or not block.reads_tapes(ids.size(0)):
                seen.append(block.look_back(part))
            else:
                tapes = {n: tape.longer() for n, tape in part.items() if isinstance(tape, Tape)}
                seen.append(part | tapes)
        if is_compiled:
            # Views of tapes have strides that change from step to step.
            seen = [{name: with_fresh_strides(x) for name, x in part.items()} for part in seen]
            past = {name: with_fresh_strides(x) for name, x in state.embedding.items()}
            logits, written, past = self.program(with_fresh_strides(ids), seen, past)
        else:
            logits, written, past = self.run(ids, seen, state.embedding)
        parts = []
        for part, new in zip(state.parts, written, strict=True):
            # Where the state has a tape, what the step gave is one entry of it, or its successor.
            entries = {
                name: part[name].then(entry)
                for name, entry in new.items()
                if isinstance(part[name], Tape) and not isinstance(entry, Tape)
            }
            parts.append(new | entries)
        return logits, DecoderState(parts, state.lags, past, self.layouts)

    def check(self, state: DecoderState, rows: int) -> None:
        """Raises `InputError` for a state of another network or of another number of texts: our own
        kernels are given addresses, and would read and write past its end."""
        if state.rows != rows:
            raise InputError(f"state: it is of {state.rows} texts, and there are {rows}")
        if state.layout_of is self.layouts:  # a step of this decoder made it
            return
        is_stream = any("ring" in part for part in state.parts)
        if is_stream not in self.layouts:
            self.layouts[is_stream] = self.start(1, is_stream).layout()
        if state.layout() != self.layouts[is_stream]:
            raise InputError("state: it is of another network, or of another type than fp32")

    def run(
        self, ids: Tensor, parts: list[dict], past: dict[str, Tensor], last_only: bool = True
    ) -> tuple[Tensor, list[dict], dict[str, Tensor]]:
        """The network, from ids (B, T) to logits (B, T, V), or (B, 1, V) with last_only.

        parts: the state of each block as `DecoderBlock` takes it; past: what the embedding
        remembers. Returns the logits, and both as they are afterwards.
        """
        rows, length = ids.shape
        counts = None  # a chunk counts in the model's mean, and a block's program in its own
        if length == 1 and "count" in parts[0] and not self.blocks[0].takes(rows, parts[0]):
            counts = counts_after(parts[0], self.config.block_size)
        if len(self.cells) == 1:
            x, after, past = self.read(ids, parts, past, counts)  # x (N, C)
            xs = [x]
        else:
            xs, after, past = self.read_in_step(ids, parts, past, counts)
        if last_only and length > 1:
            # The head is a large matrix: only the last position of each text, (B, C), goes on.
            xs = [x.view(rows, length, -1)[:, -1] for x in xs]
        if self.ends_by_program(xs[0], length):
            logits = self.end(xs[0])
            return logits.view(rows, -1, self.vocab_size), after, past
        ends = zip(xs, self.cells, strict=True)
        hs = [F.layer_norm(x, *cell.norm) for x, cell in ends]  # (B or N, C) each
        # The cells' heads lie side by side in one matrix, which adds their logits up.
        logits = self.head(hs[0] if len(hs) == 1 else torch.cat(hs, dim=1))
        return logits.float().view(rows, -1, self.vocab_size), after, past  # (B, T or 1, V)

    def ends_by_program(self, x: Tensor, length: int) -> bool:
        """Whether the last norm and the head are one call."""
        if self.end is None or length > 1 or torch.compiler.is_compiling():
            return False
        return self.head.way(x.size(0), x, None, 1.0) == "by_kernel"

    def read(
        self, ids: Tensor, parts: list[dict], past: dict[str, Tensor], counts: Counts
    ) -> tuple[Tensor, list[dict], dict[str, Tensor]]:
        """`run` up to the last block of a model with one cell: the stream (N, C), and the new
        states of blocks and embedding."""
        e, last_ids = self.cells[0].embed(ids, past.get("ids"))  # (N, C)
        x = e
        below = None  # the running mean of the block before; the first block has none
        after = []
        for block, part in zip(self.blocks, parts, strict=True):
            x, below, new = block(x, e, below, ids.size(1), part, counts)
            after.append(new)
        return x, after, {} if last_ids is None else {"ids": last_ids}

    def read_in_step(
        self, ids: Tensor, parts: list[dict], past: dict[str, Tensor], counts: Counts
    ) -> tuple[list[Tensor], list[dict], dict[str, Tensor]]:
        """What `read` gives, for several cells, which gate each other between blocks: a stream
        (N, C) of each."""
        cells = self.cells
        each = len(self.blocks) // len(cells)  # applications of blocks in a cell
        before = [iter(parts[c * each : (c + 1) * each]) for c in range(len(cells))]
        after: list[list[dict]] = [[] for _ in cells]
        es = []  # the embedding of each cell, (N, C)
        new_past = {}
        for c, cell in enumerate(cells):
            e, last_ids = cell.embed(ids, past.get(ids_name(c)))
            es.append(e)
            if last_ids is not None:
                new_past[ids_name(c)] = last_ids
        xs = list(es)
        below: list[Tensor | None] = [None] * len(cells)
        # All cells make a step before any makes the next, since gates read all of their streams.
        interval = self.config.multinodal_cross_cell_gate_interval
        for _ in range(self.config.loop_iterations):
            for i in range(self.config.applications):
                for c, cell in enumerate(cells):
                    part = next(before[c])
                    applied = cell.blocks[i](xs[c], es[c], below[c], ids.size(1), part, counts)
                    xs[c], below[c], new = applied
                    after[c].append(new)
                if self.gates is not None and i % interval == 0:
                    xs = self.gates[i // interval](xs)
        return xs, [new for own in after for new in own], new_past  # cell by cell, as they came


class PackedModel(nn.Module):
    """A decoder with the interface of a model, as a quantised checkpoint gives it: the logits of
    every position, no gradients."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder
        self.config = decoder.config
        self.vocab_size = decoder.vocab_size
        self.start = decoder.start

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """ids (B, T) int64 → logits (B, T, V) in fp32, and the state after them."""
        return self.decoder(ids, state, last_only=False)
