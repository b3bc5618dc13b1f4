"""What lies below model.py: the state, hand-written passes, the loss, memories and variants."""
