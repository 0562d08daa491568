"""Owns halfbyte doctor: what is wrong with this machine, and the line that mends it."""
