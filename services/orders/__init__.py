"""Takes orders: reserves stock at inventory, charges at payments, and remembers."""
