"""Pipelines on paper: orders of work, timelines, bubbles, gathers, and a choice of layout."""
