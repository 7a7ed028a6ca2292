"""Prometheus metrics, made from status snapshots when they are asked for."""
