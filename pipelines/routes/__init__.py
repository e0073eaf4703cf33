"""High-resolution routes: from the size a model was trained at to the one asked for, in stages."""

from .plan import ROUTES, Stage, plan

__all__ = ["ROUTES", "Stage", "plan"]
