"""Tells customers what becomes of their orders, of which it hears by events."""
