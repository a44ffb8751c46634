"""One trial: load a base, put an adapter on, train it, score it, say how it went."""
