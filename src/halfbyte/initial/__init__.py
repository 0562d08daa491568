"""Owns halfbyte init: rows and a machine become a commented config that previews, plans and trains."""
