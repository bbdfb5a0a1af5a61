"""`python -m pkmem`, the command line."""

from pkmem.cli import main

main()
