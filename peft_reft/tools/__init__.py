"""Tools around training. The tuner does not need them."""
