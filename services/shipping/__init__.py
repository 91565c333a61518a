"""Ships placed orders, of which it hears by events, and says so by another event."""
