"""What is done to a hidden state: the six edits, as functions of tensors."""
