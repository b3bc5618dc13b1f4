"""WaveletLM as a model of transformers: the network is in network.py.

It has no keys and values of earlier positions to cache. What it keeps of a text is a `State` of
fixed size, which goes from one call to the next under the name `state`, as RWKV's does."""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput
from transformers.utils.versions import require_version

from .configuration_waveletlm import WaveletLMConfig
from .network import Config, State, build_model

# Older ones (5.10 is one) reorder no state of this name in beam search, and so go on with those of
# other texts; this is the oldest that was tried.
require_version("transformers>=5.17", "pip install -U transformers")

# positions that are read at once: enough to keep matrix products busy, and their memory is bounded
PIECE = 512


@dataclass
class WaveletLMOutput(ModelOutput):
    """loss: mean cross-entropy in nats, where labels were given. logits (B, T, V), or of the last
    logits_to_keep positions. state: what a call that goes on with the text is to be given."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: State | None = None


def padding_of(attention_mask: Tensor | None, ids: Tensor) -> Tensor:
    """How many positions of padding each row of ids (B, T) begins with: (B,)."""
    if attention_mask is None:
        return torch.zeros(len(ids), dtype=torch.int64, device=ids.device)
    if attention_mask.shape != ids.shape:
        shape, wanted = list(attention_mask.shape), list(ids.shape)
        raise ValueError(f"attention_mask: is {shape}; it must be {wanted}, as input_ids are")
    return attention_mask.ne(0).cumsum(1).eq(0).sum(1)


class WaveletLMForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = WaveletLMConfig
    base_model_prefix = "network"
    main_input_name = "input_ids"
    # An associative memory works out its rates in fp32, whatever type the weights are loaded in.
    _keep_in_fp32_modules_strict = ["forget_write"]  # noqa: RUF012  (no tuple will do)
    _is_stateful = True  # a state cannot be cut back, which assisted decoding would need

    def __init__(self, config: WaveletLMConfig):
        super().__init__(config)
        self.network = build_model(Config(**config.network), config.vocab_size)
        places_of = {module: place for place, module in self.named_modules()}
        # "network" itself, or each of its cells
        places = [places_of[cell] for cell in self.network.cells]
        self._tied_weights_keys = {
            f"{place}.lm_head.weight": f"{place}.token_embedding.weight" for place in places
        }
        # Matrices of the transforms and the like. They are in no checkpoint, and transformers
        # empties them while it loads one: `_init_weights` puts them back.
        for module in self.modules():
            names = module._non_persistent_buffers_set
            module.constants = {name: getattr(module, name) for name in names}
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """What build_model has not done already: nothing but the constants."""
        for name, value in getattr(module, "constants", {}).items():
            buffer = getattr(module, name)
            buffer.copy_(value.to(buffer.device))

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_input_embeddings(self) -> nn.Module:
        return self.network.cells[0].token_embedding

    def read(self, ids: Tensor, padding: Tensor, state: State | None) -> tuple[Tensor, State]:
        """What the head reads at ids (B, T), (B, T, C), and the state after them.

        A row's text begins behind its padding (B,): up to there its state stays that of a start."""
        if state is None:
            state = self.network.start(len(ids), stream=not self.training)
        length = ids.size(1)
        cuts = sorted({*range(0, length, PIECE), *padding.tolist(), length})
        parts = []
        for begin, end in itertools.pairwise(cuts):
            part, state = self.network.hidden(ids[:, begin:end], state)
            parts.append(part)
            waiting = padding >= end
            if waiting.any():
                state = state.reset(waiting)
        return torch.cat(parts, dim=1), state

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        state: State | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **others: Any,
    ) -> WaveletLMOutput | tuple:
        """input_ids (B, T) int64, of which padding comes first in a row and has a mask of 0. What
        comes behind a text is read as text, and no position before it sees it.

        state: that of an earlier call whose text these ids go on with, without padding. labels
        (B, T): those of input_ids, shifted here; −100 is left out."""
        if output_attentions or output_hidden_states:
            raise ValueError("output_attentions, output_hidden_states: WaveletLM has none to give")
        if state is not None and attention_mask is not None:
            if not attention_mask[:, -input_ids.size(1) :].all():
                raise ValueError("attention_mask: a text that goes on from a state has no padding")
            attention_mask = None
        hidden, state = self.read(input_ids, padding_of(attention_mask, input_ids), state)
        if isinstance(logits_to_keep, int):
            logits_to_keep = slice(-logits_to_keep, None)
        logits = F.linear(hidden[:, logits_to_keep], self.network.head_weight())
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **others
            )
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        output = WaveletLMOutput(loss, logits, state if use_cache else None)
        return output.to_tuple() if return_dict is False else output

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        state: State | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | None = None,
        is_first_iteration: bool = False,
        **others: Any,
    ) -> dict[str, Any]:
        if state is None and attention_mask is not None and not attention_mask[:, -1].all():
            raise ValueError("attention_mask: texts to go on from are padded on the left")
        if state is not None and not is_first_iteration:
            input_ids = input_ids[:, -1:]  # all before it is in the state
            attention_mask = None
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "state": state,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep or 1,
        }

    def _update_model_kwargs_for_generation(
        self, outputs: WaveletLMOutput, model_kwargs: dict[str, Any], *others: Any, **named: Any
    ) -> dict[str, Any]:
        model_kwargs["state"] = outputs.state
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *others, **named)

    @staticmethod
    def _reorder_cache(state: State | None, beam_idx: Tensor) -> State | None:
        return None if state is None else state.select(beam_idx)
