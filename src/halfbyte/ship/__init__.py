"""Owns what is shipped: the merged model, its exports, and the proof that they are the model that was trained."""
