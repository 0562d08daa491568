"""Memory arithmetic: what a model takes to load, to train and to run."""
