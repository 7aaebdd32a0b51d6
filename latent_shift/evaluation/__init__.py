"""Evaluation: scores read off generated clips."""
