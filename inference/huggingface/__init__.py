"""What export.py writes beside the weights: classes for transformers, the network's source in one
file, a tokenizer in transformers' format.

modeling_waveletlm.py and configuration_waveletlm.py are copied as they stand. They are never
imported here: their relative imports lead to files of the exported folder."""
