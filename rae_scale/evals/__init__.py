"""Evaluation: scores of generated pictures, each with its interval, floor and ceiling."""
