"""`python -m peftcore.train`."""

from peftcore.train.cli import main

main()
