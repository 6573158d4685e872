"""The six edits of hidden states. Functions of tensors, without a model."""
