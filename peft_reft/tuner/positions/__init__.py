"""Which tokens are edited: sequences, prompts and positions. Functions of tensors, without a model."""
