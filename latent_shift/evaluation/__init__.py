"""Evaluation: scores of generated clips."""
