"""Client of gradstore, the gradient datastore service."""

__version__ = "0.1.0"
