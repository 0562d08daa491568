"""Owns data: where rows come from, what they mean, how they become ids and labels, what is held out."""
