"""Prediction with a trained network, and scoring by each field's own protocol."""

from dpt.evaluation.prediction import Prediction, Predictor

__all__ = ["Prediction", "Predictor"]
