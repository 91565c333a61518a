"""Keeps stock and reserves it for orders."""
