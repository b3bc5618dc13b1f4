"""How a trained network is read fast: the decoder, its packed weights, sampling and scoring."""
