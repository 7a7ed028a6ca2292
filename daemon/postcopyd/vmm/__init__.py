"""A small KVM virtual machine monitor with a guest that can be paused, moved and checked to the byte.

`postcopyd demo`, the tests and the benchmarks use it as the daemon's client; the daemon never imports it.
"""
