"""The config of an exported WaveletLM."""

from typing import Any

from transformers import PretrainedConfig


class WaveletLMConfig(PretrainedConfig):
    """`network` holds the keys that shape the network, as in the config.json of the run that it
    was exported from."""

    model_type = "waveletlm"

    def __init__(
        self,
        network: dict[str, Any] | None = None,
        vocab_size: int = 0,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        **others: Any,
    ):
        self.network = {} if network is None else network
        self.vocab_size = vocab_size
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **others)

    # Under the names by which other libraries look for them.

    @property
    def hidden_size(self) -> int:
        return self.network["C"]

    @property
    def num_hidden_layers(self) -> int:
        return self.network["layers"]
