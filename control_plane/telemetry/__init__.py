"""Load reports: what processes count of their calls comes in, and the last minutes of it can be asked about.

``recorder`` turns cumulative counters into what happened when, ``window`` keeps that for a while, ``traffic`` answers
questions about it. All of these are pure; ``reports`` and ``operators`` are their gRPC services.
"""
