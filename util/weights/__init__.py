"""Files of weights: checkpoints, and where they can be downloaded."""
