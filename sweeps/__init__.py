"""What a sweep is and what a trial does; knows nothing of the service that runs many of them."""

__version__ = "0.1.0"
