"""The service: proposes trials, places them, records them."""
