"""Owns the data: sources and formats of rows, their rendering to ids and labels, what is held out."""
