"""Passes over the encoder dialect: each file is one pass, ``pipeline`` is their order."""
