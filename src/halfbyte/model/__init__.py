"""Owns the model: finding it, the precision it is loaded at, its true size, its LoRA adapter."""
