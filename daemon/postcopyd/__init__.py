"""postcopyd: page-fault daemon for post-copy live migration and lazy snapshot restore."""

__version__ = "0.1.0"
