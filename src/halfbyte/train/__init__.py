"""Owns training: the loss on labelled tokens, TRL's trainer around it, checkpoints, tracking."""
