"""Which tokens are edited: sequences, prompts and positions, as functions of tensors."""
