"""Routes from what a model was trained at to what is asked for: larger pictures in stages, longer clips in windows."""

from .plan import CLIP_ROUTES, ROUTES, Stage, plan

__all__ = ["CLIP_ROUTES", "ROUTES", "Stage", "plan"]
