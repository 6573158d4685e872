"""With what a hidden state is edited: parameters, from an optimizer's step or a file to weights that are ready to use."""
