"""How a network is trained: steps, optimizers, several GPUs, the record of a run."""
