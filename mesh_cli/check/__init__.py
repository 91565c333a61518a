"""`mesh check`: facts are gathered (`gather`), decided on by pure functions, and shown (`command`)."""
