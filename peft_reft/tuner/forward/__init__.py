"""One call of a model becomes one plan for its layers."""
