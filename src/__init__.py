"""Library of the training scripts: every module is usable on its own."""
