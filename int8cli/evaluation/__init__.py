"""Evaluation: what each int8 method does to a model's predictions and to the outputs of its linear layers.

`methods` lists the methods, `results` holds what is found out about them.
"""
