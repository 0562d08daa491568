"""Plans of memory: what a model needs to load, to train and to run."""
