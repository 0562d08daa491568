"""Owns scoring: what an answer says, and whether it is what its row wants, for every command alike."""
