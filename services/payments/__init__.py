"""Charges orders, each once."""
