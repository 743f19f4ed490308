"""Importers: each file reads one source of models and returns a Model."""
