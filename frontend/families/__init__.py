"""Model families that the Hugging Face importer knows. To add one: a file here and an entry below."""

from __future__ import annotations

from .bert import BERT
from .distilbert import DISTILBERT
from .family import Family, Names, Sizes

FAMILIES: dict[str, Family] = {family.model_type: family for family in (BERT, DISTILBERT)}
"""By ``model_type`` of config.json."""

__all__ = ["FAMILIES", "Family", "Names", "Sizes"]
