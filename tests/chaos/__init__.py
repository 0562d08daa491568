"""The fault campaign: faults of every kind, put into real runs of a small model, and what became of each.

``make chaos`` runs it whole; ``make chaos SCALE=0.1`` tries a tenth of the faults of each kind.
"""
