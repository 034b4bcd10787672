"""Families of generated problems with worked solutions, for training and for held-out evaluation."""

from .corpus import conversations, worked_documents
from .families import FAMILIES, LAPTOP, constant_baseline, evaluation_problems, family, training_problem, validation_problem
from .problem import HELD_OUT_SHARE, Family, Problem, is_held_out

__all__ = [
    "FAMILIES", "HELD_OUT_SHARE", "LAPTOP", "Family", "Problem", "constant_baseline", "conversations", "evaluation_problems", "family",
    "is_held_out", "training_problem", "validation_problem", "worked_documents",
]
