"""Owns all knowledge of llama.cpp: its C library, its tools and its files."""
