"""Post-copy for an unmodified QEMU: the preload shim's place, and a migration driven over QMP."""
