"""The commands that an installation has, each a module with ``main(argv)``."""

import sys

# As for a script, a config may name classes of modules in the working folder.
sys.path.append("")
