"""What the project costs and how fast it is, measured; never part of a test's verdict."""
