"""Code generated from protos/postcopyd/v1; see `make setup`."""
