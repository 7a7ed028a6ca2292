"""Guests of our own for QEMU, which say themselves whether their memory is right."""
