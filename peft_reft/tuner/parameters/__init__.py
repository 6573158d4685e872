"""The parameters of edits: from an optimizer step or a file to weights that a forward can read."""
