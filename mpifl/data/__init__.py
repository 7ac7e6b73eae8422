"""Federated datasets on disk and on their way to a model."""
