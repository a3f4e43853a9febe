"""Prediction with a trained network, and its scores by each field's own protocol."""
