"""Owns what leaves the house: the merged model and the proof that it is the trained one."""
