"""Evaluation: how each int8 method changes a model's predictions and the outputs of its linear layers."""
