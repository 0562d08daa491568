"""Owns the commands: each turns what the command line says into calls of the package."""
