"""C behind cffi. One extension module per noun; build.py lists them."""
