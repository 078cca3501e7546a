"""The commands that an installation has, each a module with ``main(argv)``."""
