"""Prediction with a trained network, and its scores by each field's own protocol."""

from dpt.evaluation.prediction import Prediction, Predictor

__all__ = ["Prediction", "Predictor"]
